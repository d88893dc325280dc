"""Every step of writing a file, counted as it happens, and a fault at the k-th of them.

Installed in a forked child only: the calls of this process are wrapped, the product knows nothing of it. A boundary is
an open for writing, a write, a sync of a file or folder, a rename, a removal or a new folder, below one folder.
"""

import builtins
import errno
import io
import os
import pathlib
import re
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
        among: only paths whose name below `folder` this expression finds are counted.
    """

    def __init__(self, folder: Path, at: int | None = None, fault: str = KILL_BEFORE, *, among: str = "") -> None:
        self.seen: list[str] = []
        self._folder, self._at, self._fault = os.path.realpath(folder), at, fault
        self._among = re.compile(among)

    def step(self, name: str, path: Any, operation: Callable[[], Any]) -> Any:
        """Do `operation`, which is boundary `name` of `path`."""
        path = os.path.realpath(os.fsdecode(path)) if not isinstance(path, int) else _path_of(path)
        if not f"{path}/".startswith(f"{self._folder}/") or not self._among.search(path[len(self._folder) :]):
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
        replace, fsync, mkdir, unlink, rmdir = os.replace, os.fsync, os.mkdir, os.unlink, os.rmdir
        opened, plainly_opened = pathlib.Path.open, builtins.open
        os.replace = lambda a, b, **k: self.step("rename", b, lambda: replace(a, b, **k))
        os.fsync = lambda d: self.step("sync", d, lambda: fsync(d))
        os.mkdir = lambda p, *a, **k: self.step("new folder", p, lambda: mkdir(p, *a, **k))
        os.unlink = lambda p, *a, **k: self.step("remove", _below(p, k), lambda: unlink(p, *a, **k))
        os.rmdir = lambda p, *a, **k: self.step("remove folder", _below(p, k), lambda: rmdir(p, *a, **k))

        def opening(function: Callable) -> Callable:
            def open_path(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
                if isinstance(path, int) or not set(mode) & set("wax+"):
                    return function(path, mode, *args, **kwargs)
                return _Written(self, path, self.step("open", path, lambda: function(path, mode, *args, **kwargs)))

            return open_path

        pathlib.Path.open = opening(opened)  # type: ignore[method-assign]
        builtins.open = opening(plainly_opened)
        return self


class _Written:
    """A file whose writes are boundaries, each on disk before the next."""

    def __init__(self, boundaries: Boundaries, path: Any, file: io.IOBase) -> None:
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


def _below(path: Any, options: dict[str, Any]) -> Any:
    """Return the whole path where only a name and an open folder are given."""
    folder = options.get("dir_fd")
    return path if folder is None else os.path.join(_path_of(folder), os.fsdecode(path))


def _path_of(descriptor: int) -> str:
    return os.path.realpath(f"/proc/self/fd/{descriptor}")


def _kind(path: str) -> str:
    name = os.path.basename(path).split("-")[-1] if "/.tmp-" in path else os.path.basename(path)
    if os.path.isdir(path) and stat.S_ISDIR(os.stat(path).st_mode):
        return "a folder"
    return "an entry" if name.endswith(".safetensors") else name
