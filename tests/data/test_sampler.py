from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.errors import DataError, FactoryError


def ids(count):
    return [f"clip{i}" for i in range(count)]


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_every_epoch_has_every_clip_once(count, batch_size, seed):
    sampler = Sampler(ids(count), batch_size=batch_size, seed=seed)
    epochs = 3
    steps = -(-epochs * count // batch_size)
    stream = [pick for step in range(steps) for pick in sampler.batch(step)][: epochs * count]
    assert all(len(sampler.batch(step)) == batch_size for step in range(3))
    for epoch in range(epochs):
        seen = stream[epoch * count : (epoch + 1) * count]
        assert {pick.epoch for pick in seen} == {epoch}
        assert sorted(pick.clip_id for pick in seen) == sorted(ids(count))
    assert len(set(stream)) == len(stream)


@given(st.integers(1, 20), st.sampled_from([(1, 1), (2, 1), (3, 2), (8, 1), (2, 4)]), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_ranks_and_accumulation_share_one_global_order(count, parts, size):
    num_ranks, num_micros = parts
    sampler = Sampler(ids(count), batch_size=num_ranks * num_micros * size, seed=1)
    for step in (0, 7):
        shares = [
            pick
            for micro in range(num_micros)
            for rank in range(num_ranks)
            for pick in sampler.share(step, rank=rank, num_ranks=num_ranks, micro=micro, num_micros=num_micros)
        ]
        assert shares == sampler.batch(step)


def test_the_order_depends_on_the_set_and_the_seed_only():
    one, other = (Sampler(names, batch_size=4, seed=3) for names in (ids(10), ids(10)[::-1]))
    jumped = Sampler(ids(10), batch_size=4, seed=3)
    assert jumped.batch(50) == one.batch(50) == other.batch(50)
    assert [one.batch(step) for step in range(9)] == [other.batch(step) for step in range(9)]
    assert Sampler(ids(10), batch_size=4, seed=4).batch(0) != one.batch(0)
    assert one.order(0) != one.order(1)
    assert one.epochs(5) == 2.0


def test_shuffles_are_fair():
    first = Counter(Sampler(ids(4), batch_size=1, seed=0).order(epoch)[0] for epoch in range(400))
    assert min(first.values()) > 60


def test_uneven_batches_are_refused():
    sampler = Sampler(ids(10), batch_size=8, seed=0)
    with pytest.raises(FactoryError, match=r"batch of 8 does not divide over 3 ranks x 1 .* Use a batch of 6 or 9"):
        sampler.share(0, num_ranks=3)
    with pytest.raises(FactoryError, match="Use a batch of 16"):
        sampler.share(0, num_ranks=16)


def test_what_cannot_be_sampled():
    with pytest.raises(DataError, match="no clip"):
        Sampler([], batch_size=1, seed=0)
    with pytest.raises(FactoryError, match="batch_size=0"):
        Sampler(ids(2), batch_size=0, seed=0)


SHAPES = ("9x32x48", "9x48x32", "17x32x32")


@st.composite
def bucketed(draw):
    shapes = draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=40))
    sizes = {key: draw(st.integers(1, 9)) for key in SHAPES}
    return (
        Sampler(
            ids(len(shapes)),
            batch_size=sizes,
            seed=draw(st.integers(0, 9)),
            buckets=dict(zip(ids(len(shapes)), shapes)),
        ),
        dict(zip(ids(len(shapes)), shapes)),
        sizes,
    )


def walk(sampler, shapes, sizes, epochs):
    """Lines of clips, one a shape, as the module's words have it."""
    lines = {key: [] for key in sizes}
    for epoch in range(epochs):
        for clip_id in sampler.order(epoch):
            line = lines[shapes[clip_id]]
            line.append((clip_id, epoch))
            if len(line) == sizes[shapes[clip_id]]:
                yield list(line)
                line.clear()


@given(bucketed())
@settings(max_examples=150, deadline=None)
def test_buckets_leave_as_a_walk_along_the_stream_says(made):
    sampler, shapes, sizes = made
    expected = list(walk(sampler, shapes, sizes, epochs=5))
    found = [[tuple(pick) for pick in sampler.batch(step)] for step in range(len(expected))]
    assert found == expected
    assert sampler.steps_before(5) == len(expected)
    for step, batch in enumerate(expected):
        assert {shapes[clip_id] for clip_id, _ in batch} == {sampler.bucket(step)}
        assert sampler.epochs(step) == pytest.approx(sum(map(len, expected[:step])) / len(shapes))


@given(bucketed())
@settings(max_examples=60, deadline=None)
def test_with_buckets_too_no_clip_is_left_out_or_seen_twice(made):
    sampler, shapes, sizes = made
    steps = sampler.steps_before(40)
    seen = Counter(pick for step in range(steps) for pick in sampler.batch(step))
    assert set(seen.values()) <= {1}
    waiting = 40 * len(shapes) - len(seen)
    assert waiting == sum(40 * list(shapes.values()).count(key) % size for key, size in sizes.items())
    assert waiting == sum(sampler.waiting(40).values())


def test_jumping_to_a_step_finds_the_same_batch():
    shapes = dict(zip(ids(30), [SHAPES[i % 3] for i in range(30)]))
    one, other = (Sampler(ids(30), batch_size=dict(zip(SHAPES, (4, 7, 2))), seed=2, buckets=shapes) for _ in range(2))
    straight = [one.batch(step) for step in range(400)]
    assert [other.batch(step) for step in (399, 7, 250, 0)] == [straight[step] for step in (399, 7, 250, 0)]


def test_every_shape_must_divide_over_the_ranks():
    shapes = {"clip0": SHAPES[0], "clip1": SHAPES[1]}
    sampler = Sampler(ids(2), batch_size={SHAPES[0]: 4, SHAPES[1]: 6}, seed=0, buckets=shapes)
    sampler.share(0, num_ranks=2)
    with pytest.raises(FactoryError, match=r"batch of 6 of 9x48x32 does not divide over 4 ranks"):
        sampler.share(0, num_ranks=4)


@given(st.integers(2, 40), st.integers(0, 39))
@settings(max_examples=40, deadline=None)
def test_held_out_clips_are_not_trained_on(count, held):
    if held >= count:
        with pytest.raises(DataError, match="leave none"):
            hold_out(ids(count), held)
        return
    train, out = hold_out(ids(count), held)
    assert len(out) == held
    assert sorted(train + out) == sorted(ids(count))
    again, _ = hold_out([*ids(count), "new"], held)
    assert len(set(again) - {*train, "new"}) <= 1
