"""A run folder: one process at a time writes it, and a run goes on only with the settings it was started with."""

import fcntl
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError


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
def stop_requests() -> Iterator["StopRequest"]:
    """Catch SIGTERM, SIGINT and SIGUSR1 so that the step in hand can be finished and saved."""
    request = StopRequest()
    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    try:
        before = {number: signal.signal(number, request.handle) for number in signals}
    except ValueError:  # not in the main thread: whoever runs us there handles signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class StopRequest:
    """Whether someone asked the run to stop; a second request stops it at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        if self.name is not None:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


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
