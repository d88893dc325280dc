from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.census import take_census
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.report.remarks import remarks, short


def manifest_of(count, **more):
    clips = [
        Clip(row=i, name=f"{i}.mp4", caption=f"caption {i}", state="used", content=f"{i:064}", **more)
        for i in range(1, count + 1)
    ]
    return Manifest(source="here", clips=tuple(clips))


def said(manifest, **more):
    return dict(remarks(manifest, replace(take_census(manifest), **more)))


def test_nothing_is_said_of_what_is_not_there():
    assert said(manifest_of(3)) == {}


def test_rows_and_groups_are_named_and_the_rest_is_counted():
    manifest = manifest_of(20)
    found = said(manifest, near_duplicates=[[1, 2], [3, 4, 5]], cut=list(range(1, 21)), black=[7])
    assert found["near-duplicates"].startswith("5 clips in 2 groups look alike: rows 1, 2; rows 3, 4, 5 (at most")
    assert found["scene cuts"] == "inside 20 clips (rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12 and 8 more)"
    assert found["black frames"] == "in 1 clip (row 7)"
    many = said(manifest, same_bytes=[[i, i + 1] for i in range(1, 15, 2)])
    assert "; and 2 more groups" in many["same bytes, other caption"]


def test_captions():
    clips = manifest_of(4, facts={"replaced": 2}).clips
    same = [replace(clip, caption="x" * 100) for clip in clips[:2]]
    long = replace(clips[2], facts={"tokens_cut": 9})
    empty = replace(clips[3], state="uncaptioned", reason="text.empty")
    latin = replace(clips[0], row=5, caption="", state="malformed", reason="text.encoding")
    manifest = Manifest(source="here", clips=(*same, long, empty, latin))
    found = dict(remarks(manifest, take_census(manifest, max_tokens=226)))
    assert found["captions: empty"] == "1 clip (row 4)"
    assert found["captions: not UTF-8"] == "1 clip (row 5)"
    assert found["captions: control characters"] == "8 made spaces in 4 clips (rows 1, 2, 4, 5)"
    assert "'" + "x" * 59 + "…' 2 times" in found["captions: repeated"]
    assert found["captions: too long"] == "9 tokens beyond 226 are cut from 1 clip (row 3); the most, 9, from row 3"


@given(st.text(max_size=200))
@settings(max_examples=60, deadline=None)
def test_captions_are_short_and_cannot_steer_a_terminal(text):
    assert short(text).isprintable()
    assert len(short(text)) <= 60
