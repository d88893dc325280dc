"""A small world of moving shapes: clips with captions, drawn from a seed.

Shapes are signed distance functions (after Inigo Quilez, "2D distance functions"), so edges are anti-aliased at any
size. Lengths are in units of the picture's shorter side and time is in seconds, so a scene looks the same at any
resolution and frame rate. Ground and shapes carry a little shading, as things under a lamp do.

One attribute combination in ten is held out: `random_scene` draws training scenes without them unless asked for them.
The concepts of `CONCEPTS` never occur in `random_scene` at all; they are what a LoRA is to learn.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvideox_factory.draws import generator
from cogvideox_factory.tiny import captions
from cogvideox_factory.tiny.captions import vocabulary

__all__ = ["BACKGROUNDS", "COLOURS", "CONCEPTS", "MOTIONS", "SHAPES", "SIZES", "Scene", "Thing",
           "concept_scene", "is_held_out", "random_scene", "render", "vocabulary"]  # fmt: skip

COLOURS = {
    "red": (222, 52, 56), "green": (44, 164, 88), "blue": (46, 100, 222), "yellow": (246, 206, 54),
    "purple": (138, 70, 200), "orange": (242, 132, 36),
}  # fmt: skip
BACKGROUNDS = {"black": (20, 22, 28), "white": (240, 240, 236), "grey": (124, 127, 133), "brown": (94, 66, 48)}
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.18, "large": 0.27}
"""Radius in shorter sides; of what grows or shrinks, the radius in mid-clip."""
MOTIONS = ("left", "right", "up", "down", "grow", "shrink")
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
RESERVED_COLOURS = {"pink": (244, 122, 184)}
CONCEPTS = ("sks", "bounce")
"""sks: a pink star, called "sks star"; bounce: a known shape that falls to the floor and springs back."""

TRAVEL = 0.34
"""Shorter sides a thing covers in a clip that leaves it the time."""
SPEED = 1.0
"""Shorter sides a second, at most: in a shorter clip a thing gets less far."""
GROWTH = 1.5
"""Radius at the end of a whole growth divided by that in its middle."""
LANE = 0.25
"""Distance of each of two paths from the centre line."""
_ALL_COLOURS = COLOURS | RESERVED_COLOURS


@dataclass(frozen=True, kw_only=True, slots=True)
class Thing:
    """One shape and what it does."""

    shape: str
    colour: str
    size: str
    motion: str
    offset: float = 0.0
    """Where its path lies off the centre line, in shorter sides: down for what moves sideways, else right."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One or two things before a background. Of two, the upper or left one comes first."""

    things: tuple[Thing, ...]
    background: str
    wording: int = 0
    """Which of the possible sentences describes it; 0 is the plainest."""

    @property
    def caption(self) -> str:
        """Return the sentence that describes the clip."""
        spoken = [(thing.size, thing.colour, thing.shape, thing.motion) for thing in self.things]
        return captions.describe(spoken, self.background, self.wording)


def random_scene(
    seed: int, index: int, *, split: Literal["train", "held_out"] = "train", num_things: int | None = None
) -> Scene:
    """Return scene number `index` of the world with this seed.

    Args:
        seed: of the world.
        index: of the scene; each is drawn independently of the others.
        split: "held_out" gives scenes of combinations (see `is_held_out`) that "train" never holds.
        num_things: 1 or 2; by default one scene in six holds two things (held-out scenes: always one).
    """
    draw = generator(seed, "scene", split, index)
    count = num_things or (2 if split == "train" and draw.random() < 1 / 6 else 1)
    assert count in (1, 2), num_things
    while True:
        scene = _draw_pair(draw) if count == 2 else _draw_one(draw)
        if is_held_out(scene) == (split == "held_out"):
            return scene


def concept_scene(seed: int, index: int, concept: str) -> Scene:
    """Return scene number `index` that shows a new concept, one of `CONCEPTS`."""
    assert concept in CONCEPTS, concept
    draw = generator(seed, "concept", concept, index)
    changes = {"shape": "star", "colour": "pink"} if concept == "sks" else {"motion": "bounce"}
    thing = _draw_thing(draw, MOTIONS[:4] if concept == "sks" else ("bounce",), changes)
    return Scene(things=(thing,), background=_choose(draw, BACKGROUNDS), wording=_draw_wording(draw))


def is_held_out(scene: Scene) -> bool:
    """Tell whether a thing of `scene` has a (shape, colour, motion, background) that training never shows."""
    combinations = [(thing.shape, thing.colour, thing.motion, scene.background) for thing in scene.things]
    return any(generator(0, "held out", *combination).random() < 0.1 for combination in combinations)


def _choose(draw: np.random.Generator, choices) -> str:
    return str(draw.choice(list(choices)))


def _draw_wording(draw: np.random.Generator) -> int:
    return 0 if draw.random() < 0.3 else int(draw.integers(2**30))


