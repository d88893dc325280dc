"""The judge is right about what the world draws, degraded or not, and sees nothing where there is nothing."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.evaluate import read_video
from cogvideox_factory.tiny.judge import ATTRIBUTES, detect, parse_caption, score
from cogvideox_factory.tiny.world import Scene, concept_scene, random_scene, render

SIZES = ((64, 64), (64, 96))


def draw(scene: Scene, index: int = 1) -> np.ndarray:
    height, width = SIZES[index % 2]
    return render(scene, num_frames=9, height=height, width=width, fps=8)


def blur(video: np.ndarray, sigma: float) -> np.ndarray:
    taps = np.exp(-(np.arange(-5, 6) ** 2) / (2 * sigma**2))
    values = video.astype(np.float32)
    for axis in (1, 2):
        size = values.shape[axis]
        padded = np.moveaxis(np.pad(values, [(5, 5) if a == axis else (0, 0) for a in range(4)], mode="edge"), axis, 0)
        values = np.moveaxis(sum(t * padded[i : i + size] for i, t in enumerate(taps / taps.sum())), 0, axis)
    return np.rint(values).astype(np.uint8)


def noise(video: np.ndarray, sigma: float = 12.0) -> np.ndarray:
    draws = np.random.default_rng(0).normal(0, sigma, video.shape)
    return np.rint((video + draws).clip(0, 255)).astype(np.uint8)


def shrink(video: np.ndarray) -> np.ndarray:
    f, h, w, _ = video.shape
    small = video.reshape(f, h // 2, 2, w // 2, 2, 3).mean(axis=(2, 4))
    return small.repeat(2, 1).repeat(2, 2).astype(np.uint8)


DAMAGES = {
    "clean": lambda video: video,
    "blur": lambda video: blur(video, 1.5),
    "noise": noise,
    "half size": shrink,
    "blur and noise": lambda video: noise(blur(video, 1.0)),
    "faded": lambda video: (video * 0.85 + 20).astype(np.uint8),
}


def accuracy(scenes: list[Scene], damage) -> dict[str, float]:
    right = Counter()
    for index, scene in enumerate(scenes):
        verdict = score(damage(draw(scene, index)), scene)
        right.update(name for name in ATTRIBUTES if verdict[name])
    return {name: right[name] / len(scenes) for name in ATTRIBUTES}


SCENES = [random_scene(11, index, num_things=1) for index in range(60)]
OTHERS = [
    *(random_scene(11, index, num_things=2) for index in range(12)),
    *(concept_scene(11, index, "sks") for index in range(8)),
    *(concept_scene(11, index, "bounce") for index in range(8)),
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_attribute_is_judged_right(damage):
    at_least = 0.99 if damage == "clean" else 0.97
    count = 60 if damage == "clean" else 20
    assert min(accuracy(SCENES[:count], DAMAGES[damage]).values()) >= at_least
    assert min(accuracy(OTHERS[:: 1 if damage == "clean" else 3], DAMAGES[damage]).values()) >= at_least


def test_a_coded_file_is_judged_like_the_drawing(tmp_path):
    def code(video):
        return read_video(export_to_video(video, tmp_path / "clip.mp4", fps=8))

    assert min(accuracy(SCENES[:10] + OTHERS[::4], code).values()) >= 0.97


def test_larger_and_longer_videos_are_judged_too():
    for scene in SCENES[:3]:
        assert all(score(render(scene, num_frames=33, height=240, width=360, fps=16), scene).values())


@pytest.mark.parametrize("kind", ["uniform", "smooth", "flicker"])
def test_noise_scores_nothing(kind):
    draws = np.random.default_rng(1)
    for scene in SCENES[:15]:
        if kind == "uniform":
            video = draws.integers(0, 256, (9, 64, 96, 3), dtype=np.uint8)
        elif kind == "smooth":
            video = draws.integers(0, 256, (9, 8, 12, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
            video = blur(video, 3.0)
        else:
            video = draws.integers(0, 256, (9, 1, 1, 3), dtype=np.uint8).repeat(64, 1).repeat(96, 2)
        verdict = score(video, scene)
        assert not any(verdict[name] for name in ("colour", "shape", "motion", "size")), verdict


def test_a_blank_video_has_a_background_and_nothing_else():
    for scene in SCENES[:12]:
        blank = np.broadcast_to(draw(scene)[0, :1, :1], (9, 64, 96, 3)).copy()
        verdict = score(noise(blank, 3), scene)
        assert [name for name in ATTRIBUTES if verdict[name]] == ["background"]


def test_a_wrong_video_is_wrong_where_it_differs():
    scenes = SCENES[:40]
    for scene, other in pairwise(scenes):
        verdict = score(draw(scene), other)
        (shown,), (asked,) = scene.things, other.things
        for name in ("colour", "shape", "motion", "size"):
            assert verdict[name] == (getattr(shown, name) == getattr(asked, name)), (name, scene, other)
        assert verdict["background"] == (scene.background == other.background)


def test_a_still_thing_is_still_and_an_extra_thing_is_counted():
    still = draw(SCENES[0])[4:5].repeat(9, 0)
    assert detect(still).things[0].motion == "still"
    assert not score(still, SCENES[0])["motion"]
    two = OTHERS[0]
    first = replace(two, things=two.things[:1])
    verdict = score(draw(two), first)
    assert not verdict["count"]
    assert verdict["colour"]
    lonely = score(draw(first), two)
    assert not lonely["count"]
    assert not lonely["colour"]


def test_played_backwards_the_direction_turns():
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up", "grow": "shrink", "shrink": "grow"}
    for scene in SCENES[:10]:
        assert detect(draw(scene)[::-1]).things[0].motion == opposite[scene.things[0].motion]


def test_captions_come_back_as_scenes():
    for scene in [*SCENES, *OTHERS]:
        things = tuple(replace(thing, offset=0.0) for thing in scene.things)
        assert parse_caption(scene.caption) == replace(scene, things=things, wording=0)
    assert score(draw(SCENES[0]), SCENES[0].caption) == score(draw(SCENES[0]), SCENES[0])


@pytest.mark.parametrize("video", [np.zeros((9, 64, 64, 3)), np.zeros((64, 64, 3), np.uint8)])
def test_other_arrays_are_refused(video):
    with pytest.raises(ValueError, match="must be uint8"):
        detect(video)
