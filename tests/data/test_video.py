import os
import tracemalloc
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from cogvideox_factory.data import container
from cogvideox_factory.data.container import probe
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video import ClipSpec, read_clip


def spec(num_frames=9, height=32, width=48, fps=8.0, **more) -> ClipSpec:
    return ClipSpec(num_frames=num_frames, height=height, width=width, fps=fps, **more)


def quarters(height=64, width=96) -> np.ndarray:
    """Red, green / blue, white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 20, 20)
    picture[: height // 2, width // 2 :] = (20, 220, 20)
    picture[height // 2 :, : width // 2] = (20, 20, 220)
    picture[height // 2 :, width // 2 :] = (220, 220, 220)
    return picture


def corners(pixels: np.ndarray) -> str:
    """Name the colours at top left, top right, bottom left, bottom right."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    return "".join(names[tuple((pixels[y, x] > 120).astype(int).tolist())] for y in (4, -5) for x in (4, -5))


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts", ".webm"])
def test_frames_come_by_time_from_any_container(tmp_path, make_video, numbers, suffix):
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = make_video(tmp_path / f"a{suffix}", 20, fps=16, codec=codec)
    clip = read_clip(path, spec(9))
    assert numbers(clip.pixels) == list(range(0, 18, 2))
    assert clip.state == "retimed"
    assert clip.pixels.dtype == np.uint8
    assert clip.pixels.shape == (9, 32, 48, 3)


def test_variable_rate_is_read_by_stamp(tmp_path, make_video, numbers):
    pts = [500, 625, 700, 1000, 1100, 1499, 1500, 2000]
    path = make_video(tmp_path / "a.mkv", 8, pts=pts, time_base=Fraction(1, 1000))
    clip = read_clip(path, spec(9))
    wanted = [max(i for i, p in enumerate(pts) if p - 500 <= k * 125) for k in range(9)]
    assert numbers(clip.pixels) == wanted
    assert clip.facts["variable_rate"] is True
    assert clip.plan.num_repeated > 0


def test_policies(tmp_path, make_video, numbers):
    path = make_video(tmp_path / "a.mp4", 12)
    assert numbers(read_clip(path, spec(5)).pixels) == [0, 1, 2, 3, 4]
    assert read_clip(path, spec(5)).state == "trimmed"
    assert read_clip(path, spec(12)).state == "used"
    assert numbers(read_clip(path, spec(5, fps_policy="stretch")).pixels) == [0, 2, 5, 8, 11]
    padded = read_clip(path, spec(15, short_policy="repeat_last"))
    assert numbers(padded.pixels) == [*range(12), 11, 11, 11]
    assert (padded.state, padded.facts["num_padded"]) == ("padded", 3)
    with pytest.raises(ClipError, match="too_short"):
        read_clip(path, spec(13))


@pytest.mark.parametrize(
    ("rotation", "hflip", "shown"),
    [(0, False, "rgbw"), (90, False, "gwrb"), (180, False, "wbgr"), (270, False, "brwg"), (0, True, "grwb")],
)
def test_rotation_and_mirror_are_applied(tmp_path, make_video, rotation, hflip, shown):
    path = make_video(
        tmp_path / "a.mp4", pictures=[quarters()] * 9, height=64, width=96, rotation=rotation, hflip=hflip
    )
    turned = rotation % 180 != 0
    clip = read_clip(path, spec(height=96 if turned else 64, width=64 if turned else 96))
    assert corners(clip.pixels[0]) == shown


