"""The decision to leave, with a clock that the test sets."""

import pytest

from cogvideox_factory.time_limit import SLOW_DISK, TimeLimit


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def run_until_the_limit(limit, clock, *, step_seconds, save_seconds, save_every=10, log_every=1, most=1000):
    """Step, log, save as the loop does; return (last step, seconds when its save has ended)."""
    start, step = clock.now, 0
    limit.go_on(0)
    while step < most:
        step += 1
        clock.now += step_seconds
        is_up = limit.is_up(step, saves=1 + (step % save_every == 0))
        if step % log_every == 0:
            limit.reached(step)
        if is_up or step % save_every == 0:
            clock.now += save_seconds
            limit.spent("save", save_seconds)
            limit.go_on(step)
        if is_up:
            break
    return step, clock.now - start


@pytest.mark.parametrize("save_seconds", [1.0, 30.0])
@pytest.mark.parametrize("step_seconds", [0.7, 20.0])
@pytest.mark.parametrize("log_every", [1, 5])
def test_it_leaves_before_the_limit_and_not_a_step_too_early(step_seconds, save_seconds, log_every):
    clock = Clock()
    limit = TimeLimit(10, save_bytes=0, clock=clock)
    times = {"step_seconds": step_seconds, "save_seconds": save_seconds, "log_every": log_every}
    step, seconds = run_until_the_limit(limit, clock, **times)
    assert step > 10
    assert seconds <= 600
    assert seconds + step_seconds + 2 * save_seconds > 600, "another step may have brought two saves"


def test_without_a_limit_it_is_never_up():
    clock = Clock()
    limit = TimeLimit(None, save_bytes=1e15, clock=clock)
    assert run_until_the_limit(limit, clock, step_seconds=1e6, save_seconds=1e6, most=20)[0] == 20


def test_a_save_that_was_never_measured_is_taken_to_be_slow():
    clock = Clock()
    limit = TimeLimit(10, save_bytes=300 * SLOW_DISK, clock=clock)
    clock.now += 1
    assert not limit.is_up(1)
    clock.now += 299
    limit.reached(299)
    assert limit.is_up(299), "300 s of saving do not fit into what is left"
    limit.spent("save", 2.0)
    assert not limit.is_up(299), "now it is known to be fast"


def test_the_start_counts_and_looks_and_a_save_in_hand_do_too():
    clock = Clock()
    limit = TimeLimit(1, save_bytes=0, started=clock.now - 30, clock=clock)
    limit.go_on(0)
    limit.spent("save", 8.0)
    limit.spent("look", 10.0)
    clock.now += 3
    assert not limit.is_up(1)
    assert not limit.is_up(1, looks=1)
    assert not limit.is_up(1, saves=2)
    assert limit.is_up(1, looks=1, saves=2)


def test_work_that_the_device_has_yet_to_do_counts():
    """The host queues 9 steps in no time; the device is 5 s behind for each."""
    clock = Clock()
    limit = TimeLimit(1, save_bytes=0, clock=clock)
    limit.go_on(0)
    clock.now += 5
    limit.reached(1)
    assert not limit.is_up(10), "ten steps of 5 s end at 50 s, another at 55 s"
    assert limit.is_up(12), "twelve at 60 s, another at 65 s"
