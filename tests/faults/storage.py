"""F6, F7: a disk that is full, read-only, forbidden or failing."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cogvideox_factory.data.cache_check import DAMAGED, audit_cache
from cogvideox_factory.data.export import export_to_video
from tests.faults.boundaries import IO_ERROR, NO_SPACE, Boundaries
from tests.faults.makers import moving
from tests.faults.preparing import bench, prepare
from tests.faults.trial import Outcome, Trial, Verdict, files_of, in_child, spread

_KIB = (4, 12, 20, 28, 36, 48, 60, 72, 84, 100, 128, 4096)
_STORAGE = 6


@contextmanager
def small_disk(kib: int, work: Path) -> Iterator[Path | None]:
    """Yield a disk of so many KiB, or None where none can be mounted (that takes root)."""
    disk = Path(tempfile.mkdtemp(prefix="disk-", dir=work))
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=False, capture_output=True)


def _enlarge(disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True, capture_output=True)


def _limit_files(kib: int, function: Callable, *args: object) -> object:
    """Run in a child whose files can have only so many KiB: a full disk for those without root."""
    import resource

    resource.setrlimit(resource.RLIMIT_FSIZE, (1024 * kib, 1024 * kib))
    return function(*args)


def _save(run: Path) -> None:
    import torch

    from cogvideox_factory.checkpoints import verify_checkpoint
    from cogvideox_factory.torch_engine.checkpoint import save_checkpoint

    verify_checkpoint(save_checkpoint(run, 2, {"w": torch.ones(8, 1024)}, {}, keep=5))


def _export(folder: Path) -> None:
    export_to_video(moving(9), folder / "out.mp4", fps=8)


def _prepare(folder: Path) -> None:
    prepare(bench()[0], folder)


def full_disks(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F6: disks of twelve sizes under the cache, a checkpoint and an export."""
    what = {"cache": _prepare, "checkpoint": _save, "export": _export}
    bench()  # made here, not in every child
    tries = [(name, kib) for kib in _KIB for name in what]
    for name, kib in spread(tries, count):
        verdict, detail = _full(what[name], name, kib, work)
        yield Trial(family="F6", name=f"{name} on {kib} KiB", verdict=verdict, detail=detail)


def _full(write: Callable[[Path], None], name: str, kib: int, work: Path) -> tuple[Verdict, str]:
    with small_disk(kib, work) as disk:
        target = (disk or Path(tempfile.mkdtemp(dir=work))) / name
        ended = in_child(write, target) if disk else in_child(_limit_files, kib, write, target)
        if ended.exit_code == 0:
            return Verdict.OK, "it fits"
        if ended.exit_code != _STORAGE:
            return ended.broke or Verdict.SILENT, f"exit {ended.exit_code}: {ended.output}{ended.error}"
        if left := [p for p in target.rglob("*") if p.name.startswith(".tmp-") or (name != "cache" and p.is_file())]:
            return Verdict.LOST, f"left behind: {left}"
        if disk:
            _enlarge(disk)
        return _goes_on(write, name, target)


def _goes_on(write: Callable[[Path], None], name: str, target: Path) -> tuple[Verdict, str]:
    """Judge what is there after a refusal, then do the same again where there is room."""
    if name == "cache" and target.exists() and (bad := audit_cache(target).of(DAMAGED)):
        return Verdict.SILENT, f"{bad[0].file} is damaged and has its final name"
    again = in_child(write, target)
    if again.exit_code != 0:
        return again.broke or Verdict.LOST, f"with room again: {again.output}{again.error}"
    if name == "cache" and files_of(target) != bench()[1]:
        return Verdict.LOST, "other files than an undisturbed run makes"
    return Verdict.REFUSED, ""


