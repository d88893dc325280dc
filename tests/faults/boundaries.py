"""Every step of writing a file, counted as it happens, and a fault at the k-th of them.

Installed in a forked child only: the calls of this process are wrapped, the product knows nothing of it. A boundary is
an open for writing, a write, a sync of a file or folder, a rename, a removal or a new folder, below one folder.
"""

import errno
import io
import os
import pathlib
import signal
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

KILL_BEFORE, KILL_AFTER, IO_ERROR, NO_SPACE = "kill before", "kill after", "I/O error at", "no space at"


class Boundaries:
    """Counts the boundaries below `folder` and, at number `at`, does `fault`.

    Args:
        folder: what lies elsewhere is not counted.
        at: 0-based; None only counts.
        fault: one of the four above.
    """

    def __init__(self, folder: Path, at: int | None = None, fault: str = KILL_BEFORE) -> None:
        self.seen: list[str] = []
        self._folder, self._at, self._fault = os.path.realpath(folder), at, fault

    def step(self, name: str, path: Any, operation: Callable[[], Any]) -> Any:
        """Do `operation`, which is boundary `name` of `path`."""
        path = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else _path_of(path)
        if not f"{path}/".startswith(f"{self._folder}/"):
            return operation()
        number = len(self.seen)
        self.seen.append(f"{name} {_kind(path)}")
        if number == self._at:
            self._before(path)
        try:
            return operation()
        finally:  # removing what a rename took away fails, and is a boundary too
            if number == self._at and self._fault == KILL_AFTER:
                os.kill(os.getpid(), signal.SIGKILL)

    def _before(self, path: str) -> None:
        if self._fault == KILL_BEFORE:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._fault in (IO_ERROR, NO_SPACE):
            number = errno.EIO if self._fault == IO_ERROR else errno.ENOSPC
            raise OSError(number, os.strerror(number), path)

    def install(self) -> "Boundaries":
        """Wrap this process's calls; never undone."""
        replace, fsync, mkdir, unlink = os.replace, os.fsync, os.mkdir, os.unlink
        opened = pathlib.Path.open
        os.replace = lambda a, b, **k: self.step("rename", b, lambda: replace(a, b, **k))
        os.fsync = lambda d: self.step("sync", d, lambda: fsync(d))
        os.mkdir = lambda p, *a, **k: self.step("new folder", p, lambda: mkdir(p, *a, **k))
        os.unlink = lambda p, *a, **k: self.step("remove", p, lambda: unlink(p, *a, **k))

        def open_path(path: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            if not set(mode) & set("wax+"):
                return opened(path, mode, *args, **kwargs)
            return _Written(self, path, self.step("open", path, lambda: opened(path, mode, *args, **kwargs)))

        pathlib.Path.open = open_path  # type: ignore[method-assign]
        return self


class _Written:
    """A file whose writes are boundaries, each on disk before the next."""

    def __init__(self, boundaries: Boundaries, path: Path, file: io.IOBase) -> None:
        self._boundaries, self._path, self._file = boundaries, path, file

    def write(self, data: Any) -> int:
        def write() -> int:
            written = self._file.write(data)  # type: ignore[attr-defined]
            self._file.flush()
            return written

        return self._boundaries.step("write", self._path, write)

    def __enter__(self) -> "_Written":
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def _path_of(descriptor: int) -> str:
    return os.path.realpath(f"/proc/self/fd/{descriptor}")


def _kind(path: str) -> str:
    name = os.path.basename(path).split("-")[-1] if "/.tmp-" in path else os.path.basename(path)
    if os.path.isdir(path) and stat.S_ISDIR(os.stat(path).st_mode):
        return "a folder"
    return "an entry" if name.endswith(".safetensors") else name
