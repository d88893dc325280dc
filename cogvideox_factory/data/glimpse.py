"""A closer look at clips: their frames decoded small, for what only pixels tell.

The frames looked at are those a run would train on, each shrunk to 64 x 64 before it is kept, so a clip takes 12 KB a
frame and all it is known by afterwards are a few numbers. Every source frame up to the last of them is decoded:
damage inside a file that its header and packets hide is found here, with the reason training would give.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cogvideox_factory.data import apart
from cogvideox_factory.data.likeness import SIDE, perceptual_hash
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.picture import encode_jpeg
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.data.video_info import DEFAULT_LIMITS, Limits
from cogvideox_factory.quality import motion_amount

NUM_HASHED = 3
"""Frames a clip that are hashed: the first, the middle one and the last."""

_SIDE = 2 * SIDE
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_BLACK = 24
_BLACK_SHARE = 0.99
_CUT_HISTOGRAM = 0.35
_CUT_LEVELS = 12.0
_CUT_RATIO = 2.5
_CUT_WINDOW = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class Glimpse:
    """What a few small frames tell of a clip."""

    motion: float | None
    """Typical speed of what moves, in widths of the picture a second (see `quality.motion_amount`); None for one
    frame."""
    brightness: float
    """Mean luma, 0 to 1."""
    black_frames: int
    """Frames that are black all over: luma below 24 of 255 in 99 % of the pixels."""
    scene_cuts: tuple[float, ...]
    """Seconds from the start of the clip as trained at which a new scene begins."""
    hashes: np.ndarray
    """uint64 [NUM_HASHED]; see `likeness`."""
    colours: np.ndarray
    """Mean colour of each of 4 x 4 parts of the hashed frames, uint8 [NUM_HASHED * 48]."""

    @classmethod
    def of(cls, pixels: np.ndarray, *, fps: float) -> "Glimpse":
        """Measure uint8 [F, 64, 64, 3] at `fps` frames a second."""
        luma = pixels.astype(np.float32) @ _LUMA  # [F, 64, 64]
        cuts = scene_cuts(pixels, luma)
        chosen = np.linspace(0, len(luma) - 1, NUM_HASHED).round().astype(int)
        grey = luma[chosen].reshape(NUM_HASHED, SIDE, 2, SIDE, 2).mean(axis=(2, 4))
        parts = pixels[chosen].reshape(NUM_HASHED, 4, _SIDE // 4, 4, _SIDE // 4, 3).mean(axis=(2, 4))
        return cls(
            motion=_motion(pixels, cuts, fps),
            brightness=float(luma.mean() / 255),
            black_frames=int(((luma < _BLACK).mean(axis=(1, 2)) >= _BLACK_SHARE).sum()),
            scene_cuts=tuple(round(place / fps, 3) for place in cuts),
            hashes=perceptual_hash(grey),
            colours=parts.round().astype(np.uint8).ravel(),
        )

    def to_json(self) -> dict[str, Any]:
        """Return what a report keeps."""
        facts: dict[str, Any] = {"brightness": round(self.brightness, 4), "black_frames": self.black_frames}
        if self.motion is not None:
            facts |= {"motion": round(self.motion, 4), "scene_cuts": list(self.scene_cuts)}
        return facts


def scene_cuts(pixels: np.ndarray, luma: np.ndarray) -> list[int]:
    """Return the places of the frames that begin a new scene.

    Between a frame and the one before it the colours must change (histograms of 4 x 4 x 4 bins overlap by less than
    65 %) and so must the picture (mean change of luma of 12 levels, and 2.5 times the median of the four changes on
    either side, so that fast motion is no cut). Fades and dissolves are not found; a flash is found
    twice.

    Args:
        pixels: uint8 [F, H, W, 3].
        luma: the same frames' luma, [F, H, W].
    """
    if len(pixels) < 2:
        return []
    change = np.abs(np.diff(luma, axis=0)).mean(axis=(1, 2))  # [F - 1]
    moved = 0.5 * np.abs(np.diff(_histograms(pixels), axis=0)).sum(axis=1)  # share of the pixels in other bins
    places = np.flatnonzero((moved > _CUT_HISTOGRAM) & (change > _CUT_LEVELS)).tolist()
    return [place + 1 for place in places if change[place] > _CUT_RATIO * _usual(change, place)]


def _usual(change: np.ndarray, place: int) -> float:
    around = np.append(change[max(0, place - _CUT_WINDOW) : place], change[place + 1 : place + 1 + _CUT_WINDOW])
    return float(np.median(around)) if len(around) else 0.0


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """Return the share of the pixels in each of 64 colour bins, [F, 64]."""
    coarse = (pixels >> 6).astype(np.int64)
    bins = (coarse[..., 0] * 16 + coarse[..., 1] * 4 + coarse[..., 2]).reshape(len(pixels), -1)
    return np.stack([np.bincount(frame, minlength=64) for frame in bins]) / bins.shape[1]


def _motion(pixels: np.ndarray, cuts: list[int], fps: float) -> float | None:
    """Weigh the scenes by their length: across a cut nothing moves."""
    scenes = [scene for scene in np.split(pixels, cuts) if len(scene) > 1]
    if not scenes:
        return None
    weights = [len(scene) - 1 for scene in scenes]
    pixels_a_frame = np.average([motion_amount(scene) for scene in scenes], weights=weights)
    return float(pixels_a_frame) * fps / pixels.shape[2]


def glimpse(clip: Clip, spec: ClipSpec, *, limits: Limits = DEFAULT_LIMITS, is_apart: bool = False) -> Glimpse:
    """Decode the frames that `spec` takes from a surveyed clip, small (in a process `apart`), and measure them.

    Raises:
        ClipError: the clip cannot be decoded, or changed since it was surveyed.
    """
    assert clip.path is not None, f"{clip.name} names no file"
    small = replace(clip.spec or spec, height=_SIDE, width=_SIDE, crop="stretch")
    decoded = (apart.read_clip if is_apart else read_clip)(clip.path, small, stamp=clip.stamp, limits=limits)
    return Glimpse.of(decoded.pixels, fps=spec.fps)


def look_closer(
    manifest: Manifest,
    spec: ClipSpec,
    *,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
    is_apart: bool = False,
    on_content: Callable[[], None] | None = None,
) -> tuple[Manifest, dict[str, Glimpse]]:
    """Decode every usable clip of a surveyed manifest once (`is_apart`: in a process that may crash).

    Clips with the same footage share one look. `on_content` is called after each, for progress (`contents` says how
    many there will be).

    Returns:
        The manifest with what was found among the facts, clips that cannot be decoded in the state of their reason;
        and the glimpses by footage.
    """
    found: dict[str, Glimpse | ClipError] = {}
    firsts = contents(manifest)

    def look(clip: Clip) -> Glimpse | ClipError:
        try:
            return glimpse(clip, spec, limits=limits, is_apart=is_apart)
        except ClipError as error:
            return error

    for footage, result in zip(firsts, ordered_map(look, firsts.values(), num_workers=num_workers)):
        found[footage] = result
        if on_content:
            on_content()

    def tell(clip: Clip) -> Clip:
        result = found[clip.footage]
        if isinstance(result, ClipError):
            raise result
        return replace(clip, facts={**clip.facts, **result.to_json()})

    return manifest.map_usable(tell), {f: result for f, result in found.items() if isinstance(result, Glimpse)}


def contents(manifest: Manifest) -> dict[str, Clip]:
    """Return the first usable clip of each footage."""
    firsts: dict[str, Clip] = {}
    for clip in manifest.usable:
        assert clip.content is not None, f"{clip.name} has not been surveyed"
        firsts.setdefault(clip.footage, clip)
    return firsts


def thumbnails(
    clips: Iterable[Clip], *, longest: int = 144, num_workers: int = 2, on_clip: Callable[[], None] | None = None
) -> dict[int | str, bytes]:
    """Return number (`Clip.number`) -> JPEG of the first frame of each surveyed clip, the longer side `longest` pixels.

    A clip that cannot be decoded has none. Choose few clips: all pictures are held in memory, 2 to 8 KB each.
    """
    chosen = list(clips)
    pictures = {}
    for clip, picture in zip(
        chosen, ordered_map(lambda clip: _thumbnail(clip, longest), chosen, num_workers=num_workers)
    ):
        if picture is not None:
            pictures[clip.number] = picture
        if on_clip:
            on_clip()
    return pictures


def _thumbnail(clip: Clip, longest: int) -> bytes | None:
    height, width = clip.facts["source_height"], clip.facts["source_width"]
    assert clip.path is not None, f"{clip.name} names no file"
    scale = longest / max(height, width)
    spec = ClipSpec(
        num_frames=1, height=max(1, round(height * scale)), width=max(1, round(width * scale)), fps=1, crop="stretch",
        start=clip.spec.start if clip.spec else 0,
    )  # fmt: skip
    try:
        return encode_jpeg(read_clip(clip.path, spec).pixels[0])
    except ClipError:
        return None
