"""Proof that nothing outside is opened: an audit hook, a watch on the files outside, a listener that must stay silent.

Python's own opens pass the audit hook. What FFmpeg opens does not, so the folder outside is watched by the kernel
(inotify, where there is one), and the network by a loopback listener that nobody may reach.
"""

import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_IN_OPEN = 0x20
_watching: list["Watch"] = []


class Watch:
    """What was opened and reached while it watched."""

    def __init__(self, root: Path, outside: Path) -> None:
        package = Path(__file__).parents[2]
        allowed = [root, package, Path(sys.prefix), Path(sys.base_prefix), Path(os.__file__).parent, Path("/proc")]
        self._allowed = tuple(os.path.realpath(path) for path in allowed)
        self._allowed_files = ("/dev/null", "/dev/urandom")
        self.port = 0
        """A loopback port that nobody may reach."""
        self.opened: list[str] = []
        """Files outside that were opened."""
        self.connected: list[str] = []
        """Addresses that somebody tried to reach."""

    def note(self, event: str, args: tuple) -> None:
        if event == "socket.connect":
            self.connected.append(str(args[1]))
        elif event == "open" and isinstance(args[0], str | bytes | os.PathLike):
            path = os.path.realpath(os.fsdecode(args[0]))
            if path not in self._allowed_files and not path.startswith(tuple(f"{a}/" for a in self._allowed)):
                self.opened.append(path)


def _hook(event: str, args: tuple) -> None:
    if _watching and event in ("open", "socket.connect"):
        for watch in tuple(_watching):
            watch.note(event, args)


sys.addaudithook(_hook)


@contextmanager
def watched(root: Path, outside: Path) -> Iterator[Watch]:
    """Watch what the block opens; `outside` is a folder of files that must not be."""
    watch = Watch(root, outside)
    inotify = _inotify(outside)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.setblocking(False)
        watch.port = listener.getsockname()[1]
        _watching.append(watch)
        try:
            yield watch
        finally:
            _watching.remove(watch)
            if inotify is not None:
                with suppress(BlockingIOError):
                    if os.read(inotify, 65536):
                        watch.opened.append(f"{outside} (by the kernel's word)")
                os.close(inotify)
            with suppress(BlockingIOError):
                listener.accept()[0].close()
                watch.connected.append(f"127.0.0.1:{watch.port}")


def _inotify(folder: Path) -> int | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor < 0 or libc.inotify_add_watch(descriptor, os.fsencode(folder), _IN_OPEN) < 0:
        return None
    return descriptor
