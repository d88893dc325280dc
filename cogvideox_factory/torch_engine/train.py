"""`train`: a cache or raw clips to a run folder with a LoRA or a fine-tuned transformer.

`run` reads as the recipe does: check, load, resume, loop, export. Task, method and source of the data are values, not
four trainers; the loop itself is in `loop.py`.
"""

import time
from collections import deque
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.cache import is_imported, open_cache, recorded_dtype
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import CacheSource, Draws, Loader, RawSource
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.metrics import say, speaking
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.plan import memory
from cogvideox_factory.plan.optimizer import optimizer_memory
from cogvideox_factory.publish import replace_folder, require_room, sweep
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.run_folder import check_allowed, locked
from cogvideox_factory.time_limit import TimeLimit
from cogvideox_factory.torch_engine import lora, prepare
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.bad_steps import BadSteps
from cogvideox_factory.torch_engine.compilation import compile_blocks
from cogvideox_factory.torch_engine.device import require_compiler, set_determinism, set_tf32, take_card
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.examine import first_not_finite
from cogvideox_factory.torch_engine.exhausted import InHand, told
from cogvideox_factory.torch_engine.ledger import Ledger, Work
from cogvideox_factory.torch_engine.linear import is_low_bit
from cogvideox_factory.torch_engine.loop import Loop, state_tensors
from cogvideox_factory.torch_engine.low_bit import quantize
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.offload import Offload
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.ranks import Layout, Ranks, joined, num_processes
from cogvideox_factory.torch_engine.saving import Saver
from cogvideox_factory.torch_engine.sharding import distribute
from cogvideox_factory.torch_engine.start import (
    Plan,
    batch_sizes,
    check_resume,
    digest_of,
    excluded_clips,
    find_start,
    identity,
    make_plan,
    model_flops,
    num_tokens,
    peak_tflops,
    record_of,
    shared_files,
    shared_settings,
    training_numbers,
)
from cogvideox_factory.torch_engine.swap import Swap
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import SampleVideos, Watch, to_device
from cogvideox_factory.tracker import Tracker


def run(config: Config) -> Path:
    """Train as the settings say and return the run folder.

    Raises:
        FactoryError: settings, data, model, cache, checkpoint or disk unfit, all before the first step.
        NonFiniteError: the loss or a gradient became NaN or Inf.
        StoppedError: stopped by a signal after a checkpoint was saved.
    """
    if not config.cache.dir and not config.data_sets:
        raise FactoryError("train on what? give --cache.dir FOLDER (prepared) or --data.root FOLDER (raw clips)")
    started = time.monotonic()
    take_card()
    plan = make_plan(config)
    _check_validation(plan)
    if config.parallel.guidance > 1:
        raise FactoryError(
            f"parallel.guidance={config.parallel.guidance} divides what generate does twice a step; training has no "
            "guidance. Leave it at 1, and raise parallel.sequence if one video is too much for a process."
        )
    tracker = _make_tracker(plan)
    if config.train.compile != "none":
        require_compiler(plan.device)
    layout = Layout(size=num_processes(), **config.parallel.model_dump(exclude={"timeout_seconds", "hang_seconds"}))
    heads = plan.model.num_attention_heads
    set_determinism(config.run.deterministic)
    seconds = config.parallel.timeout_seconds
    with joined(layout, num_heads=heads, device=plan.device, timeout_seconds=seconds) as ranks, speaking(ranks.leads):
        return _run(plan, ranks, tracker, started)


def _make_tracker(plan: Plan) -> Tracker | None:
    train = plan.config.train
    if train.tracker == "none":
        return None
    settings = plan.config.model_dump(mode="json")
    return Tracker(train.tracker, project=train.tracker_project, folder=plan.run_folder, settings=settings)


