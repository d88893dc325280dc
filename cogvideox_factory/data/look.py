"""Opening a file to see what clips are in it: its hash, facts, windows and the frames of each.

Nothing is raised for what is wrong with a clip; it becomes its state. `survey` asks for what it does not remember.
"""

import hashlib
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from cogvideox_factory.data import apart
from cogvideox_factory.data.buckets import Bucket, Buckets, Source
from cogvideox_factory.data.image import probe_picture
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.paths import require_in_place
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec, num_available, plan_frames
from cogvideox_factory.data.video import probe_clip
from cogvideox_factory.data.video_info import (
    DEFAULT_LIMITS,
    Limits,
    VideoInfo,
    file_stamp,
    require_moving,
    source_facts,
)
from cogvideox_factory.data.windows import FIRST, Windows, cut_source, source_parts

_BLOCK = 1 << 20


def look_at(
    clip: Clip,
    spec: ClipSpec,
    *,
    windows: Windows = FIRST,
    buckets: Buckets | None = None,
    limits: Limits = DEFAULT_LIMITS,
    is_apart: bool = False,
) -> list[Clip]:
    """Return each window of `clip` with its content hash, facts and state; one clip where there is nothing to cut.

    Never raises for what is wrong with the clip. `is_apart`: what decodes is a process of its own (`apart`).
    """
    path = clip.path
    assert path is not None, f"{clip.name} names no file"
    try:
        require_in_place(path)
        stamp = file_stamp(path)
        clip = replace(clip, content=hash_file(path), stamp=stamp)
        info = (apart.probe_clip if is_apart else probe_clip)(path, limits=limits)
        clip = replace(clip, facts={**clip.facts, **source_facts(info)})
        shape = partial(_shaped, clip.content or "", info, buckets)
        cut = cut_source(info, spec, windows, shape=shape, is_apart=is_apart)
        return [_planned(clip, info, window, cut.facts, has_buckets=buckets is not None) for window in cut.specs]
    except ClipError as error:
        return [clip.rejected(error)]


def look_at_condition(picture: Clip, *, is_apart: bool = False) -> list[Clip]:
    """Return the picture a clip starts from (as the only file of one `Clip`) with its hash, size and state."""
    path = picture.path
    assert path is not None
    try:
        picture = replace(picture, stamp=file_stamp(path), content=hash_file(path))
        info = (apart.probe_picture if is_apart else probe_picture)(path)
        return [replace(picture, facts={"image_height": info.height, "image_width": info.width})]
    except ClipError as error:
        return [picture.rejected(ClipError("image.unreadable", f"its image {path.name}: {error.message}"))]


def sources_in(clip: Clip, spec: ClipSpec, windows: Windows, limits: Limits, *, is_apart: bool = False) -> list[Source]:
    """Return frames (at the rate of `spec`) and size of a clip's file, or of each scene that windows are cut from;
    nothing for a file that cannot be read."""
    assert clip.path is not None, f"{clip.name} names no file"
    try:
        info = (apart.probe_clip if is_apart else probe_clip)(clip.path, limits=limits)
        return [_source(info, part) for part in source_parts(info, spec, windows, is_apart=is_apart)]
    except ClipError:
        return []  # `look_at` says why


def _shaped(content: str, info: VideoInfo, buckets: Buckets | None, part: ClipSpec) -> ClipSpec:
    """Return a part of a source with the size and length that its bucket gives it."""
    if buckets:
        bucket = buckets.choose(content + part.window, _source(info, part))
        part = replace(part, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
    require_moving(info, part.num_frames)
    return part


def _planned(clip: Clip, info: VideoInfo, window: ClipSpec, facts: dict[str, Any], *, has_buckets: bool) -> Clip:
    plan = plan_frames(info, window)
    if has_buckets:
        facts = facts | {"bucket": Bucket(window.num_frames, window.height, window.width).key}
    if window.start:
        facts = facts | {"start_seconds": round(float(info.times[window.start]), 4)}
    return replace(clip, state=plan.state, spec=window, facts={**clip.facts, **facts, **plan.to_json()})


def _source(info: VideoInfo, spec: ClipSpec) -> Source:
    return Source(num_available(info, spec), info.height, info.width)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        ClipError: `path.denied`, it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ClipError("path.denied", f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
