"""Requests to stop: the first lets a run finish its step and save, a later one ends it at once."""

import os
import signal
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from cogvideox_factory.errors import FactoryError


class StoppedError(FactoryError):
    """Stopped on request after a good checkpoint was saved (exit code 75: start me again)."""

    exit_code = 75


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