def _run(plan: Plan, ranks: Ranks, tracker: Tracker | None, started: float) -> Path:
    config = plan.config
    ranks.require_agreement(shared_settings(config))
    set_tf32(config.run.tf32, plan.device)
    source, described, set_weights = open_source(plan)
    sizes = batch_sizes(plan, source.buckets.values())
    if config.data.buckets:  # which clips a step has depends on these too
        described = digest_of(sorted(source.buckets), described, sorted(source.buckets.items()), sorted(sizes.items()))
    if set_weights:
        parts = sorted(source.sets.items()), sorted(set_weights.items())
        described = digest_of(sorted(source.sets), described, *parts)
    excluded = excluded_clips(config.train.exclude) & set(source.buckets)
    if config.train.exclude:
        say(f"{len(excluded)} clips are left out by {config.train.exclude}")
    if excluded:
        described = digest_of(sorted(set(source.buckets) - excluded), described)
    ranks.require_agreement(shared_files(plan, described))
    wanted = identity(plan, described)
    ranks.from_lead(lambda: check_allowed(config.train.allow_change, wanted))
    with ExitStack() as stack:
        ranks.from_lead(lambda: stack.enter_context(locked(plan.run_folder)))
        start = ranks.from_lead(lambda: find_start(plan))
        changes = ranks.from_lead(lambda: check_resume(plan, start, wanted)) if start else []
        record = record_of(plan, ranks, wanted, changes)
        numbers, in_hand = training_numbers(plan, sizes, ranks.layout), InHand("before the first step")
        accelerator = plan.device.type != "cpu"
        with told(plan.device, in_hand, lambda: memory.savings(numbers, accelerator=accelerator)):
            say(_needs(memory.need(numbers)))
            _train(
                plan, source, sizes, set_weights, ranks, tracker, excluded=excluded, start=start, record=record,
                started=started, in_hand=in_hand,
            )  # fmt: skip
    return plan.run_folder


def open_source(plan: Plan) -> tuple[CacheSource | RawSource, str, dict[str, float]]:
    """Return where samples come from, a digest of what is in it, and the weights of its data sets if it has several.

    A run that names no clips takes the weights its cache was prepared with.

    Raises:
        UnfitError: a cache made with other settings or from other clips, or damaged.
        DataError: raw clips that cannot be used.
    """
    config = plan.config
    spec = intake.clip_spec(config, plan.shape)
    if config.cache.dir:
        # What the encoders ran in is the cache's affair: float32 latents feed a bfloat16 run as well.
        dtype = recorded_dtype(Path(config.cache.dir)) or str(plan.dtype).removeprefix("torch.")
        memo = Memo(Path(config.cache.dir) / "survey.jsonl")  # knows what unchanged weights hash to
        settings = intake.cache_settings(config, plan.folder, plan.model, spec, dtype, memo=memo)
        verb = "prepare"
        if is_imported(Path(config.cache.dir)):
            settings, verb = settings.as_imported(), "import-prepared"
        command = f"cogvideox {verb} (with this recipe) --cache.dir {config.cache.dir}"
        index = open_cache(Path(config.cache.dir), settings, command=command)
        if config.data_sets:
            intake.require_source(index, config)
        if config.task == "i2v" and config.train.image_noise and not config.cache.image_noise_variants:
            raise FactoryError(
                "cache.image_noise_variants=0 keeps only clean first frames, but train.image_noise is on. "
                "Prepare with some variants, or set --train.image-noise False."
            )
        clip_ids = sorted(clip.id for clip in index.clips)
        recorded = index.recorded.get("source", {}).get("weights", {})
        set_weights = intake.set_weights(config) if config.data_sets else recorded
        return CacheSource(index), digest_of(clip_ids, settings.to_json()), set_weights
    manifest = intake.checked_manifest(config, spec, plan.model)
    clip_ids = sorted(clip.id for clip in manifest.usable)
    source = RawSource(manifest.usable, latent_channels=plan.model.out_channels)
    return source, digest_of(clip_ids, spec), intake.set_weights(config)


