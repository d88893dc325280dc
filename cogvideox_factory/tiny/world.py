"""A small world of moving shapes: clips with captions, drawn from a seed.

Shapes are signed distance functions, so edges are anti-aliased at any size; positions are in units of the picture's
shorter side and seconds, so a scene looks the same at any resolution and frame rate.
"""

from dataclasses import dataclass

import numpy as np

from cogvideox_factory.draws import generator

COLOURS = {
    "red": (214, 48, 49), "green": (39, 158, 84), "blue": (41, 98, 214), "yellow": (240, 200, 40),
    "purple": (132, 66, 190), "orange": (236, 126, 36),
}  # fmt: skip
BACKGROUNDS = {
    "black": (16, 16, 20),
    "white": (238, 238, 234),
    "grey": (122, 124, 128),
    "brown": (92, 62, 44),
}
DIRECTIONS = {"left": (0.0, -1.0), "right": (0.0, 1.0), "up": (-1.0, 0.0), "down": (1.0, 0.0)}
SHAPES = ("circle", "square", "triangle", "ring")
SIZES = {"small": 0.13, "large": 0.22}


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """One shape that crosses the picture."""

    shape: str
    colour: str
    background: str
    direction: str
    size: str
    offset: float
    """Distance of its path from the centre line, in shorter sides."""

    @property
    def caption(self) -> str:
        """Return the sentence that describes the clip."""
        return f"a {self.size} {self.colour} {self.shape} moves {self.direction} on a {self.background} background"


def random_scene(seed: int, index: int) -> Scene:
    """Return scene number `index` of the world with this seed."""
    draw = generator(seed, "scene", index)
    return Scene(
        shape=str(draw.choice(SHAPES)),
        colour=str(draw.choice(list(COLOURS))),
        background=str(draw.choice(list(BACKGROUNDS))),
        direction=str(draw.choice(list(DIRECTIONS))),
        size=str(draw.choice(list(SIZES))),
        offset=float(draw.uniform(-0.15, 0.15)),
    )


def render(scene: Scene, *, num_frames: int, height: int, width: int, fps: float) -> np.ndarray:
    """Draw `scene` as uint8 [num_frames, height, width, 3].

    The shape covers 0.6 shorter sides in the clip, centred in time, whatever its length; `fps` only sets how far
    apart the frames lie when the clip is longer than a second.
    """
    unit = min(height, width)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32) + 0.5
    seconds = np.arange(num_frames) / fps
    progress = seconds / max(seconds[-1], 1 / fps) - 0.5
    along = np.array(DIRECTIONS[scene.direction])
    across = along[::-1]
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index, step in enumerate(progress):
        centre = np.array([height, width]) / 2 + unit * (0.6 * step * along + scene.offset * across)
        distance = _distance(scene.shape, (rows - centre[0]) / unit, (columns - centre[1]) / unit, SIZES[scene.size])
        cover = np.clip(0.5 - distance * unit, 0, 1)[..., None]
        colour, background = np.array(COLOURS[scene.colour]), np.array(BACKGROUNDS[scene.background])
        frames[index] = np.rint(background + cover * (colour - background))
    return frames


def _distance(shape: str, y: np.ndarray, x: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance to the edge, negative inside."""
    match shape:
        case "circle":
            return np.hypot(y, x) - radius
        case "square":
            return np.maximum(abs(y), abs(x)) - 0.85 * radius
        case "triangle":
            return np.maximum(0.866 * abs(x) - 0.5 * y, y) - 0.55 * radius
        case "ring":
            return abs(np.hypot(y, x) - 0.8 * radius) - 0.25 * radius
    raise AssertionError(shape)
