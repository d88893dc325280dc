"""`generate`: prompts (and images or videos) to videos, one model load for all of them."""

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from mindspore import Tensor

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.jobs import Job, plan_jobs
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import load_lora, resolve_lora
from cogvideox_factory.metrics import duration, progress_bar, say
from cogvideox_factory.mindspore_engine import lora
from cogvideox_factory.mindspore_engine.device import versions
from cogvideox_factory.mindspore_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.mindspore_engine.prompts import encode_prompts
from cogvideox_factory.mindspore_engine.start import Machine, take_machine
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape
from cogvideox_factory.tiny.layout import transformer_shapes
from cogvideox_factory.videos import Left, finished_frames, model_input, num_steps, open_jobs, read_source, write_video


def run(config: Config) -> list[Path]:
    """Make every video the settings ask for that is not there; return the paths of all.

    Everything that can be refused is refused before the model loads.
    """
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    if config.model.transformer_config and not config.model.transformer:
        raise FactoryError(
            f"model.transformer_config={config.model.transformer_config} alone means random weights, which make noise; "
            "name weights for it with --model.transformer, such as the folder of a run"
        )
    transformer = intake.transformer_config(config, folder)
    check_task(config.task, transformer, source=str(intake.transformer_folder(config, folder)))
    ask = config.generate
    shape = clip_shape(transformer, num_frames=ask.num_frames, height=ask.height, width=ask.width, fps=ask.fps)
    machine = take_machine(config, transformer)
    paths, left = _plan(config, transformer, shape, machine)
    if left:
        embeds = encode_prompts(
            [config.sampling.negative_prompt, *(job.prompt for job, _ in left)], folder,
            length=intake.text_length(config, transformer), machine=machine,
            cache=Path(ask.prompt_cache) if ask.prompt_cache else None,
        )  # fmt: skip
        pipe = _load(config, folder, transformer, machine)
        say(
            f"{len(left)} video(s) of {shape.num_frames} frames {shape.height}x{shape.width} at {shape.fps:g} fps, "
            f"{config.sampling.steps} steps, {machine.dtype_name}, MindSpore on {machine.device}"
        )
        _make_all(config, pipe, left, shape, embeds)
    return paths


def _plan(
    config: Config, transformer: TransformerConfig, shape: ClipShape, machine: Machine
) -> tuple[list[Path], Left]:
    """Return the paths of all videos, and those left to make with their records, all checked."""
    ask, jobs = config.generate, plan_jobs(config)
    layers = {name.removesuffix(".weight"): s for name, s in transformer_shapes(transformer).items() if len(s) == 2}
    for path in ask.lora:
        check_lora(load_lora(resolve_lora(path)), layers)
    return open_jobs(
        config, jobs, shape, device=machine.device, dtype=machine.dtype_name, tiling=_tiles(config, machine),
        versions=versions(),
    )  # fmt: skip


def _load(config: Config, folder: Path, transformer: TransformerConfig, machine: Machine) -> CogVideoXPipeline:
    """Load the model and its LoRAs."""
    pipe = CogVideoXPipeline.from_folders(
        folder, intake.transformer_folder(config, folder), config=transformer, machine=machine,
        tiling=_tiles(config, machine),
    )  # fmt: skip
    names = [f"lora-{index}" for index in range(len(config.generate.lora))]
    for name, path in zip(names, config.generate.lora, strict=True):
        pipe.load_lora_weights(path, name)
    if names:
        lora.set_adapters(pipe.transformer, names, config.generate.lora_weight or None)
        if config.generate.merge_lora:
            lora.merge_lora(pipe.transformer)
    return pipe


def _tiles(config: Config, machine: Machine) -> bool:
    """Whether to decode in tiles: as asked, or on a card, whose memory nobody has measured against a video yet."""
    return machine.device != "cpu" if config.sampling.tiling == "auto" else config.sampling.tiling


def _make_all(config: Config, pipe: CogVideoXPipeline, left: Left, shape: ClipShape, embeds: dict[str, Tensor]) -> None:
    started = time.monotonic()
    with progress_bar("denoising", len(left) * num_steps(config)) as advance:
        for job, record in left:
            frames = _make(config, pipe, job, shape, embeds, advance)
            write_video(config, job, record, frames, shape)
    named = ", ".join(str(job.path) for job, _ in left[:3])
    rest = f" and {len(left) - 3} more in {left[0][0].path.parent}" if len(left) > 3 else ""
    say(f"done in {duration(time.monotonic() - started)}: {named}{rest}")


def _make(
    config: Config, pipe: CogVideoXPipeline, job: Job, shape: ClipShape, embeds: dict[str, Tensor],
    advance: Callable[[], None],
) -> np.ndarray:  # fmt: skip
    """Return the frames of a video, uint8 [F, H, W, 3]."""
    source = read_source(job, config, shape)
    frames = pipe(
        embeds[job.prompt],
        embeds[config.sampling.negative_prompt],
        **model_input(config, source),
        strength=config.generate.strength,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        use_dynamic_cfg=config.sampling.dynamic_guidance,
        guidance_interval=config.generate.guidance_interval,
        sampler=config.sampling.sampler,
        seed=job.seed,
        progress=lambda step: advance(),
    )
    return finished_frames(config, job, frames, source, shape)