def _train(
    plan: Plan,
    source: CacheSource | RawSource,
    sizes: dict[str, int],
    set_weights: dict[str, float],
    ranks: Ranks,
    tracker: Tracker | None,
    *,
    excluded: set[str],
    start: Path | None,
    record: dict[str, Any],
    started: float,
    in_hand: InHand,
) -> None:
    config = plan.config
    train_ids, held_ids = sorted(set(source.buckets) - excluded), []
    if config.validation.every:
        train_ids, held_ids = hold_out(train_ids, config.validation.num_clips)
        if unseen := len(source.buckets) - len(excluded) - len(train_ids) - len(held_ids):
            say(f"{unseen} other windows of the {len(held_ids)} clips held out are not trained on either")
    sampler = Sampler(
        train_ids, batch_size={key: size * config.train.gradient_accumulation for key, size in sizes.items()},
        seed=config.run.seed, buckets=source.buckets, sets=source.sets, weights=set_weights,
    )  # fmt: skip
    draws = make_draws(plan)
    loader = Loader(
        source, sampler, draws, num_micros=config.train.gradient_accumulation,
        num_workers=config.train.num_workers, rank=ranks.data_rank, num_ranks=ranks.layout.num_data_ranks,
    )  # fmt: skip
    # The text encoder is the largest part; it is done with, where it can be, before the transformer is loaded.
    frozen = load_frozen(plan, source, ranks)
    transformer = load_transformer(plan, ranks)
    if config.train.compile != "none":
        num_graphs = compile_blocks(transformer, config.train.compile, num_shapes=len(sizes))
        say(f"compiling blocks ({config.train.compile}): {num_graphs} graph(s) for {len(sizes)} shape(s)")
    update = make_update(plan, transformer, ranks)
    ema = Ema(update, decay=config.train.ema_decay) if config.train.ema_decay else None
    objective = make_objective(plan, transformer)
    ledger = Ledger(sampler, draws, num_micros=config.train.gradient_accumulation, ranks=ranks)
    peak = peak_tflops(plan)
    if config.train.method == "lora":
        adapter_weights = sum(p.numel() for p in update.trained.values() if p.dim() == 2)
    else:
        adapter_weights = 0

    def examine(batches: list[dict[str, Any]]) -> str | None:
        ready = [to_device(batch, plan.device) for batch in batches]
        if frozen.encoder:
            ready = [frozen.encoder.batch(batch) for batch in ready]
        return first_not_finite(objective, update, ready, ranks)

    saver = Saver(
        plan.run_folder, keep=config.train.keep_checkpoints, ranks=ranks, device=plan.device,
        in_background=config.train.async_checkpoint,
        wait_seconds=config.parallel.timeout_seconds / 2,  # before the others give up waiting for this process
    )  # fmt: skip
    state_bytes = sum(t.numel() * t.element_size() for t in state_tensors(update, ema).values())
    loop = Loop(
        objective=objective, update=update, ema=ema, sampler=sampler, loader=loader, encoder=frozen.encoder,
        device=plan.device, run_folder=plan.run_folder, num_steps=config.train.steps,
        num_micros=config.train.gradient_accumulation,
        rate={
            "peak": config.train.learning_rate, "schedule": config.train.schedule, "num_steps": config.train.steps,
            "warmup_steps": config.train.warmup_steps, "num_cycles": config.train.num_cycles,
            "power": config.train.power,
        },
        log_every=config.train.log_every, save_every=config.train.save_every, saver=saver, record=record,
        limit=TimeLimit(config.train.time_limit_minutes, save_bytes=state_bytes, started=started),
        ledger=ledger,
        bad_steps=BadSteps(
            plan.run_folder, policy=config.train.on_bad_step, loader=loader, ranks=ranks, examine=examine
        ),
        work=Work(
            tokens={key: num_tokens(plan, Bucket.parse(key)) + plan.text_length for key in sizes},
            flops={key: model_flops(plan, Bucket.parse(key), adapter_weights=adapter_weights) for key in sizes},
            num_cards=ranks.layout.size, peak_tflops=peak[0] if peak else None,
        ),
        log_samples=config.train.log_samples, tracker=tracker,
        watch=Watch(
            every=config.validation.every, source=source, clip_ids=held_ids, draws=make_draws(plan, quiet=True),
            samples=make_samples(plan, frozen, transformer, ranks), objective=objective, encoder=frozen.encoder,
            device=plan.device, run_folder=plan.run_folder, ranks=ranks,
        ),
        ranks=ranks, in_hand=in_hand, hang_seconds=config.parallel.hang_seconds,
    )  # fmt: skip
    _say_arithmetic(plan, sampler, update, start, ranks)
    if peak:
        say(f"MFU against {peak[0]:g} TFLOP/s a card ({peak[1]})")
    ranks.from_lead(lambda: _make_ready(plan, state_bytes))
    if tracker and ranks.leads:
        tracker.start()
    loop.run(start)
    with loop.averaged_weights():
        export(transformer, plan.run_folder, method=config.train.method, ranks=ranks)
    say(f"final weights in {plan.run_folder / 'final'}")


