from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.tiny import captions
from cogvideox_factory.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    CONCEPTS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    Thing,
    concept_scene,
    distance,
    is_held_out,
    random_scene,
    render,
)

SCENES = [random_scene(0, index) for index in range(600)]


def attributes(name: str) -> set[str]:
    return {getattr(thing, name) for scene in SCENES for thing in scene.things}


def test_scenes_are_a_function_of_seed_and_index():
    assert random_scene(3, 5) == random_scene(3, 5)
    assert len({random_scene(seed, index) for seed in range(4) for index in range(10)}) == 40


def test_training_scenes_show_everything_but_the_concepts():
    assert attributes("shape") == set(SHAPES)
    assert attributes("colour") == set(COLOURS)
    assert attributes("motion") == set(MOTIONS)
    assert attributes("size") == set(SIZES)
    assert {scene.background for scene in SCENES} == set(BACKGROUNDS)
    assert 60 < sum(len(scene.things) == 2 for scene in SCENES) < 140
    words = {word for scene in SCENES for word in scene.caption.split()}
    assert not words & {"sks", "star", "pink", "bounces"}


def test_held_out_combinations_never_occur_in_training():
    held_out = [random_scene(0, index, split="held_out") for index in range(64)]
    assert all(is_held_out(scene) and len(scene.things) == 1 for scene in held_out)
    assert not any(is_held_out(scene) for scene in SCENES)
    combinations = [
        Scene(things=(Thing(shape=s, colour=c, size="small", motion=m),), background=b)
        for s in SHAPES
        for c in COLOURS
        for m in MOTIONS
        for b in BACKGROUNDS
    ]
    assert 0.07 < np.mean([is_held_out(scene) for scene in combinations]) < 0.13


@pytest.mark.parametrize("concept", CONCEPTS)
def test_concepts_show_what_training_never_does(concept):
    for index in range(20):
        (thing,) = concept_scene(0, index, concept).things
        if concept == "sks":
            assert (thing.colour, thing.shape) == ("pink", "star")
            assert "sks star" in concept_scene(0, index, concept).caption
        else:
            assert thing.motion == "bounce"
            assert thing.shape in SHAPES


def test_tables_agree_with_the_language():
    assert set(COLOURS) | {"pink"} == set(captions.COLOUR_WORDS)
    assert set(SHAPES) | {"star"} == set(captions.SHAPE_WORDS)
    assert set(MOTIONS) | {"bounce"} == set(captions.VERBS)
    assert set(SIZES) == set(captions.SIZE_WORDS)
    assert set(BACKGROUNDS) == set(captions.BACKGROUND_WORDS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 500), st.integers(1, 12), st.integers(16, 80), st.integers(16, 80), st.sampled_from([4, 8, 30]))
def test_any_size_frame_count_and_rate_can_be_drawn(index, num_frames, height, width, fps):
    scene = random_scene(1, index)
    frames = render(scene, num_frames=num_frames, height=height, width=width, fps=fps)
    assert (frames.shape, frames.dtype) == ((num_frames, height, width, 3), np.uint8)
    again = render(scene, num_frames=num_frames, height=height, width=width, fps=fps)
    np.testing.assert_array_equal(frames, again)


def test_a_scene_looks_the_same_at_any_resolution():
    for scene in SCENES[:12]:
        small = render(scene, num_frames=3, height=48, width=64, fps=4)
        large = render(scene, num_frames=3, height=192, width=256, fps=4).astype(float)
        shrunk = large.reshape(3, 48, 4, 64, 4, 3).mean(axis=(2, 4))
        # Anti-aliasing is the mean over a pixel, except where a corner lies within it.
        assert abs(shrunk - small).mean() < 0.5


def test_a_clip_played_backwards_is_the_opposite_motion():
    for motion, opposite in (("left", "right"), ("up", "down"), ("grow", "shrink"), ("bounce", "bounce")):
        first, second = (
            Scene(things=(Thing(shape="ring", colour="red", size="large", motion=m, offset=0.1),), background="black")
            for m in (motion, opposite)
        )
        ask = {"num_frames": 9, "height": 64, "width": 96, "fps": 8}
        np.testing.assert_array_equal(render(first, **ask)[::-1], render(second, **ask))


@pytest.mark.parametrize(("one", "other"), combinations([*SHAPES, "star"], 2))
def test_no_two_shapes_are_nearly_the_same(one, other):
    """What one covers and the other does not is a quarter of a circle or more, so that a small model can tell them."""
    y, x = np.mgrid[-2:2:400j, -2:2:400j]
    apart = (distance(one, y, x, 1.0) < 0) ^ (distance(other, y, x, 1.0) < 0)
    assert apart.mean() * 16 > np.pi / 4


@pytest.mark.parametrize("shape", [*SHAPES, "star"])
def test_distances_are_negative_inside_and_shapes_are_alike_in_size(shape):
    y, x = np.mgrid[-2:2:400j, -2:2:400j]
    field = distance(shape, y, x, 1.0)
    area = (field < 0).mean() * 16
    assert 1.9 < area < 4.5
    assert field.max() > 0
    slope = np.hypot(*np.gradient(field, 4 / 399))
    assert np.quantile(slope, 0.98) < 1.02, "a distance never grows faster than the way"
    wide = distance(shape, 3 * y, 3 * x, 3.0)
    np.testing.assert_allclose(wide, 3 * field, atol=1e-9)
