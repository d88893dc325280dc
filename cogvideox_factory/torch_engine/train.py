"""`train`: a cache or raw clips to a run folder with a LoRA or a fine-tuned transformer.

`run` reads as the recipe does: check, load, resume, loop, export. Task, method and source of the data are values, not
four trainers; the loop itself is in `loop.py`.
"""

from collections import deque
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory import intake
from cogvideox_factory.config import Config
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.cache import is_imported, open_cache, recorded_dtype
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import CacheSource, Draws, Loader, RawSource
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.metrics import say, speaking
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.publish import replace_folder, require_room, sweep
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.run_folder import locked, require_same
from cogvideox_factory.torch_engine import checkpoint, lora, prepare
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.device import set_determinism, take_card
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.loop import Loop, Watch
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.parallel import Layout, Ranks, distribute, joined, num_processes
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.start import (
    Plan,
    batch_sizes,
    digest_of,
    find_start,
    identity,
    make_plan,
    num_tokens,
)
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import SampleVideos


def run(config: Config) -> Path:
    """Train as the settings say and return the run folder.

    Raises:
        FactoryError: settings, data, model, cache, checkpoint or disk unfit, all before the first step.
        NonFiniteError: the loss or a gradient became NaN or Inf.
        StoppedError: stopped by a signal after a checkpoint was saved.
    """
    if not config.cache.dir and not config.data_sets:
        raise FactoryError("train on what? give --cache.dir FOLDER (prepared) or --data.root FOLDER (raw clips)")
    take_card()
    plan = make_plan(config)
    _check_validation(plan)
    layout = Layout(size=num_processes(), **config.parallel.model_dump(exclude={"timeout_seconds", "hang_seconds"}))
    heads = plan.model.num_attention_heads
    set_determinism(config.run.deterministic)
    seconds = config.parallel.timeout_seconds
    with joined(layout, num_heads=heads, device=plan.device, timeout_seconds=seconds) as ranks, speaking(ranks.leads):
        return _run(plan, ranks)


def _run(plan: Plan, ranks: Ranks) -> Path:
    config = plan.config
    source, described, weights = open_source(plan)
    sizes = batch_sizes(plan, source.buckets.values())
    if config.data.buckets:  # which clips a step has depends on these too
        described = digest_of(sorted(source.buckets), described, sorted(source.buckets.items()), sorted(sizes.items()))
    if weights:
        described = digest_of(sorted(source.sets), described, sorted(source.sets.items()), sorted(weights.items()))
    with ExitStack() as stack:
        ranks.from_lead(lambda: stack.enter_context(locked(plan.run_folder)))
        start = ranks.from_lead(lambda: find_start(plan))
        wanted = identity(plan, described)
        if start is not None:
            state = checkpoint.read_state(start)
            require_same(state["identity"], wanted, source=start)
            if state["step"] > config.train.steps:
                raise FactoryError(
                    f"train.steps={config.train.steps}, but {start} is at step {state['step']} already. "
                    "Ask for more steps, or start a new run in another --train.dir."
                )
        _train(plan, source, sizes, weights, ranks, start=start, wanted=wanted)
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
        weights = intake.set_weights(config) if config.data_sets else recorded
        return CacheSource(index), digest_of(clip_ids, settings.to_json()), weights
    manifest = intake.checked_manifest(config, spec, plan.model)
    clip_ids = sorted(clip.id for clip in manifest.usable)
    source = RawSource(manifest.usable, latent_channels=plan.model.out_channels)
    return source, digest_of(clip_ids, spec), intake.set_weights(config)


