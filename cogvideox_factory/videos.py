"""A video in the making, but for the model: how many steps it takes, what it is made from, and how it is written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from cogvideox_factory.config import Config
from cogvideox_factory.data.export import export_to_video, require_codec
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video import ClipSpec, probe, read_clip
from cogvideox_factory.errors import DataError, FactoryError
from cogvideox_factory.jobs import Job, left_to_make, make_records, to_note
from cogvideox_factory.metrics import say
from cogvideox_factory.publish import publish_text, require_room
from cogvideox_factory.shapes import ClipShape

Left = list[tuple[Job, dict[str, Any]]]
"""Videos that are not there yet, each with its record."""


def first_step(num_inference_steps: int, strength: float) -> int:
    """Return the step at which video-to-video of `strength` begins.

    Raises:
        FactoryError: so little strength that no step is left.
    """
    taken = min(int(num_inference_steps * strength), num_inference_steps)
    if taken < 1:
        raise FactoryError(
            f"strength={strength:g} of {num_inference_steps} steps leaves none; use a strength of "
            f"{1 / num_inference_steps:.3g} or more, or more steps."
        )
    return num_inference_steps - taken


def num_steps(config: Config) -> int:
    """Return the steps a video takes."""
    steps, ask = config.sampling.steps, config.generate
    return steps - first_step(steps, ask.strength) if ask.video else steps


def read_source(job: Job, config: Config, shape: ClipShape) -> np.ndarray | None:
    """Return what the video is made from: an image, or the frames of a video, at the size asked for; None if nothing.

    Raises:
        DataError: it cannot be read, or has too few frames.
    """
    if job.image is not None:
        return read_image(job.image, shape.height, shape.width)
    if job.video is None:
        return None
    try:
        info = probe(job.video)
        whole = max(1, int(info.duration_seconds * shape.fps + 1e-6))
        num_frames = whole if config.generate.extend else shape.num_frames
        spec = ClipSpec(num_frames=num_frames, height=shape.height, width=shape.width, fps=shape.fps)
        return read_clip(job.video, spec, info=info).pixels
    except ClipError as error:
        raise DataError(f"{job.video}: {error}. Ask for fewer --generate.num-frames, or give another video.") from error


def open_jobs(
    config: Config,
    jobs: Sequence[Job],
    shape: ClipShape,
    *,
    device: str,
    dtype: str,
    tiling: bool,
    versions: Mapping[str, str],
) -> tuple[list[Path], Left]:
    """Return the paths of all videos, and those left to make with their records; all they need is checked.

    Args:
        config: settings of `generate`.
        jobs: of all videos.
        shape: of each.
        device: kind of the one at work, for the records, as are the others.
        dtype: of the model.
        tiling: whether pictures are decoded in tiles.
        versions: of the libraries.

    Raises:
        MissingError: the codec cannot be written here.
        DataError: an image or video to start from that cannot be read.
        StorageError: no room, or something else has the name of a video.
    """
    ask = config.generate
    records = make_records(jobs, config, shape, device=device, dtype=dtype, tiling=tiling, versions=versions)
    left = left_to_make(jobs, records, overwrite=ask.overwrite, any_tiling=config.sampling.tiling == "auto")
    if left:
        first = left[0][0].path
        if first.suffix == ".mp4":
            require_codec(first, ask.codec, shape.height, shape.width)
        for job in {(job.image, job.video): job for job, _ in left}.values():
            read_source(job, config, shape)
        frame_bytes = shape.num_frames * shape.height * shape.width * (3 if ask.format in ("png", "npy") else 1)
        require_room(first.parent, len(left) * frame_bytes, what="the videos")
    return [job.path for job in jobs], left


class ModelInput(TypedDict):
    """What a pipeline is given beside the prompt; at most one is there."""

    image: np.ndarray | None
    video: np.ndarray | None


def model_input(config: Config, source: np.ndarray | None) -> ModelInput:
    """Return what `read_source` gave as the arguments `image` and `video` of a pipeline."""
    image = None if source is None or config.generate.video else source[-1] if config.generate.extend else source
    return {"image": image, "video": source if config.generate.video else None}


def finished_frames(
    config: Config, job: Job, frames: np.ndarray, source: np.ndarray | None, shape: ClipShape
) -> np.ndarray:
    """Return the frames that were asked for, uint8 [F, H, W, 3], of those that were decoded."""
    extends = bool(config.generate.extend)
    if len(frames) != shape.num_frames:
        say(
            f"{job.path.name}: {shape.num_frames} frames asked, the VAE decodes {len(frames)}; "
            f"the last {len(frames) - shape.num_frames} are cut (8k+1 comes out as asked)"
        )
    frames = frames[: shape.num_frames]
    if extends and source is not None:
        frames = np.concatenate([source, frames[1:]])  # the first is the frame it starts from
    return frames


def write_video(config: Config, job: Job, record: dict[str, Any], frames: np.ndarray, shape: ClipShape) -> None:
    """Write the frames uint8 [F, H, W, 3] and how they were made.

    Whatever ends it on the way, no record is left beside a video that it does not tell of.
    """
    note, replaces = to_note(record), job.path.exists()
    if replaces:
        job.record_path.unlink(missing_ok=True)
    else:
        publish_text(job.record_path, note)
    export_to_video(frames, job.path, fps=shape.fps, codec=config.generate.codec, note=note)
    if replaces:
        publish_text(job.record_path, note)
