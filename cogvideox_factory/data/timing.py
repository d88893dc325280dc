"""Which frames of a source become the frames of a clip.

`resample` keeps the speed of the source: the k-th frame is the one on screen k/fps seconds after the first,
found by time stamp, so variable frame rates come out right. `stretch` spreads the frames evenly over the
whole source whatever its rate, as the older trainers did, and so changes its speed. A clip may be a window of its
source: then its time begins at the window's first frame.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video_info import VideoInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipSpec:
    """What a clip is brought to, and which part of its source it is made of."""

    num_frames: int
    height: int
    width: int
    fps: float
    fps_policy: Literal["resample", "stretch"] = "resample"
    short_policy: Literal["reject", "repeat_last", "slow"] = "reject"
    """What to do with a source that has too few frames."""
    max_slowdown: float = 2.0
    """Most clip seconds that "slow" makes of a source second, at least 1."""
    crop: Literal["center", "random", "smart", "stretch"] = "center"
    """center, random, smart: scale to cover, then crop. stretch: distort to the asked size."""
    start: int = 0
    """First source frame that may be taken."""
    stop: int | None = None
    """Source frame before which the clip must end, where that makes it short; None: the source's end is far enough."""

    def __post_init__(self) -> None:
        assert min(self.num_frames, self.height, self.width, self.fps) > 0, self
        assert self.fps_policy in ("resample", "stretch"), self.fps_policy
        assert self.short_policy in ("reject", "repeat_last", "slow"), self.short_policy
        assert (self.short_policy, self.fps_policy) != ("slow", "stretch"), "stretching has no speed to slow down"
        assert self.max_slowdown >= 1, self.max_slowdown
        assert self.crop in ("center", "random", "smart", "stretch"), self.crop
        assert 0 <= self.start < (self.stop or math.inf), (self.start, self.stop)

    @property
    def window(self) -> str:
        """What tells this part of the source from others, "" for one that begins at the first frame."""
        stop = "" if self.stop is None else f"-{self.stop}"
        return f"@{self.start}{stop}" if self.start or stop else ""


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
    """Source seconds a clip second; 1 unless stretched or slowed."""
    unused_seconds: float
    """Source time before the first frame and after the last one taken."""
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
    """Return how many frames at the rate of `spec` the part of `info` has that `spec` may take."""
    part = part_of(info, spec)
    if part.still or spec.fps_policy == "stretch":
        return part.num_frames
    return max(1, math.ceil((part.duration_seconds - 1e-6) * spec.fps))


def part_of(info: VideoInfo, spec: ClipSpec) -> VideoInfo:
    """Return the part of a source that `spec` may take as if it were a source of its own."""
    if not spec.window:
        return info
    stop = min(spec.stop or info.num_frames, info.num_frames)
    assert spec.start < stop, (spec.start, stop)
    begin, end = (float(_borders(info)[place]) for place in (spec.start, stop))
    return replace(
        info, times=info.times[spec.start : stop] - begin, num_frames=stop - spec.start, duration_seconds=end - begin,
        pts=info.pts[spec.start : stop] if info.pts else None,
    )  # fmt: skip


def _borders(info: VideoInfo) -> np.ndarray:
    """Return the moment each frame appears and that the last one goes, float64 [num_frames + 1]."""
    return np.append(info.times, info.duration_seconds)


def is_long_enough(info: VideoInfo, spec: ClipSpec) -> bool:
    """Tell whether the part of `info` that `spec` may take has all frames `spec` asks for, at its own speed."""
    return _moments(part_of(info, spec), spec)[1:] == (spec.num_frames, 1.0)


def first_frame_from(info: VideoInfo, moment: float) -> int:
    """Return the first frame that appears at `moment` (seconds from the first frame) or later."""
    return int(np.searchsorted(info.times, moment - _tolerance(info)))


def plan_frames(info: VideoInfo, spec: ClipSpec) -> FramePlan:
    """Choose the frames of `info` that `spec` asks for.

    Raises:
        ClipError: `video.too_short`, unless `short_policy` mends it.
    """
    part = part_of(info, spec)
    wanted = spec.num_frames
    moments, enough, speed = _moments(part, spec)
    if enough < wanted and spec.short_policy != "repeat_last":
        raise ClipError("video.too_short", _too_short(part, spec, enough))
    late = _tolerance(info)
    indices = np.searchsorted(part.times, moments[:enough] + late, side="right") - 1
    max_late = float((moments[:enough] - part.times[indices]).max())
    indices = np.append(indices, np.full(wanted - enough, indices[-1]))
    step = speed / spec.fps if spec.fps_policy == "resample" else 0.0
    taken = max(float(_borders(part)[indices[-1] + 1]), float(moments[enough - 1]) + step)
    unused = info.duration_seconds - min(taken, part.duration_seconds)
    return FramePlan(
        indices=indices.astype(np.int64) + spec.start,
        num_padded=wanted - enough,
        num_repeated=int((np.diff(indices[:enough]) == 0).sum()),
        speed=speed,
        unused_seconds=unused if unused > late + 1e-6 else 0.0,
        max_late_seconds=max(0.0, max_late),
    )


def _moments(part: VideoInfo, spec: ClipSpec) -> tuple[np.ndarray, int, float]:
    """Return (source time of each clip frame, how many of them the source has, source seconds a clip second)."""
    wanted = spec.num_frames
    if spec.fps_policy == "resample":
        moments = np.arange(wanted) / spec.fps
        enough = int(np.searchsorted(moments, part.duration_seconds - 1e-6))
        speed = part.duration_seconds * spec.fps / wanted
        if enough < wanted and spec.short_policy == "slow" and speed * spec.max_slowdown >= 1:
            return np.arange(wanted) * (part.duration_seconds / wanted), wanted, speed
        return moments, enough, 1.0
    span = float(part.times[-1]) if wanted > 1 else 0.0
    if part.num_frames >= wanted:
        speed = span * spec.fps / (wanted - 1) if wanted > 1 else 1.0
        return np.linspace(0, span, wanted), wanted, speed
    padding = np.full(wanted - part.num_frames, span)
    return np.append(part.times, padding), part.num_frames, spec.fps / part.fps


def _tolerance(info: VideoInfo) -> float:
    """Return how much later than its moment a frame's stamp may read because containers round stamps."""
    if info.num_frames < 2:
        return 1e-6
    gap = float(np.median(np.diff(info.times)))
    return info.tick_seconds if info.tick_seconds <= gap / 8 else gap / 1000


def _too_short(info: VideoInfo, spec: ClipSpec, enough: int) -> str:
    name = info.path.name
    if spec.fps_policy == "stretch":
        return (
            f"{name} has {info.num_frames} frames; {spec.num_frames} are asked for. Ask for fewer, or choose to "
            "repeat the last frame"
        )
    found = (
        f"{name} lasts {info.duration_seconds:.3f} s, which gives {enough} frames at {spec.fps:g} fps; "
        f"{spec.num_frames} need more than {(spec.num_frames - 1) / spec.fps:.3f} s. "
    )
    if spec.short_policy == "slow":
        needed = math.ceil(100 * spec.num_frames / (spec.fps * info.duration_seconds)) / 100
        return found + (
            f"It would have to be slowed {needed:g} times, and max_slowdown is {spec.max_slowdown:g}. Ask for fewer "
            "frames or a higher fps, or raise max_slowdown"
        )
    return found + (
        "Ask for fewer frames or a higher fps, or choose to slow short clips, to stretch, or to repeat the last frame"
    )
