import shutil
from dataclasses import replace

import numpy as np

from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video_info import Limits

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)


def test_every_clip_ends_in_one_state_and_good_ones_in_their_own(dataset, make_video):
    videos = dataset / "videos"
    make_video(videos / "long.mp4", 20)
    make_video(videos / "fast.mp4", 30, fps=16)
    make_video(videos / "short.mp4", 5)
    shutil.copy(videos / "0.mp4", videos / "copy.mp4")
    (videos / "text.mp4").write_text("no video")
    data = (videos / "1.mp4").read_bytes()
    (videos / "cut.mp4").write_bytes(data[: len(data) // 2])
    rows = [
        ("0.mp4", "a", "used", None),
        ("long.mp4", "a", "trimmed", None),
        ("fast.mp4", "a", "retimed", None),
        ("short.mp4", "a", "too_short", "video.too_short"),
        ("copy.mp4", "a", "duplicate", "row.duplicate"),
        ("copy.mp4", "another caption", "used", None),
        ("text.mp4", "a", "corrupt", "video.unreadable"),
        ("cut.mp4", "a", "corrupt", "video.truncated"),
        ("gone.mp4", "a", "missing", "path.missing"),
        ("1.mp4", " ", "uncaptioned", "text.empty"),
    ]
    (dataset / "videos.txt").write_text("".join(f"videos/{row[0]}\n" for row in rows))
    (dataset / "prompts.txt").write_text("".join(f"{row[1]}\n" for row in rows))
    seen = []
    for num_workers in (0, 3):
        manifest = survey(read_manifest(dataset), SPEC, num_workers=num_workers, on_clip=seen.append)
        assert [(clip.state, clip.reason) for clip in manifest.clips] == [row[2:] for row in rows]
        assert sum(manifest.counts().values()) == len(rows)
        assert len({clip.id for clip in manifest.usable}) == len(manifest.usable) == 4
    assert [clip.row for clip in seen[:8]] == list(range(1, 9))
    assert manifest.clips[2].facts["frames"] == "0:16:2"
    assert manifest.clips[0].facts["source_width"] == 48


def test_ids_follow_bytes_and_caption_not_name_or_place(dataset):
    first = survey(read_manifest(dataset), SPEC)
    (dataset / "videos/0.mp4").rename(dataset / "videos/renamed.mp4")
    (dataset / "videos.txt").write_text("videos/2.mp4\nvideos/renamed.mp4\nvideos/1.mp4\n")
    (dataset / "prompts.txt").write_text("a third clip\na first clip\nchanged\n")
    second = survey(read_manifest(dataset), SPEC)
    assert second.clips[0].id == first.clips[2].id
    assert second.clips[1].id == first.clips[0].id
    assert second.clips[2].id != first.clips[1].id
    assert second.clips[2].content == first.clips[1].content


def test_limits_reach_the_clips(dataset):
    manifest = survey(read_manifest(dataset), SPEC, limits=Limits(max_frames=8))
    assert manifest.counts() == {"too_large": 3}


def test_pictures_and_videos_in_runs_of_one_frame_and_of_many(dataset):
    write_png(dataset / "videos/p.png", np.full((64, 32, 3), 90, np.uint8))
    (dataset / "videos/bad.jpg").write_bytes(b"\xff\xd8\xff no picture")
    (dataset / "videos.txt").write_text("videos/0.mp4\nvideos/p.png\nvideos/bad.jpg\n")
    one = survey(read_manifest(dataset), replace(SPEC, num_frames=1))
    assert [clip.state for clip in one.clips] == ["trimmed", "used", "corrupt"]
    assert (one.clips[1].facts["source_height"], one.clips[1].facts["source_width"]) == (64, 32)
    many = survey(read_manifest(dataset), SPEC)
    assert [clip.state for clip in many.clips] == ["used", "too_short", "corrupt"]
    assert many.clips[1].reason == "image.still"
