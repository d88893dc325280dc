"""Which frames of a source become the frames of a clip.

`resample` keeps the speed of the source: the k-th frame is the one on screen k/fps seconds after the first,
found by time stamp, so variable frame rates come out right. `stretch` spreads the frames evenly over the
whole source whatever its rate, as the older trainers did, and so changes its speed.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from cogvideox_factory.data.container import VideoInfo
from cogvideox_factory.data.reasons import ClipError


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """What every clip of a run is brought to."""

    num_frames: int
    height: int
    width: int
    fps: float
    fps_policy: Literal["resample", "stretch"] = "resample"
    short_policy: Literal["reject", "repeat_last"] = "reject"
    """What to do with a source that has too few frames."""
    crop: Literal["center", "random", "stretch"] = "center"
    """center, random: scale to cover, then crop. stretch: distort to the asked size."""

    def __post_init__(self) -> None:
        assert min(self.num_frames, self.height, self.width, self.fps) > 0, self
        assert self.fps_policy in ("resample", "stretch"), self.fps_policy
        assert self.short_policy in ("reject", "repeat_last"), self.short_policy
        assert self.crop in ("center", "random", "stretch"), self.crop


@dataclass(frozen=True, kw_only=True, slots=True)
class FramePlan:
    """Source frames to take, and what that does to the clip."""

    indices: np.ndarray
    """Source frame of each clip frame, int64 [num_frames], never decreasing."""
    num_padded: int
    """Clip frames at the end that repeat the last one because the source is too short."""
    num_repeated: int
    """Clip frames that repeat the one before because the source's rate is lower."""
    speed: float
    """Source seconds a clip second; 1 unless stretched."""
    unused_seconds: float
    """Source time after the last frame taken."""
    max_late_seconds: float
    """How far, at most, a frame lies before the moment it stands for."""

    @property
    def state(self) -> str:
        """One of `reasons.USABLE`."""
        steps = np.diff(self.indices[: len(self.indices) - self.num_padded])
        if self.num_padded:
            return "padded"
        if (steps != 1).any() or abs(self.speed - 1) > 0.01:
            return "retimed"
        return "trimmed" if self.unused_seconds > 0 else "used"

    def to_json(self) -> dict[str, Any]:
        """Return what a report keeps."""
        return {
            "frames": compact(self.indices),
            "num_padded": self.num_padded,
            "num_repeated": self.num_repeated,
            "speed": round(self.speed, 4),
            "unused_seconds": round(self.unused_seconds, 4),
            "max_late_seconds": round(self.max_late_seconds, 4),
        }


def compact(indices: np.ndarray) -> str:
    """Write frame numbers as `first:last:step`, or with commas where they have no constant step."""
    steps = np.diff(indices)
    if len(indices) > 1 and (steps == steps[0]).all() and steps[0] > 0:
        return f"{indices[0]}:{indices[-1]}:{steps[0]}"
    return ",".join(map(str, indices.tolist()))


def num_available(info: VideoInfo, spec: ClipSpec) -> int:
    """Return how many frames of `info` there are at the rate of `spec`."""
    if info.still or spec.fps_policy == "stretch":
        return info.num_frames
    return max(1, math.ceil((info.duration_seconds - 1e-6) * spec.fps))


def plan_frames(info: VideoInfo, spec: ClipSpec) -> FramePlan:
    """Choose the frames of `info` that `spec` asks for.

    Raises:
        ClipError: `video.too_short`, unless `short_policy` is "repeat_last".
    """
    wanted = spec.num_frames
    if spec.fps_policy == "resample":
        moments = np.arange(wanted) / spec.fps
        enough = int(np.searchsorted(moments, info.duration_seconds - 1e-6))
        speed = 1.0
    else:
        span = float(info.times[-1]) if wanted > 1 else 0.0
        moments = np.linspace(0, span, wanted)
        enough = min(wanted, info.num_frames)
        speed = span * spec.fps / (wanted - 1) if wanted > 1 else 1.0
        if enough < wanted:
            moments, speed = np.append(info.times, np.full(wanted - enough, span)), spec.fps / info.fps
    if enough < wanted and spec.short_policy == "reject":
        raise ClipError("video.too_short", _too_short(info, spec, enough))
    late = _tolerance(info)
    indices = np.searchsorted(info.times, moments[:enough] + late, side="right") - 1
    max_late = float((moments[:enough] - info.times[indices]).max())
    indices = np.append(indices, np.full(wanted - enough, indices[-1]))
    following = np.append(info.times, info.duration_seconds)[indices[-1] + 1]
    step = 1 / spec.fps if spec.fps_policy == "resample" else 0.0
    unused = info.duration_seconds - max(float(following), float(moments[enough - 1]) + step)
    return FramePlan(
        indices=indices.astype(np.int64),
        num_padded=wanted - enough,
        num_repeated=int((np.diff(indices[:enough]) == 0).sum()),
        speed=speed,
        unused_seconds=unused if unused > late + 1e-6 else 0.0,
        max_late_seconds=max(0.0, max_late),
    )


def _tolerance(info: VideoInfo) -> float:
    """Return how much later than its moment a frame's stamp may read because containers round stamps."""
    if info.num_frames < 2:
        return 1e-6
    gap = float(np.median(np.diff(info.times)))
    return info.tick_seconds if info.tick_seconds <= gap / 8 else gap / 1000


def _too_short(info: VideoInfo, spec: ClipSpec, enough: int) -> str:
    name = info.path.name
    if spec.fps_policy == "resample":
        return (
            f"{name} lasts {info.duration_seconds:.3f} s, which gives {enough} frames at {spec.fps:g} fps; "
            f"{spec.num_frames} need more than {(spec.num_frames - 1) / spec.fps:.3f} s. Ask for fewer "
            "frames or a higher fps, or choose to stretch, or to repeat the last frame"
        )
    return (
        f"{name} has {info.num_frames} frames; {spec.num_frames} are asked for. Ask for fewer, or choose to "
        "repeat the last frame"
    )
