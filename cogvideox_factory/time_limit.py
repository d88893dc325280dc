"""Leaving in time: whether another step, and the save after it, still end before a limit."""

import time
from collections import deque
from collections.abc import Callable

SLOW_DISK = 200e6
"""Bytes a second that a save is taken to write until one has been measured."""
_KEPT = 20


class TimeLimit:
    """Measures what steps, saves and looks take, by a clock that nobody sets back.

    A device may lag behind its host, so a step counts as done only where the host has waited for it (`reached`); what
    was queued since then is taken to take as long as the steps before.

    Args:
        minutes: from `started` on; None: there is no limit.
        save_bytes: of a checkpoint.
        started: by `clock`; now, if it is None.
        clock: seconds.
    """

    def __init__(
        self, minutes: float | None, *, save_bytes: float, started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._clock = clock
        self._end = None if minutes is None else (clock() if started is None else started) + 60 * minutes
        self._longest = {"save": save_bytes / SLOW_DISK, "look": 0.0}
        self._measured: set[str] = set()
        self._steps: deque[float] = deque(maxlen=_KEPT)
        self._step, self._at = 0, clock()

    def go_on(self, step: int) -> None:
        """Begin to measure after `step`: what was since the last time is no step's."""
        self._step, self._at = step, self._clock()

    def reached(self, step: int) -> None:
        """Note that `step` is done, on the device too."""
        now = self._clock()
        if step > self._step:
            self._steps.append((now - self._at) / (step - self._step))
        self._step, self._at = step, now

    def spent(self, what: str, seconds: float) -> None:
        """Note how long a "save" or "look" took; the longest counts."""
        self._longest[what] = max(self._longest[what], seconds) if what in self._measured else seconds
        self._measured.add(what)

    def is_up(self, step: int, *, saves: int = 1, looks: int = 0) -> bool:
        """Whether the step after `step`, with so many saves and looks, would end behind the limit."""
        if self._end is None:
            return False
        now, behind = self._clock(), step - self._step
        seconds = max(self._steps) if self._steps else (now - self._at) / max(behind, 1)
        done = max(now, self._at + behind * seconds)
        return done + seconds + saves * self._longest["save"] + looks * self._longest["look"] > self._end
