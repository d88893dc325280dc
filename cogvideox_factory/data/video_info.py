"""What is known of a source once its header and packets were read, and how much one may ask for.

Nothing here opens a file, so those who only reason about clips need no decoder.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.data.reasons import ClipError


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """How much one clip may ask for; a file beyond is refused from its header and packets."""

    max_pixels: int = 8_847_360
    """Pixels a frame (4096 x 2160)."""
    max_frames: int = 10_000
    max_seconds: float = 600.0


DEFAULT_LIMITS = Limits()


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoInfo:
    """What a clip is, in display orientation."""

    path: Path
    codec: str
    pixel_format: str
    width: int
    """Pixels a row after rotation, made square: what a player shows."""
    height: int
    fps: float
    """Measured from the frames' times."""
    num_frames: int
    duration_seconds: float
    """From the first frame to the end of the last."""
    rotation: int
    """Degrees, counter-clockwise, that a player turns the coded picture by: 0, 90, 180 or 270."""
    mirrored: bool
    sample_aspect_ratio: float
    """Width of a coded pixel divided by its height."""
    bit_depth: int
    has_alpha: bool
    interlaced: bool
    variable_rate: bool
    times: np.ndarray = field(repr=False, compare=False)
    """Seconds from the first frame to each frame, float64 [num_frames]."""
    tick_seconds: float = field(repr=False)
    """Resolution of `times`."""
    pts: tuple[int, ...] | None = field(repr=False, compare=False)
    """Presentation stamp of each frame in stream units; None when the container has none and frames count."""
    still: bool = False
    """Whether this is a picture: one frame, and no rate or duration that means anything."""


def file_stamp(path: Path) -> tuple[int, int]:
    """Return (size, mtime in ns) of a file.

    Raises:
        ClipError: `path.missing`.
    """
    try:
        status = os.stat(path)
    except OSError as error:
        raise ClipError("path.missing", f"{path} is gone: {error.strerror}") from error
    return status.st_size, status.st_mtime_ns


def require_moving(info: VideoInfo, num_frames: int) -> None:
    """Refuse a picture where clips have more than one of `num_frames`.

    Raises:
        ClipError: `image.still`.
    """
    if info.still and num_frames > 1:  # also where short clips are padded: it would teach stillness
        raise ClipError(
            "image.still",
            f"{info.path.name} is a picture and clips have {num_frames} frames; pictures are for runs of one "
            "frame (data.num_frames=1) and for buckets of one",
        )


def source_facts(info: VideoInfo) -> dict[str, Any]:
    """Return the facts of a source that a report keeps."""
    facts: dict[str, Any] = {
        "source_frames": info.num_frames,
        "source_fps": round(info.fps, 4),
        "source_height": info.height,
        "source_width": info.width,
        "codec": info.codec,
    }
    if info.still:  # it has no rate, and 1 would be taken for one
        del facts["source_fps"]
    notes = {
        "rotation": info.rotation,
        "mirrored": info.mirrored,
        "variable_rate": info.variable_rate,
        "interlaced": info.interlaced,
        "alpha": info.has_alpha,
        "bit_depth": info.bit_depth if info.bit_depth > 8 else 0,
        "sample_aspect_ratio": 0 if info.sample_aspect_ratio == 1 else round(info.sample_aspect_ratio, 4),
    }
    return facts | {name: value for name, value in notes.items() if value}
