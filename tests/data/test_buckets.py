"""Buckets: the file's rules against an independent reading of them, and what `auto` promises."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.buckets import (
    AutoBuckets,
    Bucket,
    Source,
    auto_buckets,
    balanced_batches,
    read_buckets,
    resolution_shapes,
    step_cost,
)
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.errors import FactoryError

FILE = """
bucket_config:
  480p:
    9: [1.0, 6]
    49: [1.0, 4]
    77: [0.5, 2]
  720p:
    49: [[0.3, 0.6], 2]
    77: [0.0, 0]
  "1024":
    77: [0.7, 1]
  256:
    1: [1.0, 20]
    9: [1.0, 16]
"""


@pytest.fixture
def listed(tmp_path):
    (tmp_path / "bucket.yaml").write_text(FILE)
    return read_buckets(tmp_path / "bucket.yaml", seed=3)


def random_sources(count, seed=0):
    draw = np.random.default_rng(seed)
    sides = draw.integers(8, 140, size=(count, 2)) * 16
    return [Source(int(f), int(h), int(w)) for f, (h, w) in zip(draw.integers(1, 200, count), sides)]


def oracle(buckets, content, source):
    """The rules of the older trainers, told again from their description, with this project's draws."""
    pixels = source.height * source.width
    names = sorted({o.resolution for o in buckets.options}, key=lambda name: -_area(buckets, name))
    for name in names:
        if pixels < 0.8 * _area(buckets, name):
            continue
        lengths = sorted((o for o in buckets.options if o.resolution == name), key=lambda o: -o.num_frames)
        for option in lengths:
            if (source.num_frames == 1) != (option.num_frames == 1) or source.num_frames < option.num_frames:
                continue
            if buckets._draw("length", option, content) >= option.length_prob:
                continue
            if buckets._draw("keep", option, content) < option.keep_prob:
                ratios = [abs(h / w - source.height / source.width) for h, w in resolution_shapes(name)]
                return Bucket(option.num_frames, *resolution_shapes(name)[int(np.argmin(ratios))])
            break
    return None


def _area(buckets, name):
    return next(o.num_pixels for o in buckets.options if o.resolution == name)


def test_ten_thousand_clips_go_where_the_rules_say(listed):
    found = {}
    for index, source in enumerate(random_sources(10_000)):
        content = f"{index:064x}"
        expected = oracle(listed, content, source)
        if expected is None:
            with pytest.raises(ClipError, match=r"bucket\.none"):
                listed.choose(content, source)
        else:
            assert listed.choose(content, source) == expected, source
        found[content] = expected
    lost = sum(bucket is None for bucket in found.values())
    assert 0 < lost < 2_000
    assert {bucket.num_frames for bucket in found.values() if bucket} == {1, 9, 49, 77}


def test_keep_prob_is_a_share_of_the_clips_and_belongs_to_each(listed):
    source = Source(80, 768, 1360)  # fills 1024 and 720p
    chosen = [listed.choose(f"{i:064x}", source) for i in range(2_000)]
    assert abs(sum(bucket == (77, 768, 1360) for bucket in chosen) / 2_000 - 0.7) < 0.03
    assert not any(bucket == (77, *shape) for bucket in chosen for shape in resolution_shapes("720p"))
    again = [listed.choose(f"{i:064x}", source) for i in reversed(range(2_000))]
    assert again[::-1] == chosen


def test_sides_are_multiples_of_16_and_native_sizes_are_there():
    for name in ("144p", "240p", "360p", "480p", "720p", "1080p", "2k", "4k", "256", "512", "1024", "2048", "2880"):
        shapes = resolution_shapes(name)
        assert all(side % 16 == 0 for shape in shapes for side in shape)
        ratios = [height / width for height, width in shapes]
        assert ratios == sorted(ratios)
        assert len(shapes) == len(set(shapes)) > 15
        square = next(h * w for h, w in shapes if h == w)
        assert all(0.8 < h * w / square < 1.25 for h, w in shapes), name
    assert {(768, 1360), (1360, 768)} <= set(resolution_shapes("1024"))
    assert {(480, 720), (480, 848)} <= set(resolution_shapes("480p"))


def test_a_clip_without_a_bucket_is_told_why(listed):
    with pytest.raises(ClipError, match=r"5 frames of 480x720 are too few .* shortest is 9"):
        listed.choose("a", Source(5, 480, 720))
    with pytest.raises(ClipError, match="fill no resolution of the bucket file; the smallest, 256"):
        listed.choose("a", Source(81, 64, 64))


def test_batch_sizes_are_those_of_the_file(listed):
    assert listed.batch_size(Bucket(49, 480, 720)) == 4
    assert listed.batch_size(Bucket(77, 768, 1360)) == 1
    assert json.loads(listed.to_json())["seed"] == 3
    assert "batch" not in listed.to_json()


@pytest.mark.parametrize(
    ("text", "law"),
    [
        ("480q: {49: [1.0, 4]}", "'480q' is no resolution.*480p"),
        ("480p: {49: [1.0]}", "is not .keep_prob"),
        ("480p: {49: [1.5, 4]}", "is not .keep_prob"),
        ("480p: {49: [1.0, 0]}", "batch_size 0 with keep_prob 1.0"),
        ("480p: {x: [1.0, 2]}", "is not .keep_prob"),
        ("480p: [49]", "no table of frames"),
        ("480p: {49: [0.0, 0]}", "every keep_prob is 0"),
        ("- 480p", "must hold"),
        ("", "holds no buckets"),
        ("480p: {", "not valid YAML"),
        ("480p: {49: [1.0, 4]}\n480p: {81: [1.0, 1]}", "set on line 1 already"),
    ],
)
def test_what_is_no_bucket_file(tmp_path, text, law):
    (tmp_path / "b.yaml").write_text(text)
    with pytest.raises(FactoryError, match=law):
        read_buckets(tmp_path / "b.yaml", seed=0)


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
    """24 d^2 S + 4 S^2 d, with batches filled up to what the native shape costs."""
    width, native = 1920, 17_776
    tokens = {Bucket(9, 480, 16 * i): 300 * i + 226 for i in range(10, 60)}
    costs = {bucket: step_cost(count, width=width) for bucket, count in tokens.items()}
    assert costs[Bucket(9, 480, 160)] == 24 * width**2 * 3226 + 4 * 3226**2 * width
    budget = 8 * step_cost(native, width=width)
    sizes = balanced_batches(costs, batch_size=8, native_cost=step_cost(native, width=width))
    for bucket, size in sizes.items():
        assert size == math.floor(budget / costs[bucket])
        assert budget - costs[bucket] < size * costs[bucket] <= budget
