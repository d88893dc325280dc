"""Buckets made from the clips: what `auto` promises, against an independent choice, and what steps cost."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.auto_buckets import AutoBuckets, auto_buckets, balanced_batches, step_cost
from cogvideox_factory.data.buckets import Bucket, Source
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.sampler import Sampler

NATIVE = Bucket(81, 768, 1360)
SOURCES = st.lists(
    st.builds(Source, st.integers(1, 300), st.integers(32, 2200), st.integers(32, 2200)), min_size=1, max_size=60
)


@given(SOURCES, st.integers(1, 8))
@settings(max_examples=150, deadline=None)
def test_auto_finds_a_place_for_every_clip_that_is_long_enough(sources, max_buckets):
    buckets = auto_buckets(sources, native=NATIVE, max_buckets=max_buckets)
    for source in sources:
        if source.num_frames != 1 and source.num_frames < 17:
            continue
        bucket = buckets.choose("x", source)
        assert bucket in buckets.all
        assert bucket.num_frames <= source.num_frames
        assert bucket.num_frames <= NATIVE.num_frames
        assert bucket.num_frames % 8 == 1
        assert bucket.height * bucket.width <= source.height * source.width / 0.8 + 1
        assert bucket.height * bucket.width <= 1.15 * NATIVE.height * NATIVE.width
        assert bucket.height % 16 == bucket.width % 16 == 0


def test_clips_of_almost_one_size_do_not_crowd_one_another_out():
    sources = [Source(1, 152, 265), Source(1, 216, 233)]
    buckets = auto_buckets(sources, native=NATIVE, max_buckets=1)
    assert all(buckets.choose("x", source) in buckets.all for source in sources)


def test_auto_keeps_few_shapes_and_the_common_ones():
    common = [Source(100, 1080, 1920)] * 50 + [Source(60, 1920, 1080)] * 30
    rare = [Source(100, 1000 + 16 * i, 1900) for i in range(12)]
    buckets = auto_buckets(common + rare, native=NATIVE, max_buckets=3)
    assert len(buckets.all) == 3
    assert Bucket(81, 768, 1360) in buckets.all
    assert Bucket(57, 1360, 768) in buckets.all
    assert auto_buckets(reversed(common + rare), native=NATIVE, max_buckets=3) == buckets


def test_auto_tells_clips_too_short_for_anything():
    buckets = auto_buckets([Source(5, 480, 720)], native=NATIVE, max_buckets=4)
    assert buckets == AutoBuckets(buckets=(), rule=buckets.rule)
    with pytest.raises(ClipError, match="fit none of 0 buckets"):
        buckets.choose("x", Source(5, 480, 720))


def test_steps_cost_about_the_same_whatever_their_shape():
    """24 d^2 S + 4 S^2 d, with batches filled up, by multiples of the native one, to what the native shape costs."""
    width, native = 1920, 17_776
    tokens = {Bucket(9, 480, 16 * i): 300 * i + 226 for i in range(10, 59)}
    costs = {bucket: step_cost(count, width=width) for bucket, count in tokens.items()}
    assert costs[Bucket(9, 480, 160)] == 24 * width**2 * 3226 + 4 * 3226**2 * width
    budget = 8 * step_cost(native, width=width)
    sizes = balanced_batches(costs, batch_size=8, native_cost=step_cost(native, width=width))
    for bucket, size in sizes.items():
        assert size == 8 * math.floor(budget / (8 * costs[bucket]))
        assert budget - 8 * costs[bucket] < size * costs[bucket] <= budget


def realistic_sources(count, seed=0):
    """Clips as data sets have them: a few camera formats and phone formats, cut by hand, some odd ones."""
    draw = np.random.default_rng(seed)
    formats = [(1080, 1920), (720, 1280), (1920, 1080), (1280, 720), (480, 640), (1080, 1080), (480, 854), (256, 256)]
    sources = []
    for _ in range(count):
        height, width = formats[draw.integers(len(formats))] if draw.random() < 0.9 else 16 * draw.integers(8, 140, 2)
        sources.append(Source(int(draw.integers(1, 300)), int(height), int(width)))
    return sources


def chosen(buckets, source):
    """Longest first, then the least lost in proportions and size: the rule as the docstring of `choose` has it."""
    best = None
    for bucket in buckets.all:
        if bucket.height * bucket.width * 4 > source.height * source.width * 5:
            continue
        if source.num_frames < bucket.num_frames or (source.num_frames == 1) != (bucket.num_frames == 1):
            continue
        shape = abs(math.log(bucket.height * source.width / (bucket.width * source.height)))
        size = abs(math.log(bucket.height * bucket.width / (source.height * source.width)))
        rank = (-bucket.num_frames, round(shape + size / 2, 9))
        best = min(best, (rank, bucket)) if best else (rank, bucket)
    return best and best[1]


def test_ten_thousand_clips_go_to_the_longest_and_nearest_bucket():
    sources = realistic_sources(10_000)
    buckets = auto_buckets(sources, native=NATIVE, max_buckets=8)
    taken = Counter()
    for source in sources:
        if (expected := chosen(buckets, source)) is None:
            assert 1 < source.num_frames < 17, source
            with pytest.raises(ClipError, match=r"bucket\.none"):
                buckets.choose("x", source)
        else:
            assert buckets.choose("x", source) == expected, source
            taken[expected] += 1
    assert set(taken) == set(buckets.all)  # no bucket is kept for nobody


def plain_table(sources, native, max_buckets):
    """The table as the docstring of `auto_buckets` has it, from the clips each time and without shortcuts."""
    lengths = sorted({max(9, int(native.num_frames * part) // 8 * 8 + 1) for part in (0.25, 0.5, 0.75)})
    lengths = [n for n in lengths if n < native.num_frames] + [native.num_frames]

    def fits(bucket, source):
        enough = source.num_frames == 1 if bucket.num_frames == 1 else source.num_frames >= bucket.num_frames
        return enough and 5 * source.height * source.width >= 4 * bucket.height * bucket.width

    def wish(source):
        frames = [1] if source.num_frames == 1 else [n for n in lengths if n <= source.num_frames]
        if not frames:
            return None
        ratio = min(max(source.height / source.width, 0.38), 1 / 0.38)  # the narrowest of the shapes of a bucket file
        area = min(source.height * source.width, native.height * native.width)
        sides = math.sqrt(area * ratio), math.sqrt(area / ratio)
        for rounding in (round, math.floor):  # to the nearest, or where that is too much, below
            bucket = Bucket(frames[-1], *(max(16, 16 * rounding(side / 16)) for side in sides))
            if fits(bucket, source):
                return bucket
        return None

    def apart(one, other):
        shape = abs(math.log(one.height / one.width) - math.log(other.height / other.width))
        size = abs(math.log(one.height * one.width) - math.log(other.height * other.width))
        return shape + 0.5 * size + abs(math.log(one.num_frames / other.num_frames))

    groups = {}
    for source in sources:
        if bucket := wish(source):
            groups.setdefault(bucket, []).append(source)
    while len(groups) > max_buckets:
        for rare in sorted(groups, key=lambda bucket: (len(groups[bucket]), bucket)):
            hosts = [b for b in groups if b != rare and all(fits(b, source) for source in groups[rare])]
            if hosts:
                host = min(hosts, key=lambda bucket: (apart(bucket, rare), bucket))
                groups[host] += groups.pop(rare)
                break
        else:
            break
    return tuple(sorted(groups))


@given(SOURCES, st.integers(1, 8), st.sampled_from([NATIVE, Bucket(49, 480, 720), Bucket(9, 64, 64)]))
@settings(max_examples=200, deadline=None)
def test_the_table_is_the_one_made_by_hand(sources, max_buckets, native):
    assert auto_buckets(sources, native=native, max_buckets=max_buckets).all == plain_table(
        sources, native, max_buckets
    )


def tokens_of(bucket):
    return ((bucket.num_frames - 1) // 4 + 1) * (bucket.height // 16) * (bucket.width // 16) + 226


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_ranks_do_the_same_work_in_every_step(num_ranks):
    """The measured imbalance over an epoch of 10,000 clips: none, because a step has one shape and equal shares."""
    sources = realistic_sources(10_000)
    buckets = auto_buckets(sources, native=NATIVE, max_buckets=8)
    usable = {f"{i:05}": s for i, s in enumerate(sources) if chosen(buckets, s)}
    shapes = {name: buckets.choose(name, source) for name, source in usable.items()}
    costs = {bucket: step_cost(tokens_of(bucket), width=1920) for bucket in buckets.all}
    assert (
        costs[buckets.all[-1]] == 24 * 1920**2 * tokens_of(buckets.all[-1]) + 4 * tokens_of(buckets.all[-1]) ** 2 * 1920
    )
    native = step_cost(tokens_of(NATIVE), width=1920)
    sizes = balanced_batches(costs, batch_size=1, native_cost=native)
    sampler = Sampler(
        shapes, batch_size={bucket.key: size * num_ranks for bucket, size in sizes.items()}, seed=1,
        buckets={name: bucket.key for name, bucket in shapes.items()},
    )  # fmt: skip
    totals, worst, step_costs = [0.0] * num_ranks, 0.0, []
    for step in range(sampler.steps_before(1)):
        work = [
            sum(costs[shapes[pick.clip_id]] for pick in sampler.share(step, rank=rank, num_ranks=num_ranks))
            for rank in range(num_ranks)
        ]
        worst = max(worst, max(work) / (sum(work) / num_ranks) - 1)
        totals = [total + cost for total, cost in zip(totals, work)]
        step_costs.append(max(work))
    assert worst < 1e-9  # the promise is 5 %
    assert max(totals) / min(totals) - 1 < 1e-9
    # From step to step the cost may differ by what whole clips cannot fill.
    assert all(native - max(costs.values()) < cost <= 1.05 * native for cost in step_costs)
