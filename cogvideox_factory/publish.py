"""Writing so that a path with its final name is always complete.

Everything is written under a hidden temporary name beside its target, flushed to disk, then renamed. A writer
that dies leaves only a `.tmp-<host>-<pid>-…` behind, which readers ignore and `sweep` removes once its owner
is gone.
"""

import errno
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from cogvideox_factory.errors import StorageError

_PREFIX = ".tmp-"
_STORAGE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        "EACCES", "EDQUOT", "EEXIST", "EFBIG", "EIO", "EISDIR", "ENAMETOOLONG", "ENODEV", "ENOSPC", "ENOTDIR",
        "ENOTEMPTY", "ENXIO", "EPERM", "EROFS", "ESTALE",
    )
)  # fmt: skip


def _host() -> str:
    return socket.gethostname().replace("-", "_")[:64]


def _temporary(target: Path) -> Path:
    # The end of the name is kept for writers that look at the suffix; file names are limited to 255 bytes.
    name = os.fsdecode(os.fsencode(target.name)[-64:])
    return target.parent / f"{_PREFIX}{_host()}-{os.getpid()}-{secrets.token_hex(4)}-{name}"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_file(path: Path) -> None:
    """Wait until what was written to a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_tree(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_folder(path) if path.is_dir() else sync_file(path)
    _sync_folder(folder)


def _raise_storage_error(target: Path, temporary: Path, error: OSError) -> NoReturn:
    """Turn a failed write into a StorageError; what the caller's block failed at otherwise stays as it is."""
    culprit = Path(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else temporary
    ours = culprit in (target, temporary) or culprit in target.parents or temporary in culprit.parents
    if not ours or error.errno not in _STORAGE_ERRNOS:
        raise error
    free = shutil.disk_usage(existing_parent(target)).free
    raise StorageError(
        f"could not write {target}: {error.strerror or error} ({free / 2**30:.2f} GiB free there). "
        "Nothing was left half-written; make room or choose another folder and run the same command again."
    ) from error


@contextmanager
def publish_file(target: Path) -> Iterator[Path]:
    """Yield a temporary path to write; on success it becomes `target` in one rename.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    target = Path(target)
    temporary = _temporary(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync_file(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        _raise_storage_error(target, temporary, error)
    finally:
        with suppress(OSError):  # what went wrong before is the news
            temporary.unlink()


@contextmanager
def publish_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh temporary folder to fill; on success it becomes `target`, which must not exist yet.

    Raises:
        StorageError: `target` exists, or the disk is full, read-only or failing.
    """
    target = Path(target)
    if target.exists():
        raise StorageError(f"{target} exists already; it is never overwritten. Remove it or choose another name.")
    temporary = _temporary(target)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync_tree(temporary)
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        _raise_storage_error(target, temporary, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def publish_files(folder: Path, *, replaces: Callable[[Path], bool]) -> Iterator[Path]:
    """Yield a temporary folder to fill; on success its files move into `folder`, which may hold others.

    Files of `folder` that `replaces` picks (the weights of an earlier save, say) go away with the move. As
    long as the caller's block has not finished, and if anything fails, `folder` is as it was.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    folder = Path(folder)
    if not folder.exists():
        with publish_folder(folder) as temporary:
            yield temporary
        return
    temporary = _temporary(folder / folder.name)
    try:
        temporary.mkdir()
        yield temporary
        _sync_tree(temporary)
        _move_in(temporary, folder, replaces)
        _sync_folder(folder)
    except OSError as error:
        _raise_storage_error(folder, temporary, error)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move_in(temporary: Path, folder: Path, replaces: Callable[[Path], bool]) -> None:
    """Swap the files of `temporary` for those they replace: renames only, undone in reverse if one fails."""
    fresh = sorted(path for path in temporary.iterdir())
    names = {path.name for path in fresh}
    old = [p for p in sorted(folder.iterdir()) if p != temporary and (p.name in names or replaces(p))]
    aside = temporary / "replaced"
    aside.mkdir()
    done: list[tuple[Path, Path]] = []
    try:
        for source, destination in [(p, aside / p.name) for p in old] + [(p, folder / p.name) for p in fresh]:
            os.replace(source, destination)
            done.append((source, destination))
    except OSError:
        for source, destination in reversed(done):
            os.replace(destination, source)
        raise


@contextmanager
def replace_folder(target: Path) -> Iterator[Path]:
    """Yield a fresh temporary folder to fill; on success it takes the place of `target`, old content and all.

    Only for what can be made again (an export from a checkpoint): between two renames there is no `target`.

    Raises:
        StorageError: the disk is full, read-only or failing; the old folder then stays.
    """
    target = Path(target)
    old = _temporary(target)
    fresh = old.with_name(old.name + "-new")
    with publish_folder(fresh) as temporary:
        yield temporary
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(fresh, target)
        _sync_folder(target.parent)
    except OSError as error:
        _raise_storage_error(target, fresh, error)
    finally:
        shutil.rmtree(old, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Remove `folder`, which is whole under its name until it is gone; what a kill leaves is for `sweep`.

    Raises:
        StorageError: it cannot be renamed.
    """
    away = _temporary(folder)
    try:
        os.replace(folder, away)
    except OSError as error:
        _raise_storage_error(folder, away, error)
    shutil.rmtree(away, ignore_errors=True)


def publish_text(target: Path, text: str) -> None:
    """Write `text` (UTF-8) to `target` atomically."""
    with publish_file(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sweep(folder: Path) -> int:
    """Remove temporaries under `folder` whose process on this host is gone; return how many."""
    removed = 0
    for path in list(Path(folder).rglob(f"{_PREFIX}{_host()}-*")):
        pid = path.name.removeprefix(f"{_PREFIX}{_host()}-").split("-")[0]
        if pid.isdecimal() and not _alive(int(pid)) and os.path.lexists(path):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            removed += 1
    return removed


def is_temporary(path: Path) -> bool:
    """Tell whether `path` is a writer's unfinished work."""
    return path.name.startswith(_PREFIX)


def existing_parent(path: Path) -> Path:
    """Return the nearest ancestor of `path` (or itself) that exists."""
    path = Path(path).absolute()
    while not os.path.exists(path):  # unlike Path.exists, False where looking is forbidden
        path = path.parent
    return path


def require_room(folder: Path, num_bytes: int, *, what: str) -> None:
    """Refuse to start when `folder` cannot be written or holds less than 1.1 x `num_bytes` free.

    Raises:
        StorageError: with the bytes needed and the bytes free.
    """
    parent = existing_parent(folder)
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise StorageError(f"{folder} cannot be written ({parent} is read-only or no folder). Choose another folder.")
    free = shutil.disk_usage(parent).free
    if free < 1.1 * num_bytes:
        raise StorageError(
            f"{what} needs about {num_bytes / 2**30:.2f} GiB in {folder}; {free / 2**30:.2f} GiB are free. "
            "Make room or choose another folder."
        )


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
