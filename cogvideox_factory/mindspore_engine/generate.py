"""`generate`: prompts (and images or videos) to videos, one model load for all of them."""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.jobs import Job, plan_jobs
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import load_lora, resolve_lora
from cogvideox_factory.metrics import duration, progress_bar, say, speaking
from cogvideox_factory.mindspore_engine import lora
from cogvideox_factory.mindspore_engine.device import versions
from cogvideox_factory.mindspore_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.mindspore_engine.prompts import encode_prompts
from cogvideox_factory.mindspore_engine.ranks import Ranks
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
    jobs, machine = plan_jobs(config), take_machine(config, transformer)
    ranks = machine.ranks
    _require_fitting_layout(config, len(jobs), ranks)
    with speaking(ranks.leads):
        planned = ranks.from_lead(lambda: _plan(config, transformer, shape, machine, jobs))
        left = [(jobs[number], record) for number, record in planned]
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
                + (f", {ranks.layout.num_data_ranks} at a time" if ranks.everyone else "")
            )
            _make_all(config, pipe, left, shape, embeds, ranks)
    return [job.path for job in jobs]


def _require_fitting_layout(config: Config, num_videos: int, ranks: Ranks) -> None:
    """Refuse processes that would have nothing to do.

    Raises:
        FactoryError: with what goes.
    """
    if config.parallel.zero in (1, 2):
        raise FactoryError(
            f"parallel.zero={config.parallel.zero} divides what only training has. Use 0, or 3 to divide the weights."
        )
    if num_videos < ranks.layout.num_data_ranks:
        raise FactoryError(
            f"{num_videos} video(s) for {ranks.layout.num_data_ranks} groups of processes that each make videos of "
            "their own. Start fewer processes, or let more share a video: a larger --parallel.sequence."
        )


def _plan(
    config: Config, transformer: TransformerConfig, shape: ClipShape, machine: Machine, jobs: Sequence[Job]
) -> list[tuple[int, dict[str, Any]]]:
    """Return the videos left to make as their numbers among `jobs`, with their records, all checked."""
    layers = {name.removesuffix(".weight"): s for name, s in transformer_shapes(transformer).items() if len(s) == 2}
    for path in config.generate.lora:
        check_lora(load_lora(resolve_lora(path)), layers)
    _, left = open_jobs(
        config, jobs, shape, device=machine.device, dtype=machine.dtype_name, tiling=_tiles(config, machine),
        versions=versions(),
    )  # fmt: skip
    return [(jobs.index(job), record) for job, record in left]


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
    if machine.ranks.sequence is not None:
        pipe.transformer.divide(machine.ranks.sequence)
    return pipe


def _tiles(config: Config, machine: Machine) -> bool:
    """Whether to decode in tiles: as asked, or on a card, whose memory nobody has measured against a video yet."""
    return machine.device != "cpu" if config.sampling.tiling == "auto" else config.sampling.tiling


def _make_all(
    config: Config, pipe: CogVideoXPipeline, left: Left, shape: ClipShape, embeds: dict[str, Tensor], ranks: Ranks
) -> None:
    """Make this process' share of what is `left`."""
    started, share = time.monotonic(), share_of(len(left), ranks)
    with progress_bar("denoising", len(share) * num_steps(config)) as advance:
        for index, writes in share:
            job, record = left[index]
            frames = _make(config, pipe, job, shape, embeds, advance)
            write = partial(write_video, config, job, record, frames, shape)
            ranks.together(write if writes else _nothing)
    named = ", ".join(str(job.path) for job, _ in left[:3])
    rest = f" and {len(left) - 3} more in {left[0][0].path.parent}" if len(left) > 3 else ""
    say(f"done in {duration(time.monotonic() - started)}: {named}{rest}")


def share_of(num_videos: int, ranks: Ranks) -> list[tuple[int, bool]]:
    """Return the numbers of the videos this process works on, and whether it is the one that writes each.

    All come to the model equally often, so whoever runs out of videos earlier makes the last one along, for nothing.
    """
    count = ranks.layout.num_data_ranks
    share = [(index, ranks.leads_video) for index in range(ranks.data_rank, num_videos, count)]
    if len(share) < -(-num_videos // count):
        share.append((num_videos - 1, False))
    return share


def _nothing() -> None:
    pass


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
