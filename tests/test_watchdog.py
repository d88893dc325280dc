"""The watchdog ends what makes no step any more, and nothing else. Its clock is made by hand: no test waits."""

import subprocess
import sys
import threading
import time

import pytest

from cogvideox_factory import watchdog as module
from cogvideox_factory.watchdog import Watchdog


class Clock:
    """A clock that moves when it is told to, or when somebody waits by it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


class Waits:
    """Stands for the event the thread waits at: each wait lets time pass, then does the next of `meanwhile`."""

    def __init__(self, clock: Clock, meanwhile: list, *, late: float = 0.0) -> None:
        self.clock, self.meanwhile, self.late = clock, meanwhile, late

    def wait(self, seconds: float) -> bool:
        self.clock.now += seconds + self.late
        if not self.meanwhile:
            return True
        self.meanwhile.pop(0)()
        return False


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(module, "time", made)
    return made


def watched(clock, seconds, meanwhile, *, steps=(), late=0.0) -> list[str]:
    """Return what the watchdog says, with `steps` of so many seconds behind it and `meanwhile` happening."""
    told: list[str] = []
    dog = Watchdog(seconds, end=told.append)
    for step in [0.0, *steps] if steps is not None else ():
        clock.now += step
        dog.beat()
    dog._over = Waits(clock, [lambda do=do: do(dog) for do in meanwhile], late=late)
    dog._watch()
    return told


def nothing(dog) -> None: ...


def test_a_step_that_does_not_come_ends_the_run(clock):
    assert watched(clock, 30, [nothing], steps=[1.0, 2.0, 3.0]) == [
        "no step for 30 s (a step took 2 s until now); stacks of all threads:"
    ]


def test_slow_steps_are_given_ten_times_their_median(clock):
    assert watched(clock, 30, [], steps=[20.0] * 5) == []
    (told,) = watched(clock, 30, [nothing], steps=[20.0] * 5)
    assert "no step for 200 s" in told


def test_a_run_that_makes_steps_is_left_alone(clock):
    assert watched(clock, 30, [lambda dog: dog.beat()] * 50, steps=[1.0]) == []


def test_before_the_first_step_nothing_is_watched(clock):
    assert watched(clock, 30, [nothing] * 5, steps=None) == []


def test_a_pause_may_take_any_time_and_the_step_after_it_its_own(clock):
    def save(dog):
        with dog.pause():
            clock.now += 10_000

    assert watched(clock, 30, [save] * 5, steps=[1.0]) == []
    assert len(watched(clock, 30, [save, nothing], steps=[1.0])) == 1


def test_a_step_that_compiles_may_take_any_time_and_says_nothing_of_the_others(clock):
    def compile_one(dog):
        with dog.pause():
            clock.now += 10_000
        dog.beat(typical=False)

    assert watched(clock, 30, [compile_one] * 5, steps=[1.0]) == []
    (told,) = watched(clock, 30, [compile_one, nothing], steps=[1.0])
    assert "no step for 30 s (a step took 1 s until now)" in told


def test_inside_a_pause_nothing_is_watched(clock):
    dog = Watchdog(30, end=pytest.fail)
    dog.beat()
    with dog.pause():
        dog._over = Waits(clock, [lambda: None] * 20)
        dog._watch()


def test_a_process_that_was_stopped_itself_is_not_taken_to_hang(clock):
    assert watched(clock, 30, [nothing] * 5, steps=[1.0], late=3600.0) == []


def test_it_prints_every_stack_and_ends_in_8():
    code = (
        "import time\nfrom cogvideox_factory.watchdog import Watchdog\n"
        "def stuck():\n    time.sleep(60)\n"
        "with Watchdog(0.1) as dog:\n    dog.beat()\n    stuck()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 8
    assert "error: no step for" in done.stderr
    assert "in stuck" in done.stderr
    assert "in _watch" in done.stderr


def test_zero_watches_nothing_and_the_end_waits_for_nobody():
    before = threading.active_count()
    with Watchdog(0) as dog:
        dog.beat()
        assert threading.active_count() == before
    started = time.monotonic()
    with Watchdog(1e6) as dog:
        dog.beat()
    assert time.monotonic() - started < 60
