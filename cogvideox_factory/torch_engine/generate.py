"""`generate`: prompts (and images or videos) to videos, one model load for all of them."""

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config, Parallel
from cogvideox_factory.diffusion.samplers import guidance_scales
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.jobs import Job, plan_jobs
from cogvideox_factory.lora_files import LoraFile, load_lora, resolve_lora
from cogvideox_factory.metrics import duration, progress_bar, say, speaking
from cogvideox_factory.models import TransformerConfig, VaeConfig
from cogvideox_factory.plan.fitting import report, savings, settle
from cogvideox_factory.plan.generation import Generation
from cogvideox_factory.ranks import Layout
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.compilation import compile_blocks
from cogvideox_factory.torch_engine.device import (
    dtype_name,
    free_memory,
    pick_device,
    pick_dtype,
    set_determinism,
    set_tf32,
    take_card,
    versions,
)
from cogvideox_factory.torch_engine.exhausted import InHand, told
from cogvideox_factory.torch_engine.loading import Keeping, load_pipeline
from cogvideox_factory.torch_engine.low_bit import require_torchao
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.prompts import encode_prompts
from cogvideox_factory.torch_engine.ranks import Ranks, joined, num_processes
from cogvideox_factory.torch_engine.reuse import Reuse
from cogvideox_factory.torch_engine.text_encoder import text_model
from cogvideox_factory.torch_engine.turns import MODES
from cogvideox_factory.videos import Left, finished_frames, model_input, num_steps, open_jobs, read_source, write_video


def run(config: Config) -> list[Path]:
    """Make every video the settings ask for that is not there, with all processes started; return the paths of all.

    Everything that can be refused is refused before the model loads.

    Raises:
        ExhaustedError: the device has too little memory.
    """
    take_card(config.run.device)
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
    layout, device = layout_for(config, num_processes()), pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, transformer)
    _check_keeping(config, layout, device)
    set_determinism(config.run.deterministic)
    seconds, heads = config.parallel.timeout_seconds, transformer.num_attention_heads
    with joined(layout, num_heads=heads, device=device, timeout_seconds=seconds) as ranks, speaking(ranks.leads):
        set_tf32(config.run.tf32, device)
        if layout.size > 1 and config.parallel.hang_seconds != Parallel().hang_seconds:
            say("parallel.hang_seconds is for training; here processes wait parallel.timeout_seconds for each other")
        free = _least(ranks.gather(free_memory(device)))
        numbers = ranks.from_lead(lambda: _numbers(config, folder, transformer, shape, layout, dtype))
        video = settle(
            numbers, offload=ask.offload if ask.compile == "none" else "none", group=ask.offload_group,
            tiling=config.sampling.tiling, free=free, accelerator=device.type != "cpu",
        )  # fmt: skip
        paths, left = ranks.from_lead(
            lambda: _plan(config, transformer, shape, layout, device, dtype, tiling=video.tiling)
        )
        if left:
            for line in report(video, free=free, group=ask.offload_group, accelerator=device.type != "cpu"):
                say(line)
            keeping = Keeping(base=video.base, offload=video.offload, group=video.group)
            in_hand = InHand("before the first video")
            with told(device, in_hand, lambda: savings(video, accelerator=device.type != "cpu")):
                prompts = [config.sampling.negative_prompt, *(job.prompt for job, _ in left)]
                make = partial(
                    encode_prompts, prompts, folder, length=intake.text_length(config, transformer), device=device,
                    dtype=dtype, keeping=keeping, cache=Path(ask.prompt_cache) if ask.prompt_cache else None,
                )  # fmt: skip
                embeds = ranks.from_lead(make)
                pipe = load_pipeline(
                    folder, transformer_folder=intake.transformer_folder(config, folder), config=transformer,
                    dtype=dtype, device=device, tiling=video.tiling, loras=ask.lora, lora_weights=ask.lora_weight,
                    merge=ask.merge_lora, keeping=keeping, ranks=ranks,
                )  # fmt: skip
                _compile(config, pipe, ranks)
                say(
                    f"{len(left)} video(s) of {shape.num_frames} frames {shape.height}x{shape.width} at "
                    f"{shape.fps:g} fps, {config.sampling.steps} steps, {dtype} on {device}, attention: "
                    f"{backend_name(device, dtype)}"
                )
                _make_all(config, pipe, left, shape, embeds, ranks, in_hand)
    return paths