def failing_folders(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F7: folders that cannot be written, and calls that fail, at boundaries of a run."""
    cases = [_parent_is_a_file, _cache_is_a_file, _no_parent, _part_is_a_file, _list_is_a_folder, _entry_is_a_folder]
    cases += [_read_only, _read_only_parent, _unreadable_set]
    boundaries = bench()[2]
    faults = [(number, fault) for number in range(len(boundaries)) for fault in (IO_ERROR, NO_SPACE)]
    for case in cases:
        folder = Path(tempfile.mkdtemp(dir=work))
        verdict, detail = case(folder)
        yield Trial(family="F7", name=case.__name__.strip("_"), verdict=verdict, detail=detail)
    for number, fault in spread(faults, max(1, count - len(cases))):
        cache = Path(tempfile.mkdtemp(dir=work)) / "cache"
        ended = in_child(prepare, bench()[0], cache, Boundaries(cache, number, fault))
        verdict, detail = _refused_then_done(ended, cache)
        if ended.exit_code == 0 and files_of(cache) == bench()[1]:
            verdict, detail = Verdict.OK, ""  # making a folder that is there, removing what was renamed
        yield Trial(family="F7", name=f"{fault} {number}: {boundaries[number]}", verdict=verdict, detail=detail)


def _refused_then_done(
    ended: Outcome, cache: Path, mend: Callable[[], object] | None = None, *, code: int = _STORAGE
) -> tuple[Verdict, str]:
    """Judge a refusal that names the place, mend it, and do the same again."""
    if ended.exit_code != code:
        return ended.broke or Verdict.SILENT, f"exit {ended.exit_code}: {ended.output}{ended.error}"
    if code == _STORAGE and str(cache) not in ended.error and str(cache.parent) not in ended.error:
        return Verdict.SILENT, f"the folder is not named: {ended.error}"
    if mend:
        mend()
    return _goes_on(_prepare, "cache", cache)


def _parent_is_a_file(folder: Path) -> tuple[Verdict, str]:
    (folder / "parent").write_text("x")
    cache = folder / "parent" / "cache"
    return _refused_then_done(in_child(_prepare, cache), cache, (folder / "parent").unlink)


def _cache_is_a_file(folder: Path) -> tuple[Verdict, str]:
    cache = folder / "cache"
    cache.write_text("x")
    return _refused_then_done(in_child(_prepare, cache), cache, cache.unlink)


def _no_parent(folder: Path) -> tuple[Verdict, str]:
    return (Verdict.OK, "") if _goes_on(_prepare, "cache", folder / "a/b/c")[0] == Verdict.REFUSED else (
        Verdict.LOST, "a folder that is not there yet was not made"
    )  # fmt: skip


def _part_is_a_file(folder: Path) -> tuple[Verdict, str]:
    cache = folder / "cache"
    cache.mkdir()
    (cache / "clips").write_text("x")
    return _refused_then_done(in_child(_prepare, cache), cache, (cache / "clips").unlink)


def _list_is_a_folder(folder: Path) -> tuple[Verdict, str]:
    cache = folder / "cache"
    (cache / "clips.jsonl").mkdir(parents=True)
    return _refused_then_done(in_child(_prepare, cache), cache, (cache / "clips.jsonl").rmdir)


def _entry_is_a_folder(folder: Path) -> tuple[Verdict, str]:
    cache = folder / "cache"
    entry = cache / next(name for name in bench()[1] if name.startswith("clips/"))
    entry.mkdir(parents=True)
    return _refused_then_done(in_child(_prepare, cache), cache, entry.rmdir)


def _as_nobody(function: Callable, *args: object) -> object:
    """Run without root's right to write everywhere."""
    if os.geteuid() == 0:
        os.setegid(65534)
        os.seteuid(65534)
    return function(*args)


def _open_up(folder: Path) -> None:
    """Let nobody see the way to a folder (temporary folders are root's own)."""
    for path in (folder, *folder.parents):
        with suppress(OSError):
            if path.stat().st_uid == os.getuid() and path.stat().st_mode & 0o005 != 0o005:
                path.chmod(path.stat().st_mode | 0o055)


def _read_only(folder: Path) -> tuple[Verdict, str]:
    cache = folder / "cache"
    cache.mkdir()
    return _forbidden(cache, cache)


def _read_only_parent(folder: Path) -> tuple[Verdict, str]:
    return _forbidden(folder / "cache", folder)


def _forbidden(cache: Path, closed: Path) -> tuple[Verdict, str]:
    _open_up(bench()[0])
    _open_up(closed)
    closed.chmod(0o555)
    ended = in_child(_as_nobody, _prepare, cache)
    return _refused_then_done(ended, cache, lambda: closed.chmod(0o755))


def _unreadable_set(folder: Path) -> tuple[Verdict, str]:
    """A caption list nobody may read: the data is refused (3), not the disk (6)."""
    root = folder / "set"
    shutil.copytree(bench()[0], root)
    _open_up(root)
    (root / "metadata.csv").write_text("video,caption\n0.mp4,x\n")
    (root / "metadata.csv").chmod(0o000)
    cache = folder / "cache"
    ended = in_child(_as_nobody, prepare, root, cache)
    return _refused_then_done(ended, cache, code=3)
