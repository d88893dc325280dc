"""`generate`: prompts (and images) to mp4 files, one model load for all of them."""

import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvideox_factory import weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.manifest import read_lines
from cogvideox_factory.errors import DataError, FactoryError, StorageError
from cogvideox_factory.intake import text_length
from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.metrics import duration, progress_bar, say
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.publish import publish_text, require_room
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.device import pick_device, pick_dtype, set_determinism
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline, resolve_lora
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.weights import resolve_transformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """One video to make."""

    prompt: str
    image: Path | None
    path: Path


def run(config: Config) -> list[Path]:
    """Make every video the settings ask for and return their paths.

    Everything that can be refused is refused before the model loads.
    """
    jobs = plan_jobs(config)
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    replaced = resolve_transformer(config.model.transformer) if config.model.transformer else None
    transformer_config = TransformerConfig.from_folder(replaced or folder / "transformer")
    check_task(config.task, transformer_config, source=str(replaced or folder))
    ask = config.generate
    shape = clip_shape(transformer_config, num_frames=ask.num_frames, height=ask.height, width=ask.width, fps=ask.fps)
    for image in {job.image for job in jobs if job.image}:
        read_image(image, shape.height, shape.width)
    lora_files = [resolve_lora(path) for path in ask.lora]
    for file in lora_files:
        lora.check_fit(load_lora(file), transformer_config)
    require_room(jobs[0].path.parent, len(jobs) * shape.num_frames * shape.height * shape.width, what="the videos")

    set_determinism(config.run.deterministic)
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, transformer_config)
    prompt_embeds, negative_embeds = _encode(config, folder, jobs, transformer_config, device, dtype)
    pipe = CogVideoXPipeline.from_pretrained(
        folder, transformer=replaced, dtype=config.run.dtype, device=config.run.device,
        tiling=config.sampling.tiling, text_encoder=False,
    )  # fmt: skip
    names = [f"lora-{index}" for index in range(len(lora_files))]
    for name, file in zip(names, lora_files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    if names:
        pipe.set_adapters(names, ask.lora_weight or None)
    say(
        f"{len(jobs)} video(s) of {shape.num_frames} frames {shape.height}x{shape.width} at {shape.fps:g} fps, "
        f"{config.sampling.steps} steps, {dtype} on {device}, attention: {backend_name(device, dtype)}"
    )
    started = time.monotonic()
    with progress_bar("denoising", len(jobs) * config.sampling.steps) as advance:
        for index, job in enumerate(jobs):
            _make(config, pipe, job, shape, prompt_embeds[index : index + 1], negative_embeds, advance)
    named = ", ".join(str(job.path) for job in jobs[:3])
    rest = f" and {len(jobs) - 3} more in {jobs[0].path.parent}" if len(jobs) > 3 else ""
    say(f"done in {duration(time.monotonic() - started)}: {named}{rest}")
    return [job.path for job in jobs]


def _encode(
    config: Config,
    folder: Path,
    jobs: list[Job],
    transformer: TransformerConfig,
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the embeddings of all prompts [B, S, E] and of the negative one; the encoder is gone afterwards."""
    length = text_length(config, transformer)
    encoder = TextEncoder.from_folder(folder, dtype=dtype, device=device)
    embeds = encoder.encode([config.sampling.negative_prompt, *(job.prompt for job in jobs)], length).to(dtype)
    return embeds[1:], embeds[:1]


def _make(
    config: Config,
    pipe: CogVideoXPipeline,
    job: Job,
    shape: ClipShape,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    advance: Callable[[], None],
) -> None:
    video = pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        image=job.image,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        use_dynamic_cfg=config.sampling.dynamic_guidance,
        sampler=config.sampling.sampler,
        seed=config.run.seed,
        progress=lambda step: advance(),
    )[0][0]
    if len(video) != shape.num_frames:
        say(
            f"{job.path.name}: {shape.num_frames} frames asked, the VAE decodes {len(video)}; "
            f"the last {len(video) - shape.num_frames} are cut (8k+1 comes out as asked)"
        )
    export_to_video(video[: shape.num_frames], job.path, fps=shape.fps)
    record = config.model_dump(include={"task", "model", "text", "sampling", "generate", "run"})
    record |= {
        "prompt": job.prompt,
        "image": str(job.image) if job.image else None,
        "torch": torch.__version__,
    }
    publish_text(job.path.with_suffix(".json"), json.dumps(record, indent=1, ensure_ascii=False))


def plan_jobs(config: Config) -> list[Job]:
    """Return the videos to make, refusing what cannot be made.

    Raises:
        FactoryError: no prompt, no image for i2v, counts that do not fit.
        StorageError: a file that exists already.
    """
    ask = config.generate
    prompts = list(ask.prompt)
    if ask.prompt_file:
        prompts += [line for line in read_lines(Path(ask.prompt_file)) if line.strip()]
    if not prompts:
        raise FactoryError('no prompt: give --generate.prompt "..." or --generate.prompt-file FILE')
    images = [Path(image) for image in ask.image]
    if config.task == "i2v" and len(images) not in (1, len(prompts)):
        raise FactoryError(
            f"task=i2v needs one image, or one a prompt: {len(images)} image(s) for {len(prompts)} prompt(s). "
            "Give --generate.image FILE [FILE ...]"
        )
    for image in images:
        if not image.is_file():
            raise DataError(f"{image}: no such image")
    out = Path(ask.out)
    if out.suffix.lower() == ".mp4" and len(prompts) > 1:
        raise FactoryError(f"generate.out={ask.out} is one file for {len(prompts)} prompts; give a folder")
    paths = [out] if out.suffix.lower() == ".mp4" else [out / file_name(i, p) for i, p in enumerate(prompts)]
    existing = [str(path) for path in paths if path.exists()]
    if existing and not ask.overwrite:
        raise StorageError(
            f"{', '.join(existing[:3])} exist(s) already; choose another --generate.out, or pass "
            "--generate.overwrite True"
        )
    chosen = images * len(prompts) if len(images) == 1 else images or [None] * len(prompts)
    return [Job(prompt=p, image=i, path=f) for p, i, f in zip(prompts, chosen, paths, strict=True)]


def file_name(index: int, prompt: str) -> str:
    """Return a short file name that says which prompt it was."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return f"{index:03}-{slug or 'video'}.mp4"