def _make_all(
    config: Config,
    pipe: CogVideoXPipeline,
    left: Left,
    shape: ClipShape,
    embeds: torch.Tensor,
    ranks: Ranks,
    in_hand: InHand,
) -> None:
    """Make this process' share of what is `left`; `embeds` [1 + B, S, E], on the host, begin with the negative
    prompt. Two of them at a time are on the device, however many prompts there are."""
    if ranks.layout.size > 1:
        layout = ranks.layout
        say(
            f"{layout.size} processes: {layout.num_data_ranks} video(s) at a time; {layout.sequence} share a "
            f"video's tokens and {layout.guidance} its guidance; {layout.grid[0]} copies of the model in "
            f"{layout.grid[1]} parts"
        )
    started = time.monotonic()
    share, negative = share_of(len(left), ranks), embeds[:1].to(pipe.device)
    with progress_bar("denoising", len(share) * num_steps(config)) as advance:
        for index, writes in share:
            job, record = left[index]
            in_hand.what = f"while making {job.path.name}"
            own = embeds[1 + index : 2 + index].to(pipe.device)
            frames = _make(config, pipe, job, shape, own, negative, advance)
            if writes:
                write_video(config, job, record, frames, shape)
    ranks.agree(None)  # nobody leaves while another's group is at work
    named = ", ".join(str(job.path) for job, _ in left[:3])
    rest = f" and {len(left) - 3} more in {left[0][0].path.parent}" if len(left) > 3 else ""
    say(f"done in {duration(time.monotonic() - started)}: {named}{rest}")


def layout_for(config: Config, size: int) -> Layout:
    """Return how `size` processes divide the work; a recipe's layout waits until there are some.

    Raises:
        FactoryError: numbers that do not go together.
    """
    if size == 1:
        if config.parallel != Parallel():
            say("one process: parallel.* is for the processes that torchrun starts")
        return Layout()
    if config.parallel.zero in (1, 2):
        raise FactoryError(
            f"parallel.zero={config.parallel.zero} divides the optimizer or gradients, which generate has not. Use 3 "
            "to divide the weights, or 0."
        )
    layout = Layout(size=size, **config.parallel.layout)
    if config.generate.first_block_cache and layout.zero == 3 and layout.num_data_ranks > 1:
        raise FactoryError(
            "generate.first_block_cache decides for each video which blocks are run, and with parallel.zero=3 all "
            f"{layout.size} processes come to every block while {layout.num_data_ranks} videos are made at a time. Use "
            "generate.tea_cache, which decides alike for all, or let all processes share a video (parallel.sequence, "
            "parallel.guidance)."
        )
    return layout


