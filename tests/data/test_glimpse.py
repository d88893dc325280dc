import shutil
from functools import partial

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.glimpse import Glimpse, contents, look_closer, scene_cuts, thumbnails
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.likeness import MAX_BITS, distances, near_groups
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.tiny.world import random_scene, render

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)


def cuts(pixels):
    return scene_cuts(pixels, pixels.astype(np.float32).mean(axis=-1))


def waves(seed: int, num_frames: int, speed: float = 1.0) -> np.ndarray:
    """A coloured pattern that drifts `speed` pixels a frame to the right, uint8 [F, 64, 64, 3]."""
    rng = np.random.default_rng(seed)
    phase = rng.uniform(0, 2 * np.pi, 3)
    across = np.arange(64)[None, None, :] - speed * np.arange(num_frames)[:, None, None]
    down = np.arange(64)[None, :, None]
    tint = rng.uniform(30, 225, 3)
    picture = np.stack([np.sin((across + down) * 2 * np.pi / 32 + p) for p in phase], axis=-1)
    return np.clip(tint + 28 * picture, 0, 255).astype(np.uint8)


@given(st.integers(0, 1000), st.lists(st.integers(6, 12), min_size=1, max_size=4))
@settings(max_examples=40, deadline=None)
def test_cuts_stand_where_black_and_white_scenes_meet_and_nowhere_else(seed, lengths):
    """Scenes alternate between dark and bright, so every seam is a cut by any measure."""
    scenes = [waves(seed + i, n).astype(int) // 4 + (180 if i % 2 else 0) for i, n in enumerate(lengths)]
    assert cuts(np.concatenate(scenes).astype(np.uint8)) == np.cumsum(lengths)[:-1].tolist()


@pytest.mark.parametrize("speed", [0.0, 0.5, 2.0, 8.0])
def test_motion_is_no_cut(speed):
    for seed in range(5):
        assert cuts(waves(seed, 17, speed)) == []


def test_a_fade_and_noise_are_no_cut():
    fade = waves(0, 1).repeat(17, 0) * np.linspace(0, 1, 17)[:, None, None, None]
    assert cuts(fade.astype(np.uint8)) == []
    assert cuts(np.random.default_rng(0).integers(0, 255, (17, 64, 64, 3), dtype=np.uint8)) == []
    assert cuts(waves(0, 1)) == []


@pytest.mark.parametrize("speed", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("fps", [8, 16])
def test_motion_is_told_in_widths_a_second(speed, fps):
    still, moving = (Glimpse.of(waves(3, 9, s), fps=fps) for s in (0.0, speed))
    assert still.motion == pytest.approx(0, abs=1e-3)
    # Normal flow sees the half of a shift that lies along the gradient of diagonal waves: cos 45 degrees.
    assert moving.motion == pytest.approx(speed * fps / 64 * np.cos(np.pi / 4), rel=0.15)


def test_motion_does_not_count_a_cut_and_one_frame_has_none():
    still = np.concatenate([waves(0, 1).repeat(8, 0) // 4, waves(1, 1).repeat(8, 0) // 4 + 180])
    seen = Glimpse.of(still, fps=8)
    assert seen.scene_cuts == (1.0,)
    assert seen.motion == pytest.approx(0, abs=1e-6)
    one = Glimpse.of(waves(0, 1), fps=8)
    assert one.motion is None
    assert "motion" not in one.to_json()


def test_black_frames_are_counted():
    pixels = waves(0, 9) // 2 + 60
    pixels[[0, 4]] = 5
    pixels[8] = 5
    pixels[8, :10, :10] = 255  # a logo on black is no black frame
    assert Glimpse.of(pixels, fps=8).black_frames == 2


def test_every_clip_is_looked_at_once_and_damage_inside_is_found(dataset, make_video):
    noise = np.random.default_rng(0).integers(0, 255, (9, 64, 96, 3), dtype=np.uint8)
    path = make_video(dataset / "videos/bad.mp4", pictures=list(noise), height=64, width=96)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = bytes(400)
    path.write_bytes(data)
    shutil.copy(dataset / "videos/0.mp4", dataset / "videos/copy.mp4")
    with (dataset / "videos.txt").open("a") as videos, (dataset / "prompts.txt").open("a") as prompts:
        videos.write("videos/bad.mp4\nvideos/copy.mp4\n")
        prompts.write("damaged\nother words\n")
    surveyed = survey(read_manifest(dataset), SPEC)
    assert len(surveyed.usable) == 5
    for num_workers in (0, 2):
        calls = []
        manifest, glimpses = look_closer(surveyed, SPEC, num_workers=num_workers, on_content=partial(calls.append, 1))
        assert [clip.state for clip in manifest.clips] == ["used", "used", "used", "corrupt", "used"]
        assert manifest.clips[3].reason == "video.corrupt"
        assert len(calls) == len(contents(surveyed)) == 4
        assert len(glimpses) == 3
        assert manifest.clips[0].facts["motion"] == manifest.clips[4].facts["motion"]


def test_a_clip_keeps_its_looks_through_another_size_and_encoder(tmp_path, make_video):
    looks = []
    for scene in range(4):
        frames = render(random_scene(0, scene), num_frames=9, height=96, width=144, fps=8)
        for name, size, codec in (("a.mp4", 1, "libx264"), ("b.webm", 2, "libvpx-vp9")):
            pictures = [frame[::size, ::size] for frame in frames]
            path = make_video(
                tmp_path / f"{scene}{name}", pictures=pictures, height=96 // size, width=144 // size, codec=codec
            )
            (tmp_path / "videos.txt").write_text(f"{path.name}\n")
            (tmp_path / "prompts.txt").write_text("a clip\n")
            _, glimpses = look_closer(survey(read_manifest(tmp_path), SPEC), SPEC)
            looks += glimpses.values()
    for first, second in zip(looks[::2], looks[1::2]):
        assert distances(first.hashes, second.hashes[None])[0] <= MAX_BITS


def test_a_thumbnail_keeps_the_shape_and_a_broken_clip_has_none(dataset):
    manifest = survey(read_manifest(dataset), SPEC)
    (dataset / "videos/1.mp4").write_bytes(b"gone bad")
    calls = []
    pictures = thumbnails(manifest.usable, longest=24, on_clip=partial(calls.append, 1))
    assert list(pictures) == [1, 3]
    assert len(calls) == 3
    (dataset / "small.jpg").write_bytes(pictures[1])
    info = probe_size(dataset / "small.jpg")
    assert info == (24, 16)
    assert read_image(dataset / "small.jpg", 16, 24).mean() == pytest.approx(20, abs=3)


def probe_size(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].width, container.streams.video[0].height


def test_the_same_shape_in_another_colour_is_another_clip():
    disc = np.hypot(*np.meshgrid(np.arange(64) - 20, np.arange(64) - 30)) < 12
    looks = []
    for colour in ((230, 140, 20), (230, 140, 30), (60, 190, 60)):
        frames = np.full((9, 64, 64, 3), 120, np.uint8)
        frames[:, disc] = colour
        looks.append(Glimpse.of(frames, fps=8))
    hashes, colours = np.stack([g.hashes for g in looks]), np.stack([g.colours for g in looks])
    assert near_groups(hashes, colours) == [[0, 1]]
    assert near_groups(hashes, colours, max_colour=255) == [[0, 1, 2]]
