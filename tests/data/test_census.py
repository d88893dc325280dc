import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.census import Measure, take_census, with_tokens
from cogvideox_factory.data.glimpse import look_closer
from cogvideox_factory.data.manifest import Clip, Manifest, read_manifest
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
numbers = st.floats(-1e6, 1e6, allow_nan=False)


def manifest_of(captions):
    clips = [
        Clip(row=i, name=f"{i}.mp4", caption=c, state="used", content=f"{i:064}") for i, c in enumerate(captions, 1)
    ]
    return Manifest(source="here", clips=tuple(clips))


@given(st.lists(numbers, min_size=1, max_size=50))
@settings(max_examples=100, deadline=None)
def test_every_clip_stands_in_one_bar(values):
    measure = Measure(title="a", unit="b", values=np.array(values))
    counts, edges = measure.histogram()
    assert counts.sum() == len(values)
    assert len(edges) == len(counts) + 1
    assert (edges[0], edges[-1]) == (min(values), max(values))
    assert json.loads(json.dumps(measure.to_json()))["clips"] == len(values)


@given(st.lists(st.sampled_from(["a cat", "a dog", "a very long caption of a bird", "a fox"]), max_size=12))
@settings(max_examples=60, deadline=None)
def test_captions_are_accounted_for_like_by_hand(captions):
    manifest = with_tokens(manifest_of(captions), lambda text: len(text.split()) + 1, 4)
    census = take_census(manifest, max_tokens=4)
    wanted = {}
    for row, caption in enumerate(captions, 1):
        wanted.setdefault(caption, []).append(row)
    assert sorted(census.captions.repeated) == sorted(rows for rows in wanted.values() if len(rows) > 1)
    assert census.captions.too_long == {row: 4 for row, c in enumerate(captions, 1) if "long" in c}
    assert census.captions.to_json()["tokens_cut"] == 4 * sum("long" in c for c in captions)


def test_each_distinct_caption_is_counted_once():
    asked = []
    with_tokens(manifest_of(["a", "b", "a"]), lambda text: asked.append(text) or 1, 226)
    assert asked == ["a", "b"]


def test_a_whole_set(dataset, make_video, tmp_path):
    rng = np.random.default_rng(5)
    scene = rng.integers(0, 255, (4, 6, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    make_video(dataset / "videos/scene.mp4", pictures=[scene] * 9)
    make_video(dataset / "videos/again.webm", pictures=[scene] * 16, codec="libvpx-vp9")
    make_video(dataset / "videos/short.mp4", 3, fps=30, height=64)
    shutil.copy(dataset / "videos/0.mp4", dataset / "videos/copy.mp4")
    rows = [
        ("videos/scene.mp4", "a scene"), ("videos/again.webm", "a scene"), ("videos/short.mp4", "short"),
        ("videos/copy.mp4", "other\x01words"), ("videos/1.mp4", " "), ("videos/1.mp4", "nul\0"),
    ]  # fmt: skip
    for name, column in (("videos.txt", 0), ("prompts.txt", 1)):
        with (dataset / name).open("a") as file:
            file.write("".join(row[column] + "\n" for row in rows))
    surveyed = survey(read_manifest(dataset), SPEC)
    manifest, glimpses = look_closer(surveyed, SPEC)
    census = take_census(manifest, glimpses)
    assert census.near_duplicates is not None
    assert [4, 5] in census.near_duplicates
    assert census.same_bytes == [[1, 7]]
    assert census.sizes == {"48x32": 6, "48x64": 1}
    assert census.captions.repeated == [[4, 5]]
    assert (census.captions.empty, census.captions.rejected, census.captions.missing) == ([8], [9], [])
    assert census.captions.replaced == {7: 1}
    assert census.measures["duration"].values.min() == pytest.approx(0.1)
    assert len(census.measures["duration"].values) == 7  # the short one can be read, though not used
    assert json.loads(json.dumps(census.to_json()))["near_duplicates"]["groups"] == census.near_duplicates
    assert take_census(surveyed).near_duplicates is None
    assert "motion" not in take_census(surveyed).measures


def test_nothing_to_count():
    census = take_census(replace(manifest_of([]), clips=()), {})
    assert census.measures == {}
    assert census.near_duplicates == []
    json.dumps(census.to_json())