def share_of(num_videos: int, ranks: Ranks) -> list[tuple[int, bool]]:
    """Return the numbers of the videos this process works on, and whether it is the one that writes each.

    Processes that divide the weights must come to the model equally often, so whoever runs out of videos earlier
    makes the last one along, for nothing.
    """
    count = ranks.layout.num_data_ranks
    share = [(index, ranks.leads_video) for index in range(ranks.data_rank, num_videos, count)]
    if ranks.layout.zero == 3 and len(share) < -(-num_videos // count):
        share.append((num_videos - 1, False))
    return share


def _plan(
    config: Config,
    transformer: TransformerConfig,
    shape: ClipShape,
    layout: Layout,
    device: torch.device,
    dtype: torch.dtype,
    *,
    tiling: bool,
) -> tuple[list[Path], Left]:
    """Return the paths of all videos, and those left to make with their records, all checked."""
    ask = config.generate
    _guidance(config)
    jobs = plan_jobs(config)
    if len(jobs) < layout.num_data_ranks:
        raise FactoryError(
            f"{len(jobs)} video(s) for {layout.num_data_ranks} groups of processes that each make videos of their own. "
            "Start fewer processes, or let more share a video: --parallel.guidance 2, a larger --parallel.sequence."
        )
    for path in ask.lora:
        lora.check_fit(load_lora(resolve_lora(path)), transformer)
    return open_jobs(
        config, jobs, shape, device=device.type, dtype=dtype_name(dtype), tiling=tiling, versions=versions()
    )


def _numbers(
    config: Config, folder: Path, transformer: TransformerConfig, shape: ClipShape, layout: Layout, dtype: torch.dtype
) -> Generation:
    """Return a video as `plan.generation` counts it, without any offload."""
    sampling, loras = config.sampling, [load_lora(resolve_lora(path)) for path in config.generate.lora]
    return Generation(
        model=transformer, vae=VaeConfig.from_folder(folder / "vae"), text=text_model(folder),
        num_frames=shape.num_frames, height=shape.height, width=shape.width,
        latent_frames=shape.latent_frames + shape.num_front_padding,
        text_tokens=intake.text_length(config, transformer), item_bytes=dtype.itemsize,
        guided=sampling.guidance_scale > 1 or sampling.dynamic_guidance, base=config.generate.base,
        adapter_bytes=0 if config.generate.merge_lora else _adapter_bytes(loras),
        shards=layout.grid[1], sequence=layout.sequence, guidance=layout.guidance,
    )  # fmt: skip


def _adapter_bytes(files: list[LoraFile]) -> int:
    return 4 * sum(array.size for file in files for array in file.arrays.values())


def _check_keeping(config: Config, layout: Layout, device: torch.device) -> None:
    """Check how weights are to be kept against the machine and the processes.

    Raises:
        FactoryError: a setting that would do nothing here.
        MissingError: torchao is wanted and not installed.
    """
    ask = config.generate
    waits = ask.offload in MODES
    if waits and device.type == "cpu":
        raise FactoryError(
            f"generate.offload={ask.offload} keeps in host memory what an accelerator has no room for; on the CPU all "
            "is there already. Leave it at auto, or choose another --run.device."
        )
    if ask.base != "model":
        require_torchao(ask.base, setting="generate.base")
    for name, wanted in (
        (f"generate.offload={ask.offload}", waits),
        (f"generate.base={ask.base}", ask.base != "model"),
    ):
        if wanted and layout.zero == 3:
            raise FactoryError(
                f"{name} keeps weights whole in every process and parallel.zero=3 divides them; choose one: "
                f"parallel.zero=0, or no {name.split('=')[0]}."
            )


def _least(free: list[int | None]) -> int | None:
    known = [count for count in free if count is not None]
    return min(known) if len(known) == len(free) else None


def _compile(config: Config, pipe: CogVideoXPipeline, ranks: Ranks) -> None:
    if config.generate.compile == "none":
        return
    num_graphs = compile_blocks(
        pipe.transformer, config.generate.compile, num_shapes=_num_batches(config, ranks), training=False
    )
    say(f"compile: {num_graphs} graph(s), made in the first step that needs each")


def _num_batches(config: Config, ranks: Ranks) -> int:
    """Return how many different batches the transformer sees: two samples with guidance, one without or of a half."""
    return len({scale != 1 and ranks.guidance is None for scale in _guidance(config)})


def _guidance(config: Config) -> list[float]:
    """Return the guidance scale of each step.

    Raises:
        FactoryError: an interval that no step falls into.
    """
    return guidance_scales(
        config.sampling.guidance_scale, config.sampling.steps, dynamic=config.sampling.dynamic_guidance,
        interval=config.generate.guidance_interval,
    )  # fmt: skip


def _make(
    config: Config,
    pipe: CogVideoXPipeline,
    job: Job,
    shape: ClipShape,
    prompt_embeds: torch.Tensor,
    negative_embeds: torch.Tensor,
    advance: Callable[[], None],
) -> np.ndarray:
    """Return the frames of a video, uint8 [F, H, W, 3], made together with the other processes of it."""
    ask = config.generate
    source = read_source(job, config, shape)
    frames = pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_embeds,
        **model_input(config, source),
        strength=ask.strength,
        height=shape.height,
        width=shape.width,
        num_frames=shape.num_frames,
        num_inference_steps=config.sampling.steps,
        guidance_scale=config.sampling.guidance_scale,
        use_dynamic_cfg=config.sampling.dynamic_guidance,
        guidance_interval=ask.guidance_interval,
        reuse=Reuse(
            first_block=ask.first_block_cache, tea=ask.tea_cache, tea_polynomial=tuple(ask.tea_cache_polynomial)
        ),
        sampler=config.sampling.sampler,
        seed=job.seed,
        progress=lambda step: advance(),
    )[0][0]
    if ask.first_block_cache or ask.tea_cache:
        say(f"{job.path.name}: {pipe.num_reused} of {num_steps(config)} steps took over what the blocks did before")
    return finished_frames(config, job, frames, source, shape)
