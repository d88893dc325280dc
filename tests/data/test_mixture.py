"""Several data sets as one: rows, weights, and a sampler that keeps its promises for any of them."""

from collections import Counter
from fractions import Fraction
from itertools import islice
from math import floor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.mixture import Part, count_sets, read_parts
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import FactoryError

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SHAPES = ("9x32x48", "9x48x32")
WEIGHTS = st.sampled_from([0.05, 0.1, 0.25, 1 / 3, 0.5, 1.0, 1.5, 2.0, 2.7, 3.0])


@st.composite
def mixtures(draw, max_size=12):
    sizes = {name: draw(st.integers(1, max_size)) for name in draw(st.sampled_from(["a", "ab", "abc"]))}
    sets = {f"{name}{i}": name for name, size in sizes.items() for i in range(size)}
    buckets = {clip_id: draw(st.sampled_from(SHAPES)) for clip_id in sets}
    return {
        "clip_ids": list(sets),
        "batch_size": {key: draw(st.integers(1, 6)) for key in SHAPES},
        "seed": draw(st.integers(0, 9)),
        "buckets": buckets,
        "sets": sets,
        "weights": {name: draw(WEIGHTS) for name in sizes},
    }


def first_epochs(sampler, count):
    return [sampler.picks(epoch) for epoch in range(count)]


@given(mixtures())
@settings(max_examples=120, deadline=None)
def test_an_epoch_has_the_places_the_weights_say(given_):
    sampler = Sampler(**given_)
    sizes = Counter(given_["sets"].values())
    epochs = first_epochs(sampler, 23)
    for picks in epochs:
        places = Counter(given_["sets"][pick.clip_id] for pick in picks)
        for name, size in sizes.items():
            assert abs(places[name] - given_["weights"][name] * size) < 1 + 1e-9
    seen = Counter(pick.clip_id for picks in epochs for pick in picks)
    for name, size in sizes.items():
        own = [seen[clip_id] for clip_id, of in given_["sets"].items() if of == name]
        assert max(own) - min(own) <= 1
        assert sum(own) == floor(23 * Fraction(str(given_["weights"][name])) * size)
        assert min(own) == floor(Fraction(sum(own), size))
    every = [pick for picks in epochs for pick in picks]
    assert len(set(every)) == len(every)  # (clip, how often it was seen) keys the draws of a place
    left = sum(sampler.batch_sizes[sampler.bucket(step)] for step in range(sampler.steps_before(23)))
    assert sum(sampler.waiting(23).values()) == len(every) - left


@given(mixtures())
@settings(max_examples=60, deadline=None)
def test_a_set_takes_its_rounds_one_after_another(given_):
    """Oracle: count how often each clip was seen before; it must be the number its place carries."""
    seen = Counter()
    for picks in first_epochs(Sampler(**given_), 12):
        for pick in sorted(picks, key=lambda pick: pick.epoch):
            assert pick.epoch == seen[pick.clip_id]
            seen[pick.clip_id] += 1


def walk(sampler, given_, epochs):
    """Lines of clips, one a shape, as the module's words have it."""
    lines = {key: [] for key in SHAPES}
    for picks in first_epochs(sampler, epochs):
        for pick in picks:
            key = given_["buckets"][pick.clip_id]
            lines[key].append(pick)
            if len(lines[key]) == given_["batch_size"][key]:
                yield list(lines[key])
                lines[key].clear()


@given(mixtures(), st.integers(0, 10**6))
@settings(max_examples=120, deadline=None)
def test_steps_are_those_of_a_walk_and_can_be_jumped_to(given_, jump):
    sampler = Sampler(**given_)
    expected = list(walk(sampler, given_, epochs=9))
    assert sampler.steps_before(9) == len(expected)
    assert [sampler.batch(step) for step in range(len(expected))] == expected
    for step, batch in enumerate(expected):
        assert {given_["buckets"][pick.clip_id] for pick in batch} == {sampler.bucket(step)}
        assert sampler.epochs(step) == pytest.approx(sum(map(len, expected[:step])) / sampler.places)
    if expected:
        place = jump % len(expected)
        assert Sampler(**given_).batch(place) == expected[place]


@given(mixtures())
@settings(max_examples=40, deadline=None)
def test_weights_of_one_are_no_weights_at_all(given_):
    ones = Sampler(**given_ | {"weights": dict.fromkeys(given_["weights"], 1.0)})
    plain = Sampler(**{key: value for key, value in given_.items() if key not in ("sets", "weights")})
    assert [ones.batch(step) for step in range(20)] == [plain.batch(step) for step in range(20)]


