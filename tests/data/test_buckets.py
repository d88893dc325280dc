"""Bucket files: ten thousand clips against an independent reading of the rules, and what is refused."""

import json
from collections import Counter

import numpy as np
import pytest
import yaml

from cogvideox_factory.data.buckets import (
    Bucket,
    Source,
    read_buckets,
    resolution_shapes,
)
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.draws import generator
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


AREAS = {"480p": 854 * 480, "720p": 1280 * 720, "1024": 1024**2, "256": 256**2}


def oracle_shapes(name):
    """Sides that are multiples of 16 at about the area, told again from the docstring, with decimal ratios only."""
    area = AREAS[name]
    if name.isdecimal():
        side, step = int(name) // 2, max(16, int(name) // 32)
        shapes = []
        while side <= int(name):
            long = 16 * round(area / side / 16)
            shapes += [(side, long), (long, side)]
            side += step
    else:
        ratios = (0.38, 0.43, 0.48, 0.5, 0.53, 9 / 16, 0.625, 0.67, 0.75, 0.89, 1.0)
        shapes = [
            (16 * round((area * r) ** 0.5 / 16), 16 * round((area / r) ** 0.5 / 16))
            for r in [*ratios, *(1 / r for r in ratios)]
        ] + ([(480, 720), (720, 480)] if name == "480p" else [])
    return sorted(set(shapes), key=lambda shape: shape[0] / shape[1])


def oracle(table, content, source, seed):
    """The rules of the older trainers, from the parsed file and their description; only the draws are the project's.

    Returns the bucket and its batch size, or None.
    """
    pixels = source.height * source.width
    for name in sorted(table, key=lambda name: -AREAS[str(name)]):
        lines = table[name]
        name = str(name)
        if pixels < 0.8 * AREAS[name]:
            continue
        for length in sorted(lines, reverse=True):
            (keep, size), considered = lines[length], 1.0
            if isinstance(keep, list):
                keep, considered = keep
            is_image, wants_image = source.num_frames == 1, length == 1
            if is_image != wants_image or source.num_frames < length:
                continue
            if considered < 1 and generator(seed, "bucket", "length", name, length, content).random() >= considered:
                continue
            if keep < 1 and generator(seed, "bucket", "keep", name, length, content).random() >= keep:
                break  # down to the next smaller resolution
            ratio = source.height / source.width
            best = min(oracle_shapes(name), key=lambda shape: abs(shape[0] / shape[1] - ratio))
            return Bucket(length, *best), size
    return None


def test_the_shapes_of_a_resolution_are_those_of_its_area():
    for name in AREAS:
        assert list(resolution_shapes(name)) == oracle_shapes(name)


def test_ten_thousand_clips_go_where_the_rules_say(listed):
    table = yaml.safe_load(FILE)["bucket_config"]
    found = {}
    for index, source in enumerate(random_sources(10_000)):
        content = f"{index:064x}"
        expected = oracle(table, content, source, seed=3)
        if expected is None:
            with pytest.raises(ClipError, match=r"bucket\.none"):
                listed.choose(content, source)
        else:
            assert listed.choose(content, source) == expected[0], source
            assert listed.batch_size(expected[0]) == expected[1]
        found[content] = expected
    lost = sum(bucket is None for bucket in found.values())
    assert 0 < lost < 2_000
    assert {bucket.num_frames for bucket, _ in filter(None, found.values())} == {1, 9, 49, 77}
    assert_batches_are_a_walk({content: line for content, line in found.items() if line})


def assert_batches_are_a_walk(found):
    """Two epochs of batches, against clips put one by one into the line of their shape."""
    sizes = {bucket.key: size for bucket, size in found.values()}
    shapes = {content: bucket.key for content, (bucket, _) in found.items()}
    sampler = Sampler(shapes, batch_size=sizes, seed=9, buckets=shapes)
    lines, step, in_order = {key: [] for key in sizes}, 0, sorted(shapes)
    for epoch in range(2):
        for place in generator(9, "epoch order", epoch).permutation(len(in_order)):
            content = in_order[place]
            line = lines[shapes[content]]
            line.append((content, epoch))
            if len(line) == sizes[shapes[content]]:
                assert [tuple(pick) for pick in sampler.batch(step)] == line, step
                step += 1
                line.clear()
        assert sampler.waiting(epoch + 1) == {key: len(line) for key, line in sorted(lines.items())}
    assert sampler.steps_before(2) == step > 2 * len(found) / max(sizes.values())
    assert sum(Counter(shapes.values()).values()) == len(found)


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


SHIPPED = """
bucket_config:
  # Structure: "resolution": { num_frames: [ keep_prob, batch_size ] }
  "144p": { 37: [1.0, 90], 53: [1.0, 44], 101: [1.0, 20], 197: [1.0, 8], 381: [1.0, 6]}
  "256": { 37: [1.0, 44], 53: [1.0, 22], 101: [1.0, 7], 197: [1.0, 4], 381: [1.0, 3]}
  "480p": { 37: [0.4, 8], 53: [0.4, 3], 101: [0.3, 2], 197: [1.0, 1], 381: [1.0, 1]}
  "720p": { 37: [0.5, 2], 53: [0.2, 1] , 77: [0.4, 1] }
  "1080p": { 37: [1.0, 1] }
  "2048": { 9: [ 0.01, 3 ] }
"""


def test_the_file_of_the_older_trainers_reads_as_it_is(tmp_path):
    (tmp_path / "bucket.yaml").write_text(SHIPPED)
    listed = read_buckets(tmp_path / "bucket.yaml", seed=0)
    lengths = {
        (option.resolution, option.num_frames): (option.keep_prob, option.batch_size) for option in listed.options
    }
    assert len(lengths) == 20
    assert lengths["144p", 37] == (1.0, 90)
    assert lengths["720p", 77] == (0.4, 1)
    assert lengths["2048", 9] == (0.01, 3)
    assert listed.choose("a" * 64, Source(40, 144, 256)) == Bucket(37, 144, 256)
