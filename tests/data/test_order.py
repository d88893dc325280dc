"""The order of a run: the same clips in the same steps for any number of ranks and reading threads."""

import time
from collections import Counter
from itertools import product

import numpy as np
import pytest

from cogvideox_factory.data.loader import Draws, Loader
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.errors import FactoryError

SIZES = {"9x32x48": 24, "9x48x32": 48, "17x32x32": 24}
SHAPES = {f"clip{i:03}": list(SIZES)[i % 7 % 3] for i in range(205)}
STEPS = 40


class Unhurried:
    """A source whose samples are ready at different times, so that threads overtake one another."""

    def sample(self, pick, draws):
        rng = draws.generator("delay", pick)
        time.sleep(float(rng.random()) * 3e-4)
        return {"number": np.float32(rng.random())}

    def name(self, clip_id):
        return clip_id


def make_sampler(**more):
    return Sampler(SHAPES, **{"batch_size": SIZES, "seed": 11, "buckets": SHAPES} | more)


def read(num_ranks, num_workers, *, num_micros=1, start=0):
    """Return what each step holds, ranks put together again: ids and the numbers drawn for them."""
    streams = [
        Loader(
            Unhurried(), make_sampler(), Draws(seed=3), rank=rank, num_ranks=num_ranks, num_micros=num_micros,
            num_workers=num_workers,
        ).batches(start, STEPS)
        for rank in range(num_ranks)
    ]  # fmt: skip
    steps = []
    for _ in range(start, STEPS):
        parts = [next(stream) for _ in range(num_micros) for stream in streams]
        ids = [clip_id for part in parts for clip_id in part["clip_ids"]]
        steps.append((ids, np.concatenate([part["number"] for part in parts]).tolist()))
    assert all(next(stream, None) is None for stream in streams)
    return steps


@pytest.fixture(scope="module")
def alone():
    """One rank that reads when asked."""
    return read(1, 0)


@pytest.mark.parametrize(("num_ranks", "num_workers"), list(product((1, 2, 3, 8), (0, 1, 4))))
def test_ranks_and_workers_leave_the_order_alone(alone, num_ranks, num_workers):
    assert read(num_ranks, num_workers) == alone
    sampler = make_sampler()
    assert [ids for ids, _ in alone] == [[pick.clip_id for pick in sampler.batch(step)] for step in range(STEPS)]


def test_accumulation_and_another_number_of_ranks_after_a_restart_do_too(alone):
    assert read(2, 4, num_micros=3) == alone
    assert read(8, 1, start=17) == alone[17:]


def test_ranks_never_share_a_clip_within_a_step():
    sampler = make_sampler()
    for step in range(STEPS):
        shares = [{*sampler.share(step, rank=rank, num_ranks=8)} for rank in range(8)]
        assert sum(map(len, shares)) == len(set.union(*shares)) == len(sampler.batch(step))


def test_every_epoch_has_every_clip_exactly_once_and_what_waits_is_counted():
    sampler = make_sampler()
    assert all(count >= SIZES[key] for key, count in sampler.counts.items())  # so what waits leaves in the next epoch
    seen = Counter(pick for step in range(sampler.steps_before(9)) for pick in sampler.batch(step))
    assert set(seen.values()) == {1}
    for epoch in range(8):
        assert {pick.clip_id for pick in seen if pick.epoch == epoch} == set(SHAPES)
    for epoch in range(9):
        left = sum(len(sampler.batch(step)) for step in range(sampler.steps_before(epoch)))
        assert left + sum(sampler.waiting(epoch).values()) == epoch * len(SHAPES)
        assert all(count < SIZES[key] for key, count in sampler.waiting(epoch).items())


def test_a_batch_that_ranks_cannot_share_is_refused_before_the_first_step():
    with pytest.raises(FactoryError, match=r"batch of 24 of 17x32x32 does not divide over 5 ranks .* of 20 or 25"):
        Loader(Unhurried(), make_sampler(), Draws(seed=3), num_ranks=5)
