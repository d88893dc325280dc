"""Cutting long sources into windows: each is a clip of its own, as long as a run's clips are.

A window begins at a frame of its source and keeps its speed. The one that begins at the first frame is the clip that
`first` takes, and `uniform` takes some of the windows that `all` takes, so policies share what was prepared.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec, first_frame_from, is_long_enough, plan_frames
from cogvideox_factory.data.video_info import VideoInfo

Policy = Literal["first", "uniform", "all", "scenes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Windows:
    """Which windows of a source become clips."""

    policy: Policy = "first"
    """first: the one at the start. all: one after another. uniform: at most `most` of those, spread over the source.
    scenes: one after another in each scene, so that none crosses a cut."""
    most: int = 4
    """Windows a source with "uniform"."""
    stride: int | None = None
    """Frames, at the run's rate, from the start of a window to that of the next with "all" and "scenes". None: as many
    as a window has, so that they do not overlap."""

    def __post_init__(self) -> None:
        assert self.policy in get_args(Policy), self.policy
        assert self.most >= 1, self.most
        assert self.stride is None or self.stride >= 1, self.stride

    def __str__(self) -> str:
        """What decides which windows there are."""
        more = f", at most {self.most}" if self.policy == "uniform" else ""
        if self.stride and self.policy in ("all", "scenes"):
            more = f", every {self.stride} frames"
        return self.policy + more

    def require(self) -> None:
        """Make sure that what the policy needs is installed.

        Raises:
            MissingError: "scenes" without PySceneDetect.
        """
        if self.policy == "scenes":
            from cogvideox_factory.data.scenes import require_detector

            require_detector()


FIRST = Windows()


@dataclass(frozen=True, kw_only=True, slots=True)
class Cut:
    """A source cut into windows."""

    specs: list[ClipSpec]
    """One a window, at least one."""
    facts: dict[str, Any]
    """What a report keeps: how many scenes there are and how many give no window."""


def cut_source(
    info: VideoInfo, spec: ClipSpec, windows: Windows, *, shape: Callable[[ClipSpec], ClipSpec], is_apart: bool = False
) -> Cut:
    """Cut a source.

    Args:
        info: the source.
        spec: what clips of the run are brought to.
        windows: the policy.
        shape: gives a part of the source its size and length, where these are not the same for all.
        is_apart: whether scenes are looked for in a process of their own.

    Raises:
        ClipError: no window can be had. A scene that gives none is only counted while another gives one.
    """
    found: list[ClipSpec] = []
    errors: list[ClipError] = []
    parts = source_parts(info, spec, windows, is_apart=is_apart)
    for part in sorted(parts, key=lambda part: part.start - (part.stop or info.num_frames)):  # the longest first
        try:
            found += _cut_part(info, shape(part), windows)
        except ClipError as error:
            errors.append(error)
    if not found:
        first = errors[0]
        many = f"no scene of {len(parts)} gives a clip; the longest: " if len(parts) > 1 else ""
        raise ClipError(first.code, many + first.message)
    found.sort(key=lambda window: window.start)
    facts = {"scenes": len(parts)} if windows.policy == "scenes" and not info.still else {}
    return Cut(specs=found, facts=facts | ({"scenes_without_clip": len(errors)} if errors else {}))


def source_parts(info: VideoInfo, spec: ClipSpec, windows: Windows, *, is_apart: bool = False) -> list[ClipSpec]:
    """Return the parts of a source that windows are cut from: its scenes (see `find_scenes`), or all of it.

    Raises:
        ClipError: it cannot be decoded.
    """
    if windows.policy != "scenes" or info.still:
        return [spec]
    from cogvideox_factory.data.scenes import find_scenes  # with the decoder, for this policy alone

    scenes = find_scenes(info, is_apart=is_apart)
    return [replace(spec, start=start, stop=stop if len(scenes) > 1 else None) for start, stop in scenes]


def _cut_part(info: VideoInfo, part: ClipSpec, windows: Windows) -> list[ClipSpec]:
    """Return the windows of one part; a short one is a window if the policy for short clips makes it one."""
    if windows.policy == "first" or info.still:
        return [part]
    apart = part.num_frames if windows.policy == "uniform" else windows.stride or part.num_frames
    starts = [part.start, *_later_starts(info, part, apart)]
    if windows.policy == "uniform":
        chosen = np.linspace(0, len(starts) - 1, min(windows.most, len(starts))).round().astype(int)
        starts = [starts[place] for place in chosen]
    return [_without_stop(info, replace(part, start=start)) for start in starts]


def _later_starts(info: VideoInfo, part: ClipSpec, apart: int) -> list[int]:
    """Return the first frames of the windows after the first: each `apart` frames' time later, or just after that."""
    starts = []
    start, stop = part.start, part.stop or info.num_frames
    while True:
        start = max(start + 1, first_frame_from(info, float(info.times[start]) + apart / part.fps))
        if start >= stop or not is_long_enough(info, replace(part, start=start)):
            return starts
        starts.append(start)


def _without_stop(info: VideoInfo, window: ClipSpec) -> ClipSpec:
    """Return the window without its end where that decides nothing: where a scene ends is no part of its identity.

    Raises:
        ClipError: it is too short.
    """
    plan = plan_frames(info, window)
    free = replace(window, stop=None)
    if window.stop is None or not is_long_enough(info, free):
        return window
    return free if (plan_frames(info, free).indices == plan.indices).all() else window