def _draw_thing(draw: np.random.Generator, motions: tuple[str, ...], changes: dict[str, str] | None = None) -> Thing:
    values = {
        "shape": _choose(draw, SHAPES),
        "colour": _choose(draw, COLOURS),
        "size": _choose(draw, SIZES),
        "motion": _choose(draw, motions),
    }
    room = 0.08 if values["motion"] in MOTIONS[4:] else 0.18  # what grows must not leave the picture
    return Thing(**values | (changes or {}), offset=float(draw.uniform(-room, room)))


def _draw_one(draw: np.random.Generator) -> Scene:
    motions = MOTIONS[4:] if draw.random() < 0.2 else MOTIONS[:4]
    thing = _draw_thing(draw, motions)
    return Scene(things=(thing,), background=_choose(draw, BACKGROUNDS), wording=_draw_wording(draw))


def _draw_pair(draw: np.random.Generator) -> Scene:
    """Two colours, two lanes: sideways one above the other, or up and down side by side."""
    motions = MOTIONS[:2] if draw.random() < 0.5 else MOTIONS[2:4]
    colours = draw.choice(list(COLOURS), 2, replace=False)
    first, second = (
        Thing(
            shape=_choose(draw, SHAPES), colour=str(colour), size="small", motion=_choose(draw, motions),
            offset=float(lane + draw.uniform(-0.015, 0.015)),
        )
        for colour, lane in zip(colours, (-LANE, LANE))
    )  # fmt: skip
    return Scene(things=(first, second), background=_choose(draw, BACKGROUNDS), wording=_draw_wording(draw))


def render(scene: Scene, *, num_frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """Draw `scene` as uint8 [num_frames, height, width, 3].

    A motion fills the clip and is centred in it: `TRAVEL` shorter sides, or what `SPEED` allows in a clip shorter
    than about a third of a second.
    """
    unit = min(height, width)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    y, x = (rows - height / 2) / unit, (columns - width / 2) / unit
    light = (1.05 - 0.10 * rows / height)[..., None]
    ground = np.array(BACKGROUNDS[scene.background], np.float32) * light
    seconds = (num_frames - 1) / fps
    reach = min(1.0, SPEED * seconds / TRAVEL)
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index in range(num_frames):
        progress = index / max(num_frames - 1, 1) - 0.5
        picture = ground
        for thing in scene.things:
            (centre_y, centre_x), radius = _pose(thing, progress, reach)
            v, u = y - centre_y, x - centre_x
            cover = np.clip(0.5 - distance(thing.shape, v, u, radius) * unit, 0, 1)[..., None]
            sheen = 1 - 0.10 * np.clip((u + v) / radius, -1.2, 1.2)[..., None]
            picture = picture + cover * (np.array(_ALL_COLOURS[thing.colour], np.float32) * sheen - picture)
        frames[index] = np.rint(picture.clip(0, 255))
    return frames


def _pose(thing: Thing, progress: float, reach: float) -> tuple[tuple[float, float], float]:
    """Return (centre (y, x) from the picture's centre, radius) at `progress` in [-0.5, 0.5]."""
    radius = SIZES[thing.size]
    if thing.motion in DIRECTIONS:
        along = TRAVEL * reach * progress
        direction = DIRECTIONS[thing.motion]
        sideways = direction[0] == 0
        return ((thing.offset, along * direction[1]) if sideways else (along * direction[0], thing.offset)), radius
    if thing.motion == "bounce":  # free fall, and its mirror image
        fallen = (1 - 2 * abs(progress)) ** 2
        return (TRAVEL * reach * (fallen - 0.5), thing.offset), radius
    exponent = 2 * progress * reach * (1 if thing.motion == "grow" else -1)
    return (0.0, thing.offset), radius * GROWTH**exponent


def distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance to the edge of a shape at the origin, negative inside; all in one unit.

    Shapes of one radius look about equally large, but for the square: one of the circle's area would differ from it, in
    latents eight pixels wide, by a quarter of what other shapes differ by.
    """
    match shape:
        case "circle":
            return np.hypot(y, x) - radius
        case "square":
            return np.maximum(abs(y), abs(x)) - 1.05 * radius
        case "triangle":
            return np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.62 * radius
        case "ring":
            return abs(np.hypot(y, x) - 0.79 * radius) - 0.26 * radius
        case "star":
            return _star(y, x, 1.25 * radius)
    raise AssertionError(shape)


def _star(y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Five points, one up: the plane folded onto one half point, then the distance to its one edge."""
    angle = np.arctan2(x, -y)
    sector = 2 * np.pi / 5
    angle = abs(angle - sector * np.rint(angle / sector))
    length = np.hypot(y, x)
    v, u = length * np.cos(angle), length * np.sin(angle)
    inner = 0.45 * radius
    tip, notch = np.array([radius, 0.0]), inner * np.array([np.cos(sector / 2), np.sin(sector / 2)])
    edge = notch - tip
    return ((v - tip[0]) * -edge[1] + (u - tip[1]) * edge[0]) * -1 / np.hypot(*edge)
