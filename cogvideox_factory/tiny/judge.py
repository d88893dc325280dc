"""The judge of the tiny world: what does a video show, and is it what the prompt asked for?

It knows nothing of how a video was made, so it judges renders, decoded files and generated clips alike. It works by
un-mixing: every pixel is background plus a share of one palette colour, and those shares, summed, give place, area
and outline that survive blur, noise and lossy coding. A video without a plain background or a clear outline gets
None, which no prompt asks for, so noise and emptiness score nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from cogvideox_factory.tiny import captions
from cogvideox_factory.tiny.world import (
    BACKGROUNDS,
    COLOURS,
    RESERVED_COLOURS,
    SHAPES,
    SIZES,
    TRAVEL,
    Scene,
    Thing,
    distance,
)

PALETTE = COLOURS | RESERVED_COLOURS
ATTRIBUTES = ("colour", "shape", "motion", "background", "size", "count")
_SHAPES = (*SHAPES, "star")
_AREA = {"circle": np.pi, "square": 4 * 1.05**2, "triangle": 3 * 3**0.5 * 0.62**2,
         "ring": np.pi * 4 * 0.79 * 0.26, "star": 5 * 1.25**2 * 0.45 * np.sin(np.pi / 5)}  # fmt: skip
"""Area of each shape of radius 1, as `world.distance` draws it."""
_SIZE_LIMIT = float(np.sqrt(SIZES["small"] * SIZES["large"]))
_WORKING_SIDE = 96
"""Larger pictures are averaged down to about this many pixels on the shorter side."""
_MAX_FRAMES = 17
_FAINT = 0.15
"""Smaller shares of a colour are taken for noise."""
_GRID = np.linspace(-1.2, 1.2, 41)
"""Where outlines are compared: from the centre, in units of the square root of the area."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A thing seen in a video; an attribute that cannot be told is None."""

    colour: str
    shape: str | None
    motion: str | None
    size: str
    fit: float
    """How well the outline fits the shape (soft intersection over union, 0 to 1)."""
    track: np.ndarray
    """Centre (y, x) in shorter sides and radius, for each frame it is seen in, float64 [frames, 3]."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What a video shows: the background and up to two things, the most visible first."""

    background: str | None
    things: tuple[Sighting, ...]


def parse_caption(text: str) -> Scene:
    """Return the scene a caption describes, with paths on the centre line and the plainest wording.

    Raises:
        FactoryError: it is no sentence of the tiny world.
    """
    things, background = captions.understand(text)
    made = (Thing(size=size, colour=colour, shape=shape, motion=motion) for size, colour, shape, motion in things)
    return Scene(things=tuple(made), background=background)


def score(video: np.ndarray, wanted: Scene | str) -> dict[str, bool]:
    """Tell for each of `ATTRIBUTES` whether `video` (uint8 [F, H, W, 3]) shows what `wanted` says.

    With two things an attribute is right when it is right for both. A thing that was not asked for makes `count`
    wrong, nothing else.
    """
    scene = parse_caption(wanted) if isinstance(wanted, str) else wanted
    seen = detect(video)
    pairs = _match(scene.things, seen.things)
    verdict = {
        name: all(s is not None and getattr(s, name) == getattr(t, name) for t, s in pairs)
        for name in ("colour", "shape", "motion", "size")
    }
    verdict |= {"background": seen.background == scene.background, "count": len(seen.things) == len(scene.things)}
    return {name: verdict[name] for name in ATTRIBUTES}


def detect(video: np.ndarray) -> Verdict:
    """Say what `video` (uint8 [F, H, W, 3]) shows.

    Raises:
        ValueError: another shape or dtype.
    """
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"video is {video.dtype} {list(video.shape)}; it must be uint8 [frames, height, width, 3].")
    pixels, unit = _working_copy(video)
    smooth = _smooth(pixels)
    background = _background(pixels, smooth)
    if background is None:
        return Verdict(background=None, things=())
    name, ground = background
    shares = _unmix(pixels - ground, smooth - ground, ground)
    things = (_look(colour, share, unit) for colour, share in shares.items())
    return Verdict(background=name, things=tuple(thing for thing in things if thing is not None))


