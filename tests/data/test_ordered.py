import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.ordered import ordered_map


@given(st.lists(st.integers(0, 3), max_size=20), st.integers(0, 4), st.integers(1, 5))
@settings(max_examples=30, deadline=None)
def test_results_keep_their_order(delays, num_workers, ahead):
    def slow(item):
        time.sleep(item[1] / 2000)
        return item[0]

    results = list(ordered_map(slow, enumerate(delays), num_workers=num_workers, ahead=ahead))
    assert results == list(range(len(delays)))


def test_no_more_than_asked_are_in_flight_and_threads_end():
    taken = []

    def items():
        for i in range(1000):
            taken.append(i)
            yield i

    stream = ordered_map(lambda i: i, items(), num_workers=2, ahead=3)
    assert [next(stream) for _ in range(4)] == [0, 1, 2, 3]
    assert len(taken) <= 7
    stream.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("data")]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_errors_come_at_their_turn_unchanged(num_workers):
    def fail(item):
        if item == 3:
            raise KeyError("three")
        return item

    stream = ordered_map(fail, range(10), num_workers=num_workers)
    assert [next(stream) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="three"):
        next(stream)
