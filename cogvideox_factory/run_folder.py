"""A run folder: one process at a time writes it, and a run goes on only with the settings it was started with."""

import fcntl
import os
import shutil
import signal
import stat
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError, nearest


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


class LeftAtOnceError(KeyboardInterrupt):
    """A second signal: leave without saving (exit code 128 + signal: 130 for Ctrl-C, 143 for SIGTERM)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


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
def stop_requests(clock: Callable[[], float] = time.monotonic) -> Iterator["StopRequest"]:
    """Catch the signals that ask a run to stop, so that the step in hand can be finished and saved."""
    request = StopRequest(clock)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    with stop_handler(request.handle):
        yield request


class StopRequest:
    """Whether someone asked the run to stop; asked again, it stops at once.

    A signal within a second of the first is the same request: a terminal or a scheduler sends it to every process, and
    the launcher passes it on to each of them once more.
    """

    SAME_SECONDS = 1.0

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.name: str | None = None
        """Of the signal, or of what else asks."""
        self._clock = clock
        self._first: float | None = None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Note the signal."""
        if number == signal.SIGHUP:
            _forget_lost_terminals()
        now = self._clock()
        if self._first is not None and now - self._first > self.SAME_SECONDS:
            raise LeftAtOnceError(number)
        if self._first is None:
            self._first = now
        self.name = self.name or signal.Signals(number).name


def _forget_lost_terminals() -> None:
    """Send what would be printed on a terminal that is gone nowhere: printing there fails, and saving must not."""
    for descriptor in (1, 2):
        with suppress(OSError):  # closed: nothing is printed there
            if stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor):
                lead_nowhere(descriptor)


def lead_nowhere(descriptor: int) -> None:
    """Let an open file take what is written to it and keep nothing."""
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), descriptor)


_LATER = {"weights"}
"""What the first checkpoints did not record, so nothing is held against them."""
_FATAL = {"task", "model", "weights", "train.method", "train.master_weights", "train.optimizer", "run.dtype"}
"""Settings that decide what the state of a run is; so does every setting of `lora`."""


def differences(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (recorded, wanted)} of those that differ."""
    return {
        key: (recorded.get(key), wanted.get(key))
        for key in dict.fromkeys([*recorded, *wanted])
        if recorded.get(key) != wanted.get(key) and (key in recorded or key not in _LATER)
    }


def require_same(
    recorded: dict[str, Any], wanted: dict[str, Any], *, source: Path, allow: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Refuse to go on with settings that would change the numbers, but for those of `allow`; return what these change.

    Raises:
        UnfitError: one line a setting that differs.
    """
    changed = differences(recorded, wanted)
    refused = {key: values for key, values in changed.items() if key not in allow or _is_fatal(key)}
    if not refused:
        return changed
    lines = [f"  {key}: the run has {before!r}, you ask for {now!r}" for key, (before, now) in refused.items()]
    choices = [key for key in refused if not _is_fatal(key)]
    way = "Set them back, or start a new run in another --train.dir."
    if len(choices) == len(refused):
        way = f"Set them back; or change them knowingly: --train.allow-change {' '.join([*allow, *choices])}"
    raise UnfitError(
        "\n".join([f"{source} was made with other settings, so going on would not be the same run:", *lines, way])
    )


def check_allowed(allow: Collection[str], wanted: Collection[str]) -> None:
    """Refuse names in `train.allow_change` that no resume could change.

    Raises:
        FactoryError: an unknown name, or one that decides what the state of a run is.
    """
    for name in allow:
        if name not in wanted:
            raise FactoryError(
                f"train.allow_change={name}: no number of this run depends on such a setting"
                f"{nearest(name, list(wanted))}. Name one of {', '.join(k for k in wanted if not _is_fatal(k))}."
            )
        if _is_fatal(name):
            raise FactoryError(
                f"train.allow_change={name}: another {name} is another model or another state, and no checkpoint fits "
                "it. Start a new run in another --train.dir."
            )


def _is_fatal(key: str) -> bool:
    return key in _FATAL or key.startswith("lora.")