def _match(wanted: Sequence[Thing], seen: Sequence[Sighting]) -> list[tuple[Thing, Sighting | None]]:
    """Pair each wanted thing with the sighting of its colour, else with one that is left."""
    left = list(seen)
    pairs: list[tuple[Thing, Sighting | None]] = []
    for thing in wanted:
        found = next((s for s in left if s.colour == thing.colour), None)
        if found is None and len(wanted) == 1 and left:
            found = left[0]
        if found is not None:
            left.remove(found)
        pairs.append((thing, found))
    spare = iter(left)
    return [(thing, found if found is not None else next(spare, None)) for thing, found in pairs]


def _working_copy(video: np.ndarray) -> tuple[np.ndarray, int]:
    """Return (float32 [f, h, w, 3] of moderate size, its shorter side)."""
    if len(video) > _MAX_FRAMES:
        video = video[np.linspace(0, len(video) - 1, _MAX_FRAMES).round().astype(int)]
    frames, height, width, _ = video.shape
    factor = max(1, round(min(height, width) / _WORKING_SIDE))
    rows, columns = height // factor, width // factor
    cut = video[:, : rows * factor, : columns * factor].astype(np.float32)
    pixels = cut.reshape(frames, rows, factor, columns, factor, 3).mean(axis=(2, 4))  # [f, h, w, 3]
    return pixels, min(rows, columns)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Blur [f, h, w, 3] by the binomial filter [1 2 1]/4 along height and width."""
    padded = np.pad(values, ((0, 0), (1, 1), (0, 0), (0, 0)), mode="edge")
    values = (padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]) / 4
    padded = np.pad(values, ((0, 0), (0, 0), (1, 1), (0, 0)), mode="edge")
    return (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4


def _background(pixels: np.ndarray, smooth: np.ndarray) -> tuple[str, np.ndarray] | None:
    """Return (name, colour of each row [h, 1, 3]) of the background, or None where there is no plain one."""
    if np.sqrt(np.mean((pixels - smooth) ** 2)) > 25:  # noise throughout: nothing is plain here
        return None
    height = pixels.shape[1]
    edge = max(1, min(pixels.shape[1:3]) // 16)
    sides = np.concatenate([smooth[:, :, :edge], smooth[:, :, -edge:]], axis=2)  # [f, h, 2*edge, 3]
    row_colour = np.median(sides, axis=(0, 2))  # [h, 3]
    line = np.polynomial.polynomial.polyfit(np.arange(height), row_colour, 1)  # the light falls off evenly
    ground = np.polynomial.polynomial.polyval(np.arange(height), line).T[:, None].astype(np.float32)  # [h, 1, 3]
    plain = np.linalg.norm(smooth - ground, axis=-1) < 30
    known = np.array(list(BACKGROUNDS.values()), np.float32)
    gaps = np.linalg.norm(known - ground.mean(axis=(0, 1)), axis=1)
    if plain.mean() < 0.5 or gaps.min() > 50:
        return None
    return list(BACKGROUNDS)[int(gaps.argmin())], ground


def _unmix(raw: np.ndarray, smooth: np.ndarray, ground: np.ndarray) -> dict[str, np.ndarray]:
    """Return the share [f, h, w] of each colour present in every pixel, at most two, the most present first.

    `raw` and `smooth` are the differences from `ground` [f, h, w, 3], as they are and blurred.
    """
    names = list(PALETTE)
    toward = np.array(list(PALETTE.values()), np.float32) - ground.mean(axis=(0, 1))  # [c, 3]
    length = np.linalg.norm(toward, axis=1)
    strength = np.linalg.norm(smooth, axis=-1)
    spots = strength > 0.45 * length.min()
    vectors, weights = smooth[spots], strength[spots]  # [n, 3], [n]
    if len(vectors) < 4:
        return {}
    fit = vectors @ toward.T / length**2  # share of each colour that comes nearest, [n, c]
    fit = fit.clip(0, 1.15)
    miss = np.linalg.norm(vectors[:, None] - fit[..., None] * toward, axis=-1) + 0.2 * length * abs(1 - fit)
    nearest = miss.argmin(axis=1)
    # Pixels on an edge mix three colours and vote weakly; the middle of a thing votes for what it is.
    sure = (fit[np.arange(len(fit)), nearest] > 0.5) & (miss.min(axis=1) < 60)
    votes = np.bincount(nearest[sure], weights=weights[sure], minlength=len(names))
    order = np.argsort(-votes)
    present = [c for c in order[:2] if votes[c] > max(0.12 * votes.sum(), 1e-6)]
    every = (smooth @ toward[present].T) / length[present] ** 2  # [f, h, w, p]
    missed = np.linalg.norm(smooth[..., None, :] - every.clip(0, 1.15)[..., None] * toward[present], axis=-1)
    owner = _divide(missed, every.max(axis=-1).clip(0, 1)) if len(present) == 2 else np.zeros(raw.shape[:3], int)
    shares: dict[str, np.ndarray] = {}
    for index, c in enumerate(present):
        share = raw @ toward[c] / length[c] ** 2
        shares[names[c]] = np.where((owner == index) & (every[..., index] > _FAINT), share, 0).clip(0, 1)
    return shares


def _divide(missed: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Return which of two colours owns each pixel, int [f, h, w], by nearness to the middle of what is surely its own.

    Colours alone do not tell: the shaded side of a yellow thing before white looks orange.

    Args:
        missed: how far each pixel is from a mix with each colour, [f, h, w, 2].
        mass: how much each pixel differs from the background, [f, h, w].
    """
    rows, columns = np.mgrid[0 : mass.shape[1], 0 : mass.shape[2]] + 0.5
    heavy = np.where(mass > 0.4, mass, 0)
    lead = missed[..., 1] - missed[..., 0]
    weights = [heavy * (sign * lead).clip(0, None) ** 2 for sign in (1, -1)]
    owner = np.zeros(mass.shape, int)
    for _ in range(4):
        gaps = []
        for weight in weights:
            total = weight.sum(axis=(1, 2), keepdims=True) + 1e-9
            y, x = ((weight * axis).sum(axis=(1, 2), keepdims=True) / total for axis in (rows, columns))
            gaps.append(np.hypot(rows - y, columns - x))
        owner = (gaps[1] < gaps[0]).astype(int)
        weights = [heavy * (owner == index) for index in (0, 1)]
    return owner


