"""A run folder: one process at a time writes it, and a run goes on only with the settings it was started with."""

import fcntl
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError

_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})")


class StoppedError(FactoryError):
    """Stopped on request after a good checkpoint was saved (exit code 75: start me again)."""

    exit_code = 75


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the system drops the lock of one that dies.

    Raises:
        FactoryError: another process is training there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise StorageError(f"{run} cannot be written: {error.strerror}. Choose another --train.dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FactoryError(f"{run}: another process is training there; choose another --train.dir") from error
        try:
            yield
        finally:
            if [path.name for path in run.iterdir()] == [".lock"]:  # refused before anything was made
                shutil.rmtree(run)


@contextmanager
def stop_handler(handler: Callable[[int, FrameType | None], object]) -> Iterator[None]:
    """Let `handler` take SIGTERM, SIGINT, SIGUSR1 and SIGHUP (the last not under nohup, which ignores it).

    Raises:
        ValueError: outside the main thread, where signals belong to whoever runs it.
    """
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        signals.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def stop_requests() -> Iterator["StopRequest"]:
    """Catch the signals that ask a run to stop, so that the step in hand can be finished and saved."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with stop_handler(request.handle):
        yield request


class StopRequest:
    """Whether someone asked the run to stop; a second request stops it at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


def list_checkpoints(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run folder, oldest first."""
    if not Path(run).is_dir():
        return []
    matches = ((_CHECKPOINT.fullmatch(path.name), path) for path in Path(run).iterdir())
    return sorted(int(match[1]) for match, path in matches if match and (path / "MANIFEST.json").is_file())


def require_same(recorded: dict[str, Any], wanted: dict[str, Any], *, source: Path) -> None:
    """Refuse to go on with settings that would change the numbers.

    Raises:
        UnfitError: one line a setting that differs.
    """
    lines = [
        f"  {key}: the run has {recorded.get(key)!r}, you ask for {wanted.get(key)!r}"
        for key in dict.fromkeys([*recorded, *wanted])
        if recorded.get(key) != wanted.get(key)
    ]
    if lines:
        raise UnfitError(
            "\n".join([
                f"{source} was made with other settings, so going on would not be the same run:", *lines,
                "Set them back, or start a new run in another --train.dir.",
            ])
        )  # fmt: skip