def _make_ready(plan: Plan, state_bytes: int) -> None:
    num_checkpoints = plan.config.train.keep_checkpoints + 1
    require_room(plan.run_folder, num_checkpoints * state_bytes, what=f"{num_checkpoints} checkpoints of this run")
    sweep(plan.run_folder)
    write_recipe(plan.run_folder / "config.yaml", plan.config)


def make_draws(plan: Plan, *, quiet: bool = False) -> Draws:
    """Return what is drawn for each sample; `quiet` drops, noises and flips nothing."""
    config = plan.config
    return Draws(
        seed=config.run.seed,
        patch_size_t=plan.model.patch_size_t,
        caption_dropout=0 if quiet else config.train.caption_dropout,
        image_dropout=0 if quiet else config.train.image_dropout,
        flip_probability=0 if quiet else config.data.flip_probability,
        image_to_video=config.task == "i2v",
        image_noise=config.train.image_noise and not quiet,
    )


def load_transformer(plan: Plan, ranks: Ranks) -> CogVideoXTransformer:
    """Load the transformer (or draw its weights), with a fresh LoRA or with all weights trainable.

    It is divided before there is any memory behind it, so that a process reads and holds its own part alone.
    """
    config = plan.config
    if config.lora.base != "model" or config.train.swapped_blocks:
        return _load_sparingly(plan, ranks)
    dtype, is_lora = plan.dtype, config.train.method == "lora"
    if ranks.mesh is not None and not is_lora and config.train.master_weights == "float32":
        dtype = torch.float32  # what is kept; blocks are gathered in the run's dtype
    with torch.device("meta"):
        transformer = CogVideoXTransformer(plan.model).to(dtype)
    transformer.set_checkpointing(config.train.checkpointing, config.train.checkpointing_layers)
    if is_lora:
        targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump(exclude={"base"}))
        say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    else:
        transformer.requires_grad_(True)
    distribute(transformer, ranks, dtype=plan.dtype)
    transformer.to_empty(device=plan.device)
    if plan.is_random:
        transformer.initialize(config.run.seed)
    else:
        transformer.load_folder(plan.transformer_folder)
    if is_lora:
        lora.initialize_lora(transformer, seed=config.run.seed)
    if config.train.activation_offload:
        Offload(transformer.blocks, device=plan.device)
    return transformer.train()


def _load_sparingly(plan: Plan, ranks: Ranks) -> CogVideoXTransformer:
    """Load the transformer of a LoRA in host memory, so that it never is on the device whole or as it is in the files.

    Its blocks are rounded to few bits there one matrix at a time, or keep their weights on the host.
    """
    config = plan.config
    transformer = CogVideoXTransformer.from_folder(plan.transformer_folder, config=plan.model, dtype=plan.dtype)
    transformer.set_checkpointing(config.train.checkpointing, config.train.checkpointing_layers)
    if config.lora.base != "model":
        quantize(transformer, config.lora.base, device=plan.device)
    targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump(exclude={"base"}))
    say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    whole: set[nn.Parameter] = set()
    if config.train.swapped_blocks:
        whole = Swap(transformer.blocks, config.train.swapped_blocks, device=plan.device).parameters
    transformer.to(plan.device)
    whole |= {parameter for parameter in transformer.parameters() if is_low_bit(parameter)}
    distribute(transformer, ranks, dtype=plan.dtype, whole=whole)
    if config.train.activation_offload:
        Offload(transformer.blocks, device=plan.device)
    return transformer.train()


def make_objective(plan: Plan, transformer: CogVideoXTransformer) -> Objective:
    """Return the loss of the run's transformer."""
    config = VaeConfig.from_folder(plan.folder / "vae")
    return Objective(
        transformer,
        alphas_cumprod=alphas_cumprod(plan.scheduler),
        scales=Scales(video=config.scaling_factor, image=_image_scale(plan.config, config)),
        device=plan.device,
        dtype=plan.dtype,
    )


