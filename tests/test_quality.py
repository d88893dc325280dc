"""The metrics have the limits they claim."""

import math

import numpy as np
import pytest

from cogvideox_factory.quality import (
    consistency,
    features,
    first_frame_fidelity,
    flicker,
    measure,
    motion_amount,
    psnr,
    sharpness,
    similarity,
    ssim,
)
from cogvideox_factory.tiny.world import random_scene, render

VIDEO = render(random_scene(0, 0), num_frames=9, height=48, width=64, fps=8)
NOISE = np.random.default_rng(0).integers(0, 256, (9, 48, 64, 3), dtype=np.uint8)


def blurred(video: np.ndarray) -> np.ndarray:
    values = video.astype(np.float32)
    for axis in (1, 2):
        values = (np.roll(values, 1, axis) + values + np.roll(values, -1, axis)) / 3
    return values.astype(np.uint8)


def waves(pixels_a_frame: float, num_frames: int = 5) -> np.ndarray:
    """A smooth pattern that shifts sideways."""
    x = np.arange(64) - pixels_a_frame * np.arange(num_frames)[:, None]
    values = 128 + 100 * np.sin(2 * np.pi * x / 32)
    return np.rint(values)[:, None, :, None].repeat(48, 1).repeat(3, 3).astype(np.uint8)


def test_a_still_video_neither_moves_nor_flickers():
    found = measure(VIDEO[:1].repeat(9, 0))
    assert (found["flicker"], found["motion"]) == (0, 0)
    assert found["consistency"] == pytest.approx(1)


def test_a_plain_video_has_no_detail():
    assert measure(np.full((3, 16, 16, 3), 77, np.uint8)) == {
        "sharpness": 0,
        "flicker": 0,
        "consistency": pytest.approx(1),
        "motion": 0,
    }


def test_one_frame_and_tiny_frames_are_measured():
    assert measure(VIDEO[:1])["motion"] == 0
    assert sharpness(VIDEO[:, :2, :2]) == 0
    assert flicker(VIDEO[:2]) == 0
    assert motion_amount(VIDEO[:, :2]) == 0


@pytest.mark.parametrize("video", [VIDEO, NOISE], ids=["drawn", "noise"])
def test_blur_lowers_sharpness(video):
    assert sharpness(video) > sharpness(blurred(video)) > sharpness(blurred(blurred(video)))


def test_flicker_sees_brightness_that_jumps_but_no_fade():
    jumping = np.full((8, 16, 16, 3), 100, np.uint8)
    jumping[::2] += 10
    fading = (100 + 5 * np.arange(8, dtype=np.uint8))[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    assert flicker(jumping) == pytest.approx(20, rel=1e-3)
    assert flicker(fading) == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("speed", [0.25, 1.0, 2.0])
def test_motion_is_the_speed_in_pixels(speed):
    assert motion_amount(waves(speed)) == pytest.approx(speed, rel=0.1)


def test_faster_is_less_consistent():
    assert 1 > consistency(waves(1)) > consistency(waves(4)) > consistency(NOISE)


def test_equal_pictures_are_equal():
    assert psnr(VIDEO, VIDEO) == math.inf
    assert ssim(VIDEO[0], VIDEO[0]) == pytest.approx(1)
    assert first_frame_fidelity(VIDEO, VIDEO[0]) == {"first_frame_psnr": math.inf, "first_frame_ssim": pytest.approx(1)}


def test_psnr_is_its_formula_and_symmetric():
    brighter = VIDEO[0] // 2 + 5
    assert psnr(VIDEO[0] // 2, brighter) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(VIDEO[0], NOISE[0]) == psnr(NOISE[0], VIDEO[0])
    assert ssim(VIDEO[0], NOISE[0]) == pytest.approx(ssim(NOISE[0], VIDEO[0]))
    assert ssim(VIDEO[0], NOISE[0]) < 0.1


def test_ssim_of_flat_pictures_is_its_luminance_term():
    a, b = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 120, np.uint8)
    c1 = (0.01 * 255) ** 2
    assert ssim(a, b) == pytest.approx((2 * 100 * 120 + c1) / (100**2 + 120**2 + c1), rel=1e-4)


def test_more_damage_is_less_fidelity():
    values = [first_frame_fidelity(damaged, VIDEO[0]) for damaged in (blurred(VIDEO), blurred(blurred(VIDEO)), NOISE)]
    assert sorted(values, key=lambda v: -v["first_frame_psnr"]) == values
    assert sorted(values, key=lambda v: -v["first_frame_ssim"]) == values


def test_a_set_is_like_itself_and_less_like_others():
    videos = [render(random_scene(0, i), num_frames=5, height=32, width=48, fps=8) for i in range(24)]
    mine, same_world = ([features(v) for v in part] for part in (videos[:12], videos[12:]))
    assert similarity(mine, mine) == 1
    assert similarity(mine[::-1], mine) == pytest.approx(1)
    noisy = [features(NOISE)] * 3
    dark = [features(v // 4) for v in videos[:12]]
    assert similarity(same_world, mine) > similarity(dark, mine) > similarity(noisy, mine) > 0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="differ"):
        psnr(VIDEO[0], VIDEO[0, :8])
    with pytest.raises(ValueError, match="at least 11"):
        ssim(VIDEO[0, :8], VIDEO[0, :8])
    with pytest.raises(ValueError, match="must be uint8"):
        sharpness(VIDEO / 255)
