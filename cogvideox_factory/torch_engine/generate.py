"""`generate`: prompts (and images or videos) to videos, one model load for all of them."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video import ClipSpec, probe, read_clip
from cogvideox_factory.errors import DataError, FactoryError
from cogvideox_factory.jobs import Job, left_to_make, make_records, plan_jobs, to_note
from cogvideox_factory.lora_files import load_lora, resolve_lora
from cogvideox_factory.metrics import duration, progress_bar, say
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.publish import publish_text, require_room
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.checkpoint import versions
from cogvideox_factory.torch_engine.device import pick_device, pick_dtype, set_determinism
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline, first_step
from cogvideox_factory.torch_engine.text_encoder import TextEncoder


def run(config: Config) -> list[Path]:
    """Make every video the settings ask for that is not there, and return the paths of all.

    Everything that can be refused is refused before the model loads.
    """
    jobs = plan_jobs(config)
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    if config.model.transformer_config and not config.model.transformer:
        raise FactoryError(
            f"model.transformer_config={config.model.transformer_config} alone means random weights, which make noise; "
            "name weights for it with --model.transformer, such as the folder of a run"
        )
    transformer_folder = intake.transformer_folder(config, folder)
    transformer_config = intake.transformer_config(config, folder)
    check_task(config.task, transformer_config, source=str(transformer_folder))
    ask = config.generate
    shape = clip_shape(transformer_config, num_frames=ask.num_frames, height=ask.height, width=ask.width, fps=ask.fps)
    lora_files = [resolve_lora(path) for path in ask.lora]
    for file in lora_files:
        lora.check_fit(load_lora(file), transformer_config)
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, transformer_config)
    records = make_records(
        jobs, config, shape, device=device.type, dtype=str(dtype).removeprefix("torch."), versions=versions()
    )
    left = left_to_make(jobs, records, overwrite=ask.overwrite)
    if left:
        sources = {job.path: _read_sources(job, config, shape) for job, _ in left}
        frame_bytes = shape.num_frames * shape.height * shape.width * (3 if ask.format in ("png", "npy") else 1)
        require_room(left[0][0].path.parent, len(left) * frame_bytes, what="the videos")
        set_determinism(config.run.deterministic)
        prompt_embeds, negative_embeds = _encode(
            config, folder, [job for job, _ in left], transformer_config, device, dtype
        )
        pipe = _load(config, folder, transformer_folder, transformer_config, lora_files)
        say(
            f"{len(left)} video(s) of {shape.num_frames} frames {shape.height}x{shape.width} at {shape.fps:g} fps, "
            f"{config.sampling.steps} steps, {dtype} on {device}, attention: {backend_name(device, dtype)}"
        )
        started = time.monotonic()
        with progress_bar("denoising", len(left) * _num_steps(config)) as advance:
            for index, (job, record) in enumerate(left):
                embeds = prompt_embeds[index : index + 1]
                _make(config, pipe, job, record, sources[job.path], shape, embeds, negative_embeds, advance)
        named = ", ".join(str(job.path) for job, _ in left[:3])
        rest = f" and {len(left) - 3} more in {left[0][0].path.parent}" if len(left) > 3 else ""
        say(f"done in {duration(time.monotonic() - started)}: {named}{rest}")
    return [job.path for job in jobs]


def _num_steps(config: Config) -> int:
    steps, ask = config.sampling.steps, config.generate
    return steps - first_step(steps, ask.strength) if ask.video else steps


def _load(
    config: Config, folder: Path, transformer: Path, transformer_config: TransformerConfig, lora_files: list[Path]
) -> CogVideoXPipeline:
    """Load the model without its text encoder, and its LoRAs."""
    pipe = CogVideoXPipeline.from_pretrained(
        folder, transformer=transformer, transformer_config=transformer_config, dtype=config.run.dtype,
        device=config.run.device, tiling=config.sampling.tiling, text_encoder=False,
    )  # fmt: skip
    names = [f"lora-{index}" for index in range(len(lora_files))]
    for name, file in zip(names, lora_files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    if names:
        pipe.set_adapters(names, config.generate.lora_weight or None)
    return pipe


def _read_sources(job: Job, config: Config, shape: ClipShape) -> np.ndarray | None:
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


def _encode(
    config: Config,
    folder: Path,
    jobs: list[Job],
    transformer: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of all prompts [B, S, E] and of the negative one; the encoder is gone afterwards.

    Each is encoded by itself: the last bits of a batch depend on its size, and a video must not depend on the others.
    """
    length = intake.text_length(config, transformer)
    encoder = TextEncoder.from_folder(folder, dtype=dtype, device=device)
    prompts = [config.sampling.negative_prompt, *(job.prompt for job in jobs)]
    known = {prompt: encoder.encode([prompt], length).to(dtype) for prompt in dict.fromkeys(prompts)}
    embeds = torch.cat([known[prompt] for prompt in prompts])
    return embeds[1:], embeds[:1]


def _make(
    config: Config,
    pipe: CogVideoXPipeline,
    job: Job,
    record: dict[str, Any],
    source: np.ndarray | None,
    shape: ClipShape,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    advance: Callable[[], None],
) -> None:
    ask, extends = config.generate, bool(config.generate.extend)
    frames = pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        image=None if source is None or ask.video else source[-1] if extends else source,
        video=source if ask.video else None,
        strength=ask.strength,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        use_dynamic_cfg=config.sampling.dynamic_guidance,
        sampler=config.sampling.sampler,
        seed=job.seed,
        progress=lambda step: advance(),
    )[0][0]
    if len(frames) != shape.num_frames:
        say(
            f"{job.path.name}: {shape.num_frames} frames asked, the VAE decodes {len(frames)}; "
            f"the last {len(frames) - shape.num_frames} are cut (8k+1 comes out as asked)"
        )
    frames = frames[: shape.num_frames]
    if extends and source is not None:
        frames = np.concatenate([source, frames[1:]])  # the first is the frame it starts from
    note = to_note(record)
    publish_text(job.record_path, note)
    export_to_video(frames, job.path, fps=shape.fps, codec=ask.codec, note=note)
