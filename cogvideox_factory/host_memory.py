"""How much memory this process holds on the host, and how much more it may take."""

import resource
from pathlib import Path


def resident_memory(*, peak: bool = False) -> int:
    """Return the bytes this process holds now, or the most it has held."""
    status = Path("/proc/self/status")
    if not status.exists():  # not Linux: the peak is all there is, in bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    field = "VmHWM" if peak else "VmRSS"
    line = next(line for line in status.read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes that are to be had: what the machine has left, or the control group (a container's) if that is
    less; None where nothing tells."""
    table = root / "proc/meminfo"
    if not table.exists():
        return None
    left = 1024 * _entry(table, "MemAvailable:")
    for folder, limit, used, cached in (
        ("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        group = root / folder
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            held = int((group / used).read_text()) - _entry(group / "memory.stat", cached)  # files kept are let go
            return min(left, max(int(text) - held, 0))
    return left


def _entry(table: Path, name: str) -> int:
    """Return the number behind `name` in a table of the kernel's, 0 if it has none."""
    rows = (line.split() for line in table.read_text().splitlines())
    return next((int(row[1]) for row in rows if row[:1] == [name]), 0)
