"""Reading a clip as pixels: the frames asked for, upright, in RGB, at the size asked for.

A clip is decoded as a stream: only chosen frames are kept, and they are scaled before they are stored, so
memory is the size of the result. Damage is an error, never a grey frame: the decoder is told to give up on
broken data, frames it marks corrupt are refused, and every chosen frame must arrive. A window in the middle of a
file is reached by a jump to the key frame before it; where that leads elsewhere, the file is decoded from its start.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av.error
import numpy as np
from av.video.frame import VideoFrame

from cogvideox_factory.data.container import decoder, open_video, orientation, probe
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.image import is_picture, load_picture, probe_picture
from cogvideox_factory.data.paths import require_in_place
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.resize import Fit, Resizer
from cogvideox_factory.data.saliency import smart_fit
from cogvideox_factory.data.timing import ClipSpec, FramePlan, plan_frames
from cogvideox_factory.data.video_info import (
    DEFAULT_LIMITS,
    Limits,
    VideoInfo,
    file_stamp,
    require_moving,
    source_facts,
)

__all__ = ["ClipSpec", "DecodedClip", "VideoInfo", "export_to_video", "probe", "read_clip"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedClip:
    """Pixels of a clip and how they came to be."""

    pixels: np.ndarray
    """uint8 [F, H, W, 3], RGB."""
    info: VideoInfo
    plan: FramePlan
    fit: Fit

    @property
    def state(self) -> str:
        """One of `reasons.USABLE`."""
        return self.plan.state

    @property
    def facts(self) -> dict[str, Any]:
        """What a report keeps of the source and of what was done."""
        return source_facts(self.info) | self.plan.to_json() | {"crop": self.fit.to_json()}


def probe_clip(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Describe a video, or a picture as a clip of one frame.

    Raises:
        ClipError: with the reason the clip cannot be used.
    """
    path = Path(path)
    return probe_picture(path) if is_picture(path) else probe(path, limits=limits)


def read_clip(
    path: Path,
    spec: ClipSpec,
    *,
    rng: np.random.Generator | None = None,
    info: VideoInfo | None = None,
    stamp: tuple[int, int] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> DecodedClip:
    """Decode the frames of `path` that `spec` asks for.

    Args:
        path: the file.
        spec: frames, size, rate and policies.
        rng: draws the place of a random crop.
        info: what `probe_clip` said of this file, to save reading its packets again.
        stamp: (size, mtime in ns) the file had when it was hashed; another one now is an error.
        limits: see `probe`.

    Raises:
        ClipError: with the reason the clip cannot be used.
    """
    path = Path(path)
    before = stamp or file_stamp(path)
    if stamp:
        require_in_place(path)
        _require_unchanged(path, stamp)  # before it is opened: it may be another file by now
    info = info or probe_clip(path, limits=limits)
    require_moving(info, spec.num_frames)
    plan = plan_frames(info, spec)
    fit = Fit.of(info.height, info.width, spec.height, spec.width, crop=spec.crop, rng=rng)
    if spec.crop == "smart":  # decoded twice, so that a wide source takes no more memory than the result

        def frames(see: Resizer) -> Iterator[np.ndarray]:
            return (see(frame) for _, frame in decode_frames(info, plan.indices))

        fit = smart_fit(fit, spec.height, spec.width, frames, rotation=info.rotation, mirrored=info.mirrored)
    resize = Resizer(fit, spec.height, spec.width, rotation=info.rotation, mirrored=info.mirrored)
    pixels = np.empty((spec.num_frames, spec.height, spec.width, 3), np.uint8)
    for index, frame in decode_frames(info, plan.indices):
        first, last = np.searchsorted(plan.indices, (index, index + 1))
        pixels[first:last] = resize(frame)
    _require_unchanged(path, before)
    return DecodedClip(pixels=pixels, info=info, plan=plan, fit=fit)


def _require_unchanged(path: Path, stamp: tuple[int, int]) -> None:
    if file_stamp(path) != stamp:
        raise ClipError("video.changed", f"{path.name} changed while it was read; leave the clips alone and run again")


def decode_frames(info: VideoInfo, indices: np.ndarray) -> Iterator[tuple[int, VideoFrame]]:
    """Decode up to the last of `indices` and yield (index, frame) of each one once, in order.

    Raises:
        ClipError: damage, or a change of size or orientation on the way.
    """
    if info.still:
        yield 0, load_picture(info.path)[0]
        return
    wanted = sorted(set(indices.tolist()))
    if info.pts and wanted[0] > 0:
        try:
            for index, frame in _decode(info, wanted, jump=True):
                yield index, frame
                wanted = wanted[1:]
        except ClipError:  # the start of the file may be needed, and if not, it says what is wrong
            pass
        if not wanted:
            return
    yield from _decode(info, wanted, jump=False)


def _decode(info: VideoInfo, wanted: list[int], *, jump: bool) -> Iterator[tuple[int, VideoFrame]]:
    """Yield (index, frame) of the `wanted` frames, from the start of the file or from the key frame before the first.

    Raises:
        ClipError: see `decode_frames`; after a jump also where frames are missing.
    """
    by_stamp: dict[int | None, int] | None = {info.pts[index]: index for index in wanted} if info.pts else None
    found = 0
    size: tuple[int, int] | None = None
    name = info.path.name
    with open_video(info.path) as (container, stream):
        try:
            if jump and info.pts:
                container.seek(info.pts[wanted[0]], stream=stream)
            decode = decoder(stream)
            for count, frame in enumerate(frame for packet in container.demux(stream) for frame in decode(packet)):
                if frame.is_corrupt:
                    raise ClipError("video.corrupt", f"{name}: frame {count + 1} is damaged")
                size = size or (frame.width, frame.height)
                if (frame.width, frame.height) != size:
                    raise ClipError(
                        "video.resolution_change",
                        f"{name} changes from {size[0]}x{size[1]} to {frame.width}x{frame.height} "
                        f"at frame {count + 1}; split it there",
                    )
                index = count if by_stamp is None else by_stamp.get(frame.pts, -1)
                if index == wanted[found]:
                    found += 1
                    if orientation(frame, name) != (info.rotation, info.mirrored):
                        raise ClipError("video.rotation", f"{name} turns at frame {count + 1}; split it there")
                    yield index, frame
                    if found == len(wanted):
                        return
        except av.error.FFmpegError as error:
            raise ClipError("video.corrupt", f"{name} is damaged before frame {wanted[found] + 1} ({error})") from error
    raise ClipError("video.corrupt", f"{name}: the decoder gave {found} of the {len(wanted)} frames chosen")