@pytest.mark.parametrize(("num_ranks", "num_micros"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_ranks_share_one_order(num_ranks, num_micros):
    ids = [f"{name}{i}" for name in "ab" for i in range(7)]
    sampler = Sampler(ids, batch_size=4, seed=1, sets={i: i[0] for i in ids}, weights={"a": 0.3, "b": 2.5})
    for step in (0, 5, 1000):
        shares = [
            pick
            for micro in range(num_micros)
            for rank in range(num_ranks)
            for pick in sampler.share(step, rank=rank, num_ranks=num_ranks, micro=micro, num_micros=num_micros)
        ]
        assert shares == sampler.batch(step)


def test_parts_of_rounds_are_fair():
    """Of a set seen by a tenth, no clip is preferred and no neighbours stay together."""
    ids = [f"c{i}" for i in range(10)]
    firsts = Counter()
    for seed in range(300):
        sampler = Sampler(ids, batch_size=1, seed=seed, sets=dict.fromkeys(ids, "a"), weights={"a": 0.1})
        (pick,) = sampler.picks(0)
        firsts[pick.clip_id] += 1
    assert min(firsts.values()) > 12
    assert len(firsts) == 10


def test_many_epochs_do_not_drift():
    ids = [f"c{i}" for i in range(7)]
    sampler = Sampler(ids, batch_size=1, seed=0, sets=dict.fromkeys(ids, "a"), weights={"a": 0.1})
    assert sampler.steps_before(10**9) == 7 * 10**8
    assert sampler.places == pytest.approx(0.7)
    assert len(list(islice((sampler.batch(10**9 + i) for i in range(3)), 3))) == 3


def test_weights_that_mean_nothing_are_refused():
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(FactoryError, match="must be above 0"):
            Sampler(["a"], batch_size=1, seed=0, sets={"a": "x"}, weights={"x": weight})


@pytest.fixture
def roots(tmp_path, make_video):
    """Two sets; the second holds the first clip of the first again, and a clip that is not there."""
    for name in ("one", "two"):
        for number in range(3):
            shade = 10 * number + (100 if name == "two" and number else 0)
            pictures = [np.full((32, 48, 3), shade + i, np.uint8) for i in range(9)]
            make_video(tmp_path / name / f"{number}.mp4", pictures=pictures)
    (tmp_path / "one/metadata.csv").write_text("video,caption\n0.mp4,first\n1.mp4,b\n2.mp4,c\n")
    (tmp_path / "two/list.csv").write_text("file,text\n0.mp4,first\n0.mp4,another\n1.mp4,d\ngone.mp4,e\n")
    return tmp_path


def parts(root, weight=2.5):
    lists = {"captions": None, "videos": None, "image_column": None}
    return [
        Part.choose(name="one", weight=1.0, root=str(root / "one"), table=None, caption_column="caption",
                    video_column="video", **lists),
        Part.choose(name="two", weight=weight, root=str(root / "two"), table="list.csv", caption_column="text",
                    video_column="file", **lists),
    ]  # fmt: skip


def test_rows_of_all_sets_in_one_manifest(roots):
    manifest = survey(read_parts(parts(roots)), SPEC)
    assert [(clip.row, clip.set, clip.set_row) for clip in manifest.clips] == [
        (1, "one", 2), (2, "one", 3), (3, "one", 4), (4, "two", 2), (5, "two", 3), (6, "two", 4), (7, "two", 5),
    ]  # fmt: skip
    assert manifest.counts() == {"used": 5, "duplicate": 1, "missing": 1}
    assert manifest.clips[3].detail == "the same bytes and caption as row 2 of one"
    assert "  row 5 of two gone.mp4: gone.mp4 is not there [path.missing]" in manifest.report()
    counted = [(c.name, c.total, c.usable, c.places) for c in count_sets(manifest.clips, parts(roots))]
    assert counted == [("one", 3, 3, 3.0), ("two", 4, 2, 5.0)]
    assert manifest.clips[4].to_json()["set"] == "two"


def test_a_set_alone_is_as_it_was(roots):
    alone = Part.choose(
        name="", weight=1.0, root=str(roots / "one"), table=None, captions=None, videos=None, caption_column="caption",
        video_column="video", image_column=None,
    )  # fmt: skip
    manifest = read_parts([alone])
    assert [clip.row for clip in manifest.clips] == [2, 3, 4]
    assert "set" not in manifest.clips[0].to_json()
    assert count_sets(manifest.clips, [alone]) == []
