"""The process that decodes for `apart`: it reads a question a line, answers, and leaves when nobody asks any more.

Each question has its time and its memory; beyond the one the kernel ends this process (SIGALRM has no handler, so a
decoder that never comes back is ended too), beyond the other its clip is refused.
"""

import json
import os
import resource
import select
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.data.clip import Clip
from cogvideox_factory.data.condition import read_condition
from cogvideox_factory.data.image import probe_picture
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import probe_clip, read_clip
from cogvideox_factory.data.video_info import Limits, VideoInfo

LEAST_SECONDS = 120
"""For a file's header and packets, and before its first frame; each frame has a second more."""
_BYTES = 8 * 2**30
"""Address space, besides the pixels that are asked for."""
_IDLE_SECONDS = 60

_bounded = False

Answer = tuple[dict[str, Any], np.ndarray | None]
"""What goes back as a line of JSON, and the pixels behind it."""


def main() -> None:
    """Answer until nothing was asked for a while, or the process that asks is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks
    with os.fdopen(os.dup(1), "wb") as answers:
        os.dup2(2, 1)  # what a library prints is no answer
        while select.select([0], [], [], _IDLE_SECONDS)[0] and (line := sys.stdin.buffer.readline()):
            said, pixels = answer(json.loads(line), bounded=True)
            signal.alarm(0)
            answers.write(json.dumps(said).encode() + b"\n")
            if pixels is not None:
                answers.write(pixels.data)
            answers.flush()


def answer(question: dict[str, Any], *, bounded: bool = False) -> Answer:
    """Do what is asked; `bounded`, this process ends where that takes too long, and refuses what asks for too much."""
    global _bounded
    _bounded = bounded
    try:
        return _DOES[question.pop("do")](**question)
    except ClipError as error:
        return {"code": error.code, "message": error.message}, None
    except MemoryError:
        message = f"{Path(question['path']).name}: its decoder asked for more than {_BYTES >> 30} GiB of memory"
        return {"code": "video.decoder_crash", "message": message}, None


def _bound(num_frames: int, num_bytes: int = 0) -> None:
    """Give the work that follows a second a frame, and memory for `num_bytes` of pixels."""
    if not _bounded:
        return
    signal.alarm(LEAST_SECONDS + num_frames)
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    wanted = _BYTES + num_bytes
    resource.setrlimit(resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _known(path: str, limits: dict[str, Any]) -> VideoInfo:
    _bound(0)
    return probe_clip(Path(path), limits=Limits(**limits))


def _probe(path: str, limits: dict[str, Any]) -> Answer:
    return _said(_known(path, limits))


def _picture(path: str) -> Answer:
    _bound(0)
    return _said(probe_picture(Path(path)))


def _said(info: VideoInfo) -> Answer:
    said = {field.name: getattr(info, field.name) for field in fields(info)}
    return said | {"path": str(info.path), "times": info.times.tolist()}, None


def _cuts(path: str, limits: dict[str, Any]) -> Answer:
    from cogvideox_factory.data.scenes import find_cuts

    info = _known(path, limits)
    _bound(info.num_frames)
    return {"cuts": find_cuts(info)}, None


def _read(
    path: str, limits: dict[str, Any], spec: dict[str, Any], draw: list[Any] | None, stamp: list[int] | None
) -> Answer:
    before = (stamp[0], stamp[1]) if stamp else None
    info = _known(path, limits)
    wanted = ClipSpec(**spec)
    _bound(info.num_frames, wanted.num_frames * wanted.height * wanted.width * 3)
    rng = draws.generator(*draw) if draw else None
    clip = read_clip(Path(path), wanted, rng=rng, info=info, stamp=before, limits=Limits(**limits))
    return {"shape": clip.pixels.shape, "crop": clip.fit.to_json()}, clip.pixels


def _condition(path: str, name: str, spec: dict[str, Any], draw: list[Any], stamp: list[int] | None) -> Answer:
    before = (stamp[0], stamp[1]) if stamp else None
    wanted = ClipSpec(**spec)
    clip = Clip(row=0, name="", caption="", image_name=name, image_path=Path(path), image_stamp=before, spec=wanted)
    _bound(wanted.num_frames)
    pixels = read_condition(clip, draws.generator(*draw))
    return {"shape": pixels.shape}, pixels


_DOES = {"probe": _probe, "picture": _picture, "cuts": _cuts, "read": _read, "condition": _condition}
