"""How much memory this process holds on the host."""

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
