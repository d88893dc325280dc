import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.learning_rate import SCHEDULES, learning_rate


def rates(schedule: str, num_steps: int = 100, warmup_steps: int = 10, **rest) -> list[float]:
    return [
        learning_rate(s, peak=2.0, schedule=schedule, num_steps=num_steps, warmup_steps=warmup_steps, **rest)
        for s in range(1, num_steps + 1)
    ]


@given(st.sampled_from(SCHEDULES), st.integers(1, 50), st.integers(0, 20), st.integers(1, 4), st.floats(0.3, 3.0))
def test_stays_between_zero_and_peak_and_reaches_peak(schedule, extra, warmup, cycles, power):
    values = rates(schedule, warmup + extra, warmup, num_cycles=cycles, power=power)
    assert all(0 <= v <= 2.0 for v in values)
    assert max(values) == pytest.approx(2.0)
    assert values[0] > 0, "no step is wasted at rate 0"


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_peak(schedule):
    assert rates(schedule)[:10] == pytest.approx([0.2 * n for n in range(1, 11)])


def test_falling_schedules():
    assert rates("linear")[55] == pytest.approx(2.0 * (1 - 45 / 90))
    assert rates("cosine")[55] == pytest.approx(1 + math.cos(math.pi / 2))
    assert rates("polynomial", power=2.0)[55] == pytest.approx(2.0 * 0.25)
    assert rates("polynomial", power=1.0) == pytest.approx(rates("linear"))
    assert rates("constant")[10:] == [2.0] * 90


def test_restarts_return_to_peak():
    values = rates("cosine_with_restarts", num_steps=100, warmup_steps=0, num_cycles=4)
    assert [values[i] for i in (0, 25, 50, 75)] == pytest.approx([2.0] * 4)
    assert values[24] < 0.02
    assert rates("cosine_with_restarts", num_cycles=1) == pytest.approx(rates("cosine"))