def test_nothing_is_distorted_unless_asked(tmp_path, make_video):
    """A circle stays round under cover and crop, wide pixels included."""
    y, x = np.mgrid[:96, :128]
    disc = np.where(((y - 48) ** 2 + (x - 64) ** 2 < 30**2)[..., None], 230, 20).astype(np.uint8).repeat(3, 2)
    square = make_video(tmp_path / "s.mp4", pictures=[disc] * 9, height=96, width=128)
    wide = make_video(tmp_path / "w.mp4", pictures=[disc[:, ::2]] * 9, height=96, width=64, aspect=Fraction(2, 1))

    def roundness(path, **more) -> float:
        bright = read_clip(path, spec(height=64, width=64, **more)).pixels[0, ..., 0] > 125
        return float(bright.any(1).sum() / bright.any(0).sum())

    assert roundness(square) == pytest.approx(1, abs=0.08)
    assert roundness(wide) == pytest.approx(1, abs=0.08)
    assert roundness(square, crop="stretch") == pytest.approx(128 / 96, abs=0.12)


def test_random_crop_follows_its_generator(tmp_path, make_video):
    ramp = np.linspace(0, 255, 128).astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    path = make_video(tmp_path / "a.mp4", pictures=[ramp] * 9, height=64, width=128)
    clips = [read_clip(path, spec(height=64, width=64, crop="random"), rng=np.random.default_rng(s)) for s in (1, 1, 2)]
    assert (clips[0].pixels == clips[1].pixels).all()
    assert clips[0].fit != clips[2].fit
    assert int(clips[0].pixels[0, 32, 0, 0]) == pytest.approx(int(ramp[32, clips[0].fit.left, 0]), abs=12)


def test_shrinking_does_not_alias(tmp_path, make_video):
    checks = np.where((np.indices((128, 128)).sum(0) % 2)[..., None], 235, 20).astype(np.uint8).repeat(3, 2)
    path = make_video(tmp_path / "a.mp4", pictures=[checks] * 9, height=128, width=128)
    small = read_clip(path, spec(height=32, width=32)).pixels
    assert small[:, 4:-4, 4:-4].astype(float).std() < 12


@pytest.mark.parametrize(
    ("codec", "pix_fmt", "suffix", "size"),
    [
        ("libx264", "yuv444p", ".mp4", (35, 51)),
        ("libvpx-vp9", "yuv420p", ".webm", (35, 51)),
        ("ffv1", "bgr0", ".mkv", (35, 51)),
        ("libx264", "yuv420p10le", ".mp4", (64, 96)),
        ("mpeg4", "yuv420p", ".avi", (64, 96)),
    ],
)
def test_odd_sizes_and_formats_keep_their_colours(tmp_path, make_video, codec, pix_fmt, suffix, size):
    path = make_video(
        tmp_path / f"a{suffix}", pictures=[quarters(*size)] * 9, height=size[0], width=size[1], codec=codec,
        pix_fmt=pix_fmt,
    )  # fmt: skip
    clip = read_clip(path, spec())
    assert corners(clip.pixels[-1]) == "rgbw"
    assert clip.facts.get("bit_depth") == (10 if "10" in pix_fmt else None)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "off"),
    [
        ("a.mov", "qtrle", "argb", 1),
        ("a.mkv", "ffv1", "yuva420p", 2),
        ("a.webm", "libvpx-vp9", "yuva420p", 3),
    ],
)
def test_transparency_is_laid_on_black(tmp_path, make_video, name, codec, pix_fmt, off):
    picture = np.full((32, 48, 4), 200, np.uint8)
    picture[:, :24, 3] = 255
    picture[:, 24:, 3] = 51
    path = make_video(tmp_path / name, pictures=[picture] * 20, codec=codec, pix_fmt=pix_fmt)
    for start in (0, 7):
        clip = read_clip(path, spec(start=start))
        assert clip.facts["alpha"] is True
        assert clip.pixels[:, :, :23].mean() == pytest.approx(200, abs=off)
        assert clip.pixels[:, :, 25:].mean() == pytest.approx(40, abs=off)


def test_transparency_that_no_decoder_keeps_is_refused(tmp_path, make_video, monkeypatch):
    picture = np.full((32, 48, 4), 200, np.uint8)
    path = make_video(tmp_path / "a.webm", pictures=[picture] * 9, codec="libvpx-vp9", pix_fmt="yuva420p")
    monkeypatch.setattr(container, "codecs_available", {"vp9"})
    with pytest.raises(ClipError, match="transparency that its decoder drops"):
        read_clip(path, spec())