def _look(colour: str, share: np.ndarray, unit: int) -> Sighting | None:
    """Follow one colour's `share` [f, h, w] through the clip; None when there is too little of it."""
    share = _largest_lump(share)
    area = share.sum(axis=(1, 2))
    visible = area > max(0.25 * np.median(area), 0.004 * unit**2)
    if visible.mean() < 0.6:
        return None
    moments = np.flatnonzero(visible)
    share, area = share[moments], area[moments]
    rows, columns = np.mgrid[0 : share.shape[1], 0 : share.shape[2]] + 0.5
    centres = np.stack([(share * axis).sum(axis=(1, 2)) / area for axis in (rows, columns)], axis=1)  # [f, 2]
    shape, fit = _outline(share, centres, area)
    radius = np.sqrt(area / _AREA[shape or "circle"])
    track = np.concatenate([centres, radius[:, None]], axis=1) / unit
    size = "small" if np.median(track[:, 2]) < _SIZE_LIMIT else "large"
    motion = _motion(moments / max(len(visible) - 1, 1), track)
    return Sighting(colour=colour, shape=shape, motion=motion, size=size, fit=fit, track=track)


def _largest_lump(share: np.ndarray) -> np.ndarray:
    """Drop what lies far from the middle of the mass of each frame: stray pixels are not part of the thing."""
    rows, columns = np.mgrid[0 : share.shape[1], 0 : share.shape[2]] + 0.5
    for _ in range(2):
        mass = share.sum(axis=(1, 2), keepdims=True) + 1e-6
        y, x = ((share * axis).sum(axis=(1, 2), keepdims=True) / mass for axis in (rows, columns))
        reach = np.sqrt(mass / 1.2) * 1.6 + 2
        share = np.where(np.hypot(rows - y, columns - x) < reach, share, 0)
    return share


