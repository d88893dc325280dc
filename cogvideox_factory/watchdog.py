"""A run that makes no step any more ends, with the stacks of its threads, instead of holding its cards for nothing.

A process that waits for another which never comes, a disk that does not answer, a deadlock: none of them raises. A
restart goes on from the newest checkpoint.
"""

import faulthandler
import os
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from cogvideox_factory.errors import PeerError

_TIMES_MEDIAN = 10
_REMEMBERED = 100
_LATE_SECONDS = 5.0


def end_process(told: str) -> None:
    """Print `told` and the stacks of all threads, and end this process (exit code 8)."""
    print(f"error: {told}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    os._exit(PeerError.exit_code)


class Watchdog:
    """Watches, once the first step is done, that others follow.

    Args:
        seconds: without a step that are too many, unless ten times the median step is more; 0 watches nothing.
        end: what is called then, with the reason.
    """

    def __init__(self, seconds: float, *, end: Callable[[str], None] = end_process) -> None:
        self._seconds, self._end = seconds, end
        self._steps: deque[float] = deque(maxlen=_REMEMBERED)
        self._last: float | None = None
        self._paused = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        if self._seconds:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        if self._seconds:
            self._thread.join()

    def beat(self, *, typical: bool = True) -> None:
        """Note that a step is done; how long one took that is not `typical` says nothing of the others."""
        now = time.monotonic()
        if self._last is not None and typical:
            self._steps.append(now - self._last)
        self._last = now

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Allow what is no step (a checkpoint, sample videos, compiling) the time it takes."""
        self._paused += 1
        try:
            yield
        finally:
            self._paused -= 1
            if self._last is not None:
                self._last = time.monotonic()

    @property
    def limit(self) -> float:
        """Seconds after which a step is taken to hang."""
        median = statistics.median(list(self._steps)) if self._steps else 0.0
        return max(_TIMES_MEDIAN * median, self._seconds)

    def _watch(self) -> None:
        while True:
            limit = self.limit
            spent = time.monotonic() - self._last if self._last is not None and not self._paused else 0.0
            if spent >= limit:
                self._end(f"no step for {spent:.0f} s (a step took {self._typical} until now); stacks of all threads:")
                return
            asked = time.monotonic()
            if self._over.wait(limit - spent):
                return
            if time.monotonic() - asked > limit - spent + _LATE_SECONDS and self._last is not None:
                self._last = time.monotonic()  # this process itself was stopped for a while, and goes on

    @property
    def _typical(self) -> str:
        return f"{statistics.median(list(self._steps)):.3g} s" if self._steps else "unknown time"
