from dataclasses import replace

import numpy as np
import pytest

from cogvideox_factory.data.census import take_census
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.glimpse import look_closer, thumbnails
from cogvideox_factory.data.manifest import Clip, Manifest, read_manifest
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.report.doctor_page import MAX_PICTURES, Findings, numbers_to_show, render
from cogvideox_factory.tiny.world import random_scene
from cogvideox_factory.tiny.world import render as render_scene

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
EVIL = '<script>alert("x")</script>'


def crowd(count, **more):
    clips = [
        Clip(row=i, name=f"{i}.mp4", caption=EVIL, state="used", content=f"{i:064}", **more)
        for i in range(1, count + 1)
    ]
    return Manifest(source=EVIL, clips=tuple(clips), notes=(EVIL,))


def test_a_page_of_clips_is_whole_and_tells_every_state(tmp_path, parse_page):
    dataset = tmp_path
    for number in range(3):
        frames = render_scene(random_scene(3, number), num_frames=9, height=32, width=48, fps=8)
        export_to_video(frames, dataset / f"videos/{number}.mp4")
    (dataset / "prompts.txt").write_text("a first clip\na second clip\na third clip\n")
    (dataset / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\nvideos/2.mp4\n")
    (dataset / "videos/1.mp4").write_bytes(b"no video")
    with (dataset / "videos.txt").open("a") as videos, (dataset / "prompts.txt").open("a") as prompts:
        videos.write("videos/gone.mp4\n")
        prompts.write("a caption\n")
    manifest, glimpses = look_closer(survey(read_manifest(dataset), SPEC), SPEC)
    census = take_census(manifest, glimpses)
    pictures = thumbnails(manifest.usable)
    page = render(
        Findings(
            manifest=manifest, census=census, spec=SPEC, pictures=pictures, skipped=("tokens",), buckets={"9x32x48": 7}
        )
    )
    assert "<td>9x32x48</td>" in page.replace('<td class="name">', "<td>")
    found = parse_page(page)
    assert len(found.sources) == 3  # the icon and two clips
    assert all(source.startswith("data:") for source in found.sources)
    for word in ("video.unreadable", "path.missing", "a first clip", "duration, s", "motion", "48x32", "tokens"):
        assert word in found.text, word
    assert "no picture" not in found.text
    assert page.count("<svg") == sum(np.ptp(m.values) > 0 for m in census.measures.values())


def test_text_cannot_become_markup(parse_page):
    manifest = crowd(3)
    lost = replace(manifest.clips[2], state="corrupt", reason="video.corrupt", detail=EVIL, name=EVIL)
    manifest = replace(manifest, clips=(*manifest.clips[:2], lost))
    census = replace(take_census(manifest), near_duplicates=[[1, 2]], sizes={EVIL: 1})
    page = render(Findings(manifest=manifest, census=census, spec=SPEC, pictures={}, skipped=(EVIL,)))
    assert "<script" not in page
    parse_page(page)


@pytest.mark.parametrize("count", [0, 1, 5, 1000])
def test_pictures_are_bounded_and_what_was_remarked_on_comes_first(count):
    manifest = crowd(count)
    census = take_census(manifest)
    rows = numbers_to_show(manifest, census)
    assert len(rows) == len(set(rows)) == min(count, MAX_PICTURES)
    if count == 1000:
        census = replace(census, near_duplicates=[[400, 900], [5, 6]], cut=[777], black=[1000])
        rows = numbers_to_show(manifest, census)
        assert rows[:6] == [400, 900, 5, 6, 777, 1000]
        assert len(rows) == len(set(rows)) == MAX_PICTURES
        assert numbers_to_show(manifest, replace(census, cut=list(range(1, 1001))))[:5] == [400, 900, 5, 6, 1]


def test_the_page_of_a_large_set_is_small_and_counts_what_it_leaves_out(parse_page):
    lost = {"state": "corrupt", "reason": "video.corrupt", "detail": "x" * 80}
    good, bad = crowd(3000), crowd(3000)
    bad_clips = [replace(clip, row=clip.row + 3000, **lost) for clip in bad.clips]
    manifest = Manifest(source="here", clips=(*good.clips, *bad_clips))
    census = replace(take_census(manifest), near_duplicates=[[2 * i + 1, 2 * i + 2] for i in range(500)])
    pictures = dict.fromkeys(numbers_to_show(manifest, census), b"x" * 8000)
    page = render(Findings(manifest=manifest, census=census, spec=SPEC, pictures=pictures))
    assert len(page) < 2_000_000
    found = parse_page(page)
    for words in ("and 2,500 more", "and 488 more groups", "3,000", "more that can be used"):
        assert words in found.text, words
    assert len(found.sources) == 1 + MAX_PICTURES