def test_flipped_bits_are_refused_or_change_nothing(tmp_path, make_video):
    noise = np.random.default_rng(0).integers(0, 255, (24, 64, 96, 3), dtype=np.uint8)
    path = make_video(tmp_path / "a.mp4", pictures=list(noise), height=64, width=96)
    wanted = spec(24, 64, 96)
    good = read_clip(path, wanted).pixels
    data = path.read_bytes()
    silent = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        damaged = bytearray(data)
        for place in rng.integers(48, len(data), 40):
            damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        try:
            silent += bool((read_clip(path, wanted).pixels != good).any())
        except ClipError as error:
            assert error.state in ("corrupt", "too_short", "unsupported", "too_large")  # noqa: PT017
    assert silent <= 1


def test_a_change_of_size_on_the_way_is_refused(tmp_path, make_video):
    parts = []
    for number, size in enumerate(((32, 48), (64, 96))):
        make_video(tmp_path / f"{number}.ts", 8, height=size[0], width=size[1])
        parts.append((tmp_path / f"{number}.ts").read_bytes())
    (tmp_path / "both.ts").write_bytes(b"".join(parts))
    with pytest.raises(ClipError) as caught:
        read_clip(tmp_path / "both.ts", spec(14, fps_policy="stretch"))
    assert caught.value.code in ("video.resolution_change", "video.corrupt")


def test_a_file_that_changed_since_it_was_hashed_is_refused(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4")
    status = path.stat()
    stamp = (status.st_size, status.st_mtime_ns)
    read_clip(path, spec(), stamp=stamp)
    os.utime(path, ns=(0, status.st_mtime_ns + 1))
    with pytest.raises(ClipError, match="changed"):
        read_clip(path, spec(), stamp=stamp)


def test_memory_is_that_of_the_result(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", 50, height=256, width=384)
    info = probe(path)
    tracemalloc.start()
    clip = read_clip(path, spec(9, 64, 96, fps_policy="stretch"), info=info)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < clip.pixels.nbytes + 256 * 384 * 3 * 4


@pytest.mark.parametrize("name", ["x.png", "x.mp4"])
@pytest.mark.parametrize("policy", ["resample", "stretch"])
def test_a_picture_is_a_clip_of_one_frame(tmp_path, name, policy):
    path = tmp_path / name
    write_png(path, quarters())
    clip = read_clip(path, spec(1, 32, 48, fps_policy=policy))
    assert clip.pixels.shape == (1, 32, 48, 3)
    assert corners(clip.pixels[0]) == "rgbw"
    assert (clip.pixels[0] == read_image(path, 32, 48)).all()
    assert clip.state == "used"
    assert "source_fps" not in clip.facts


@pytest.mark.parametrize("policy", ["reject", "repeat_last"])
def test_a_picture_never_becomes_a_frozen_clip(tmp_path, policy):
    path = write_png(tmp_path / "x.png", quarters())
    with pytest.raises(ClipError, match=r"clips have 9 frames.*num_frames=1") as caught:
        read_clip(path, spec(9, short_policy=policy))
    assert (caught.value.code, caught.value.state) == ("image.still", "too_short")


def test_real_clips():
    folder = os.environ.get("COGVIDEOX_REAL_CLIPS")
    if not folder:
        pytest.skip("set COGVIDEOX_REAL_CLIPS to a folder of real clips to try them")
    paths = sorted(Path(folder).rglob("*.mp4"))
    assert paths
    for path in paths:
        info = probe(path)
        clip = read_clip(path, spec(min(49, info.num_frames), 64, 96, fps=info.fps), info=info)
        assert clip.state in ("used", "trimmed")
        assert clip.pixels.std() > 5