def _train(
    plan: Plan,
    source: CacheSource | RawSource,
    sizes: dict[str, int],
    weights: dict[str, float],
    ranks: Ranks,
    *,
    start: Path | None,
    wanted: dict[str, Any],
) -> None:
    config = plan.config
    train_ids, held_ids = sorted(source.buckets), []
    if config.validation.every:
        train_ids, held_ids = hold_out(train_ids, config.validation.num_clips)
        if unseen := len(source.buckets) - len(train_ids) - len(held_ids):
            say(f"{unseen} other windows of the {len(held_ids)} clips held out are not trained on either")
    sampler = Sampler(
        train_ids, batch_size={key: size * config.train.gradient_accumulation for key, size in sizes.items()},
        seed=config.run.seed, buckets=source.buckets, sets=source.sets, weights=weights,
    )  # fmt: skip
    loader = Loader(
        source, sampler, make_draws(plan), num_micros=config.train.gradient_accumulation,
        num_workers=config.train.num_workers, rank=ranks.data_rank, num_ranks=ranks.layout.num_data_ranks,
    )  # fmt: skip
    # The text encoder is the largest part; it is done with, where it can be, before the transformer is loaded.
    frozen = load_frozen(plan, source)
    transformer = load_transformer(plan, ranks)
    update = make_update(plan, transformer, ranks)
    ema = Ema(update, decay=config.train.ema_decay) if config.train.ema_decay else None
    vae_config = VaeConfig.from_folder(plan.folder / "vae")
    objective = Objective(
        transformer,
        alphas_cumprod=alphas_cumprod(plan.scheduler),
        scales=Scales(video=vae_config.scaling_factor, image=_image_scale(config, vae_config)),
        device=plan.device,
        dtype=plan.dtype,
    )
    loop = Loop(
        objective=objective, update=update, ema=ema, sampler=sampler, loader=loader, encoder=frozen.encoder,
        device=plan.device, run_folder=plan.run_folder, num_steps=config.train.steps,
        num_micros=config.train.gradient_accumulation,
        rate={
            "peak": config.train.learning_rate, "schedule": config.train.schedule, "num_steps": config.train.steps,
            "warmup_steps": config.train.warmup_steps, "num_cycles": config.train.num_cycles,
            "power": config.train.power,
        },
        log_every=config.train.log_every, save_every=config.train.save_every,
        keep_checkpoints=config.train.keep_checkpoints, identity=wanted,
        tokens={key: num_tokens(plan, Bucket.parse(key)) + plan.text_length for key in sizes},
        watch=Watch(
            every=config.validation.every, source=source, clip_ids=held_ids, draws=make_draws(plan, quiet=True),
            samples=make_samples(plan, frozen, transformer),
        ),
        ranks=ranks, hang_seconds=config.parallel.hang_seconds,
    )  # fmt: skip
    _say_arithmetic(plan, sampler, update, start, ranks)
    ranks.from_lead(lambda: _make_ready(plan, loop.state_bytes()))
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
    """Load the transformer (or draw its weights), with a fresh LoRA or with all weights trainable, and divide it."""
    config = plan.config
    dtype = plan.dtype
    if ranks.mesh is not None and config.train.method == "full" and config.train.master_weights == "float32":
        dtype = torch.float32  # what is kept; blocks are gathered in the run's dtype
    if config.model.transformer_config:
        transformer = CogVideoXTransformer(plan.model)
        transformer.initialize(config.run.seed)
        transformer.to(device=plan.device, dtype=dtype)
    else:
        transformer = CogVideoXTransformer.from_folder(plan.transformer_folder, dtype=dtype, device=plan.device)
    transformer.set_checkpointing(config.train.checkpointing)
    if config.train.method == "lora":
        targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump())
        say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    else:
        transformer.requires_grad_(True)
    distribute(transformer, ranks, dtype=plan.dtype)
    return transformer.train()


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
        stochastic_bf16=stochastic, seed=plan.config.run.seed, ranks=ranks,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """The parts that are not trained, where a run needs them."""

    encoder: Encoder | None
    """Encodes raw clips; None with a cache."""
    vae: CogVideoXVAE | None
    prompt_embeds: Tensor | None
    """Of the negative prompt and the sample videos' prompts [1 + B, S, E]."""


def load_frozen(plan: Plan, source: CacheSource | RawSource) -> Frozen:
    """Load VAE and text encoder where raw clips or sample videos need them, and encode all text that fits."""
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
    encoder = None
    if raw:
        captions = source.captions
        prepare.report_cut_captions(text_encoder, captions, plan.text_length, strict=config.data.strict)
        encoder = Encoder(vae, text_encoder, max_sequence_length=plan.text_length)
        encoder.remember(captions)
    return Frozen(encoder=encoder, vae=vae, prompt_embeds=embeds)


def make_samples(plan: Plan, frozen: Frozen, transformer: CogVideoXTransformer) -> SampleVideos | None:
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
        images=[Path(image) for image in plan.config.validation.images],
        shape=plan.shape,
        tiling=(sampling.tiling, plan.config.data.vae_tiling),
        call={
            "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.dynamic_guidance, "sampler": sampling.sampler, "seed": plan.config.run.seed,
        },
    )  # fmt: skip


def export(transformer: CogVideoXTransformer, run_folder: Path, *, method: str, ranks: Ranks) -> None:
    """Write `final/`: a LoRA file or a transformer folder that diffusers loads as it is."""
    if not ranks.leads:  # weights are gathered one at a time, from all
        lora.lora_arrays(transformer) if method == "lora" else deque(transformer.iterate_arrays(), maxlen=0)
        return
    with replace_folder(run_folder / "final") as folder:
        if method == "lora":
            file = folder / "pytorch_lora_weights.safetensors"
            save_lora(file, lora.lora_arrays(transformer), **lora.lora_settings(transformer))
        else:
            transformer.save(folder / "transformer")


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
    say(f"going on from {start}" if start else f"a fresh run in {plan.run_folder}")