def _outline(share: np.ndarray, centres: np.ndarray, area: np.ndarray) -> tuple[str | None, float]:
    """Return the shape whose drawing fits best and its soft intersection over union.

    All frames are brought to one place and size and averaged, which leaves the outline and little of the noise.
    """
    border = np.concatenate([share[:, [0, -1]].max(axis=1), share[:, :, [0, -1]].max(axis=2)], axis=1).max(axis=1)
    whole = np.flatnonzero(border < 0.3)
    chosen = whole if len(whole) else np.arange(len(share))
    seen = np.mean([_sample(share[i], centres[i], float(np.sqrt(area[i]))) for i in chosen], axis=0)  # [g, g]
    seen = seen / max(1.0, float(np.quantile(seen[seen > _FAINT], 0.8))) if (seen > _FAINT).any() else seen
    drawn = _drawings()
    overlap = np.minimum(drawn, seen).sum(axis=(-1, -2)) / (np.maximum(drawn, seen).sum(axis=(-1, -2)) + 1e-6)
    fits = overlap.max(axis=1)  # [shape]
    best = int(fits.argmax())
    return (_SHAPES[best] if fits[best] > 0.6 else None), float(fits[best])


def _sample(share: np.ndarray, centre: np.ndarray, length: float) -> np.ndarray:
    """Read `share` [h, w] on `_GRID` around `centre`, in units of `length` pixels, bilinearly: [g, g]."""
    padded = np.pad(share, 1)
    places, parts = [], []
    for middle, size in zip(centre, share.shape):
        place = (middle + _GRID * length + 0.5).clip(0, size + 0.999)  # +1 for the padding, -0.5 to pixel centres
        places.append(place.astype(int))
        parts.append(place - places[-1])
    (y, x), (v, u) = places, (parts[0][:, None], parts[1])
    top = padded[y][:, x] * (1 - u) + padded[y][:, x + 1] * u
    bottom = padded[y + 1][:, x] * (1 - u) + padded[y + 1][:, x + 1] * u
    return top * (1 - v) + bottom * v


@cache
def _drawings() -> np.ndarray:
    """Return every shape in a few scales and blurs, all of area about 1, on `_GRID`: [shape, drawing, g, g]."""
    y, x = np.meshgrid(_GRID, _GRID, indexing="ij")
    step = _GRID[1] - _GRID[0]
    drawings = []
    for shape in _SHAPES:
        for scale in (0.92, 1.0, 1.08, 1.16):
            sharp = np.clip(0.5 - distance(shape, y, x, scale * _AREA[shape] ** -0.5) / step, 0, 1)
            for sigma in (0.04, 0.08, 0.12, 0.16):
                near = np.exp(-((_GRID[:, None] - _GRID) ** 2) / (2 * sigma**2))
                near /= near.sum(axis=1, keepdims=True)
                soft = near @ sharp @ near.T
                drawings.append(np.where(soft > _FAINT, soft, 0))
    return np.stack(drawings).reshape(len(_SHAPES), -1, len(_GRID), len(_GRID))


def _motion(moments: np.ndarray, track: np.ndarray) -> str | None:
    """Name the motion of a `track` seen at `moments` in [0, 1]; "still" is one, a muddle is None."""
    if len(track) < 2:
        return "still"
    t = moments - 0.5
    y, x, size = track[:, 0], track[:, 1], np.log(track[:, 2])
    spread = float((t * t).sum()) + 1e-9
    dy, dx, growth = (float((t * (v - v.mean())).sum()) / spread for v in (y, x, size))
    middle, ends = abs(t) < 0.2, abs(t) > 0.4
    dip = float(y[middle].mean() - y[ends].mean()) if middle.any() and ends.any() else 0.0
    # Each in shares of what the world draws, so that they can be compared.
    way, fall = 0.9 * TRAVEL, 0.64 * TRAVEL
    signs = {"left": -dx / way, "right": dx / way, "up": -dy / way, "down": dy / way,
             "grow": growth / 0.8, "shrink": -growth / 0.8, "bounce": dip / fall}  # fmt: skip
    first, second = sorted(signs, key=lambda name: -signs[name])[:2]
    if signs[first] < 0.2:
        return "still"
    return first if signs[first] > 1.5 * signs[second] else None