def make_update(plan: Plan, transformer: CogVideoXTransformer, ranks: Ranks) -> Update:
    """Return what turns gradients into weights.

    Raises:
        FactoryError: stochastic bf16 for a run that is not in bf16.
    """
    train = plan.config.train
    stochastic = train.master_weights == "stochastic_bf16"
    if stochastic and plan.dtype != torch.bfloat16:
        raise FactoryError(
            f"train.master_weights=stochastic_bf16 is for full fine-tuning in bfloat16; this run is in {plan.dtype}. "
            "Use float32 master weights."
        )
    return Update(
        transformer.named_parameters(), dtype=plan.dtype, device=plan.device, betas=(train.beta1, train.beta2),
        eps=train.epsilon, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm,
        stochastic_bf16=stochastic, seed=plan.config.run.seed, optimizer=train.optimizer, beta3=train.beta3,
        offload=train.optimizer_offload, ranks=ranks, spike_factor=train.spike_factor,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """The parts that are not trained, where a run needs them."""

    encoder: Encoder | None
    """Encodes raw clips; None with a cache."""
    vae: CogVideoXVAE | None
    prompt_embeds: Tensor | None
    """Of the negative prompt and the sample videos' prompts [1 + B, S, E]."""


def load_frozen(plan: Plan, source: CacheSource | RawSource, ranks: Ranks) -> Frozen:
    """Load VAE and text encoder where raw clips or sample videos need them, and encode all text that fits.

    The processes of a sequence have the same clips, so they share the encoding.
    """
    config = plan.config
    prompts = config.validation.prompts
    raw = isinstance(source, RawSource)
    if not raw and not prompts:
        return Frozen(encoder=None, vae=None, prompt_embeds=None)
    text_encoder = TextEncoder.from_folder(plan.folder, dtype=plan.dtype, device=plan.device)
    embeds = None
    if prompts:
        embeds = text_encoder.encode([config.sampling.negative_prompt, *prompts], plan.text_length).to(plan.dtype)
    vae = CogVideoXVAE.from_folder(plan.folder / "vae", dtype=plan.dtype, device=plan.device).requires_grad_(False)
    if config.data.vae_tiling:
        vae.enable_tiling()
    vae.group = ranks.video
    encoder = None
    if raw:
        captions = source.captions
        prepare.report_cut_captions(text_encoder, captions, plan.text_length, strict=config.data.strict)
        encoder = Encoder(vae, text_encoder, max_sequence_length=plan.text_length)
        encoder.remember(captions)
    return Frozen(encoder=encoder, vae=vae, prompt_embeds=embeds)


def make_samples(plan: Plan, frozen: Frozen, transformer: CogVideoXTransformer, ranks: Ranks) -> SampleVideos | None:
    """Return what makes the sample videos, if prompts ask for some."""
    if frozen.prompt_embeds is None:
        return None
    assert frozen.vae is not None
    sampling = plan.config.sampling
    pipeline = CogVideoXPipeline(
        transformer=transformer, vae=frozen.vae, text_encoder=None, scheduler=plan.scheduler, device=plan.device,
        dtype=plan.dtype,
    )  # fmt: skip
    return SampleVideos(
        pipeline,
        prompt_embeds=frozen.prompt_embeds[1:],
        negative_embeds=frozen.prompt_embeds[:1],
        images=[read_image(Path(i), plan.shape.height, plan.shape.width) for i in plan.config.validation.images],
        shape=plan.shape,
        tiling=sampling.tiling,
        group=ranks.video,
        call={
            "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.dynamic_guidance, "sampler": sampling.sampler, "seed": plan.config.run.seed,
        },
        ranks=ranks,
    )  # fmt: skip


def export(
    transformer: CogVideoXTransformer, run_folder: Path, *, method: str, ranks: Ranks,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES,
) -> None:  # fmt: skip
    """Write `final/`: a LoRA file or a transformer folder that diffusers loads as it is.

    Divided weights are gathered one parameter at a time, from all processes; the leading one writes, shard by shard.

    Raises:
        StorageError: in all processes.
    """
    arrays = transformer.iterate_arrays() if method == "full" else iter(lora.lora_arrays(transformer).items())
    problem: StorageError | None = None
    if ranks.leads:
        try:
            with replace_folder(run_folder / "final") as folder:
                if method == "lora":
                    file = folder / "pytorch_lora_weights.safetensors"
                    save_lora(file, dict(arrays), **lora.lora_settings(transformer))
                else:
                    config = transformer.config.to_dict()
                    weights.save_folder(folder / "transformer", arrays, config=config, max_shard_bytes=max_shard_bytes)
        except StorageError as error:
            problem = error
    deque(arrays, maxlen=0)  # the others wait for their parts to be asked for, to the end
    ranks.from_lead(lambda: _raise(problem))


def _raise(problem: StorageError | None) -> None:
    if problem is not None:
        raise problem


def _image_scale(config: Config, vae: VaeConfig) -> float:
    return vae.image_scale if config.train.image_scale == "pipeline" else vae.scaling_factor


def _check_validation(plan: Plan) -> None:
    images, prompts = plan.config.validation.images, plan.config.validation.prompts
    if plan.config.task == "i2v" and prompts and len(images) != len(prompts):
        raise FactoryError(
            f"task=i2v: {len(prompts)} validation.prompts need as many validation.images, not {len(images)}"
        )
    for image in images:
        read_image(Path(image), plan.shape.height, plan.shape.width)


def _needs(need: memory.Need) -> str:
    """Return the line about memory that a run begins with."""
    parts = {
        "weights": need.weights + need.gathered, "optimizer": need.masters + need.moments + need.average,
        "gradients": need.gradients, "activations": need.activations, "a block at work": need.working,
    }  # fmt: skip
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    host = f"; {need.host / 2**30:.2f} GiB of host memory" if need.host else ""
    return f"training needs about {need.device / 2**30:.2f} GiB a process: {listed}{host}"


def _say_arithmetic(plan: Plan, sampler: Sampler, update: Update, start: Path | None, ranks: Ranks) -> None:
    train, shape = plan.config.train, plan.shape
    trained = sum(p.numel() for p in update.trained.values())
    layout = ranks.layout
    if layout.size > 1:
        say(
            f"{layout.size} processes: {layout.num_data_ranks} take clips of their own, {layout.sequence} share a "
            f"video's tokens; ZeRO {layout.zero}, {layout.grid[0]} copies of the model in {layout.grid[1]} parts"
        )
    say(f"{len(sampler)} clips at {shape.fps:g} fps, {sampler.epochs(train.steps):.1f} epochs in {train.steps} steps:")
    if len(sampler.set_counts) > 1 or sampler.places != len(sampler):
        for name, (count, weight) in sampler.set_counts.items():
            say(f"  data set {name}: {count} clips x weight {weight:g} = {count * weight:g} places an epoch")
    for key, count in sampler.counts.items():
        size = sampler.batch_sizes[key]
        say(
            f"  {count} of {key} (frames x height x width) = {num_tokens(plan, Bucket.parse(key))} + "
            f"{plan.text_length} tokens; batch {size} ({size // train.gradient_accumulation} x "
            f"{train.gradient_accumulation} accumulated)"
        )
    say(
        f"{train.method}: {trained:,} of {plan.model.num_parameters:,} parameters, {plan.dtype} on {plan.device}, "
        f"checkpointing {train.checkpointing}, "
        f"attention {backend_name(plan.device, plan.dtype, plan.model.attention_head_dim)}"
    )
    _say_optimizer(plan, update)
    say(f"going on from {start}" if start else f"a fresh run in {plan.run_folder}")


def _say_optimizer(plan: Plan, update: Update) -> None:
    train, trained = plan.config.train, list(update.trained.values())
    memory = optimizer_memory(
        train.optimizer, [p.shape for p in trained], half=any(p.dtype != torch.float32 for p in trained),
        stochastic=train.master_weights == "stochastic_bf16", offload=train.optimizer_offload,
    )  # fmt: skip
    count = sum(p.numel() for p in trained)
    parts = {name: value / count for name, value in asdict(memory).items() if value}
    say(
        f"optimizer {train.optimizer}: {sum(parts.values()):.3g} bytes a trained parameter "
        f"({', '.join(f'{name} {value:.3g}' for name, value in parts.items())}"
        f"{'; masters and state in host memory' if train.optimizer_offload else ''})"
    )
    if train.optimizer == "prodigy" and train.learning_rate < 0.1:
        say(
            f"train.learning_rate={train.learning_rate:g}: prodigy finds the step size itself and multiplies it with "
            "this; it is made for 1.0"
        )
