"""Where one scene of a video ends and the next begins, as PySceneDetect finds it.

Its adaptive detector compares every frame with its neighbours: the change of hue, saturation and brightness must be
large, and three times that of the two frames on either side, so fast motion is no cut. Fades and dissolves are not
found, nor cuts at the first or the last two frames. The frames it sees are decoded here; the library opens no file.
"""

from functools import lru_cache
from typing import Any

import numpy as np
from av.video.reformatter import VideoReformatter

from cogvideox_factory.data import apart
from cogvideox_factory.data.resize import to_rgb
from cogvideox_factory.data.video import decode_frames
from cogvideox_factory.data.video_info import VideoInfo, file_stamp
from cogvideox_factory.errors import MissingError

_LONGER_SIDE = 256
"""Pixels the detector sees; more does not help it."""


def require_detector() -> tuple[Any, Any]:
    """Import PySceneDetect (an extra: `[scenes]`); return its adaptive detector and its class of time codes.

    Raises:
        MissingError: it is not installed.
    """
    try:
        from scenedetect import FrameTimecode  # pyright: ignore[reportMissingImports], an extra
        from scenedetect.detectors import AdaptiveDetector  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingError(
            "data.windows=scenes finds cuts with PySceneDetect, which is not here. Install: pip install "
            "'cogvideox-factory[scenes]', or use data.windows=all."
        ) from error
    return AdaptiveDetector, FrameTimecode


def find_scenes(info: VideoInfo, *, is_apart: bool = False) -> list[tuple[int, int]]:
    """Return (first frame, frame after the last) of each scene, in order; together they are the whole source.

    The whole source is decoded, but only once while it does not change; `is_apart`: in a process of its own.

    Raises:
        ClipError: it cannot be decoded.
        MissingError: PySceneDetect is not installed.
    """
    cuts = _known_cuts(info, file_stamp(info.path), is_apart)
    return list(zip([0, *cuts], [*cuts, info.num_frames], strict=True))


@lru_cache(maxsize=4096)
def _known_cuts(info: VideoInfo, _stamp: tuple[int, int], is_apart: bool) -> tuple[int, ...]:
    return apart.find_cuts(info.path) if is_apart else find_cuts(info)


def find_cuts(info: VideoInfo) -> tuple[int, ...]:
    """Return the frames that begin a new scene, but for the first.

    Raises:
        ClipError: it cannot be decoded.
        MissingError: PySceneDetect is not installed.
    """
    adaptive_detector, timecode = require_detector()
    # A scene of any length counts: a shorter one would be joined to its neighbour, and a window then cross a cut.
    detector = adaptive_detector(min_scene_len=1)
    scale = min(1.0, _LONGER_SIDE / max(info.height, info.width))
    height, width = max(2, round(info.height * scale)), max(2, round(info.width * scale))
    if info.rotation % 180:
        height, width = width, height
    reformatter = VideoReformatter()
    cuts: set[int] = set()
    for index, frame in decode_frames(info, np.arange(info.num_frames)):
        picture = to_rgb(frame, height=height, width=width, reformatter=reformatter)[..., ::-1]
        # Frames are numbered, so the rate does not matter.
        found = detector.process_frame(timecode(index, fps=1.0), np.ascontiguousarray(picture))
        cuts.update(cut.frame_num for cut in found)
    return tuple(sorted(cuts - {0}))
