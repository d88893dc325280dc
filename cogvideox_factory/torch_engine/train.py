"""`train`: a cache or raw clips to a run folder with a LoRA or a fine-tuned transformer.

`run` reads as the recipe does: check, load, resume, loop, export. Task, method and source of the data are values, not
four trainers; the loop itself is in `loop.py`.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cogvideox_factory import weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache import open_cache, recorded_dtype
from cogvideox_factory.data.loader import CacheSource, Draws, Loader, RawSource
from cogvideox_factory.data.sampler import Sampler, hold_out
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.metrics import say
from cogvideox_factory.models import SchedulerConfig, TransformerConfig, VaeConfig
from cogvideox_factory.publish import existing_parent, replace_folder, require_room, sweep
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.run_folder import locked, require_same
from cogvideox_factory.shapes import ClipShape, check_task
from cogvideox_factory.torch_engine import checkpoint, lora, prepare
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.device import pick_device, pick_dtype, set_determinism
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.loop import Loop, Watch
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline, resolve_transformer
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import SampleVideos

# Settings that may change between the start of a run and its resumption, because no number depends on them.
_FREE = {
    "dir",
    "steps",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "resume",
    "num_workers",
    "checkpointing",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where the arithmetic happens."""

    folder: Path
    transformer_folder: Path
    device: torch.device
    dtype: torch.dtype


def run(config: Config) -> Path:
    """Train as the settings say and return the run folder.

    Raises:
        FactoryError: settings, data, model, cache, checkpoint or disk unfit, all before the first step.
        NonFiniteError: the loss or a gradient became NaN or Inf.
        StoppedError: stopped by a signal after a checkpoint was saved.
    """
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    transformer_folder = (
        resolve_transformer(config.model.transformer) if config.model.transformer else folder / "transformer"
    )
    model = TransformerConfig.from_folder(transformer_folder)
    check_task(config.task, model, source=str(transformer_folder))
    shape = prepare.training_shape(config, model)
    config = complete(config, model, shape)
    device = pick_device(config.run.device)
    place = Place(
        folder=folder, transformer_folder=transformer_folder, device=device,
        dtype=pick_dtype(config.run.dtype, device, model),
    )  # fmt: skip
    set_determinism(config.run.deterministic)
    run_folder = Path(config.train.dir)
    require_room(run_folder, 0, what="the run")
    start = find_start(config, run_folder)
    source, described = open_source(config, place, model, shape)
    _check_validation(config)
    with locked(run_folder):
        sweep(run_folder)
        write_recipe(run_folder / "config.yaml", config)
        return _train(config, place, model, shape, source, described, start, run_folder)


def complete(config: Config, model: TransformerConfig, shape: ClipShape) -> Config:
    """Return the settings with every `None` that the model decides filled in."""
    data = {
        "num_frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "fps": float(shape.fps),
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "text": config.text.model_copy(update={"max_sequence_length": prepare.text_length(config, model)}),
        }
    )


def find_start(config: Config, run_folder: Path) -> Path | None:
    """Return the checkpoint to go on from, or None to start fresh.

    Raises:
        UnfitError: a named checkpoint that is missing or damaged.
        FactoryError: a used run folder with `train.resume=never`.
    """
    if config.train.resume == "never":
        if checkpoint.list_checkpoints(run_folder) or (run_folder / "final").exists():
            raise FactoryError(f"{run_folder} holds a run already; choose another --train.dir or --train.resume auto")
        return None
    if config.train.resume != "auto":
        folder = Path(config.train.resume)
        checkpoint.verify_checkpoint(folder)
        return folder
    newest, problems = checkpoint.newest_checkpoint(run_folder)
    for problem in problems:
        say(f"skipped: {problem}")
    if problems:
        for step in checkpoint.list_checkpoints(run_folder):
            broken = checkpoint.checkpoint_folder(run_folder, step)
            if newest is None or broken.name > newest.name:
                say(f"moved to {checkpoint.set_aside(broken)}")
    return newest


def open_source(
    config: Config, place: Place, model: TransformerConfig, shape: ClipShape
) -> tuple[CacheSource | RawSource, str]:
    """Return where samples come from, and a digest of what is in it.

    Raises:
        UnfitError: a cache made with other settings, or damaged.
        DataError: raw clips that cannot be used.
    """
    spec = prepare.clip_spec(config, shape)
    if config.cache.dir:
        # What the encoders ran in is the cache's affair: float32 latents feed a bfloat16 run as well.
        dtype = recorded_dtype(Path(config.cache.dir)) or str(place.dtype).removeprefix("torch.")
        settings = prepare.cache_settings(config, place.folder, model, spec, dtype)
        index = open_cache(
            Path(config.cache.dir),
            settings,
            command=f"cogvideox prepare (with this recipe) --cache.dir {config.cache.dir}",
        )
        identity = f"{settings.to_json()} {sorted(clip.id for clip in index.clips)}"
        return CacheSource(index), hashlib.sha256(identity.encode()).hexdigest()
    manifest = prepare.checked_manifest(config, spec)
    identity = f"{spec} {sorted(clip.id for clip in manifest.usable)}"
    return RawSource(manifest.usable, spec), hashlib.sha256(identity.encode()).hexdigest()


def identity(config: Config, described: str) -> dict[str, Any]:
    """Return the settings a resumed run must share with the run it goes on with."""
    train = {f"train.{k}": v for k, v in config.train.model_dump(exclude=_FREE).items()}
    adapters = {f"lora.{k}": v for k, v in config.lora.model_dump().items()} if config.train.method == "lora" else {}
    held = config.validation.num_clips if config.validation.every else 0
    return {
        "task": config.task, "model.path": config.model.path, "model.transformer": config.model.transformer,
        "run.seed": config.run.seed, "run.dtype": config.run.dtype, "data": described,
        "validation.num_clips": held, **train, **adapters,
        **({} if config.train.schedule == "constant" else {"train.steps": config.train.steps}),
    }  # fmt: skip


def _train(
    config: Config,
    place: Place,
    model: TransformerConfig,
    shape: ClipShape,
    source: CacheSource | RawSource,
    described: str,
    start: Path | None,
    run_folder: Path,
) -> Path:
    train_ids, held_ids = sorted(source.buckets), []
    if config.validation.every:
        train_ids, held_ids = hold_out(train_ids, config.validation.num_clips)
    sampler = Sampler(
        train_ids, batch_size=config.train.batch_size * config.train.gradient_accumulation,
        seed=config.run.seed, buckets=source.buckets,
    )  # fmt: skip
    draws = make_draws(config, model, shape)
    loader = Loader(
        source,
        sampler,
        draws,
        num_micros=config.train.gradient_accumulation,
        num_workers=config.train.num_workers,
    )
    wanted = identity(config, described)
    if start is not None:
        require_same(checkpoint.read_state(start)["identity"], wanted, source=start)

    transformer = load_transformer(config, place)
    update = make_update(config, place, transformer)
    ema = Ema(update.masters, decay=config.train.ema_decay) if config.train.ema_decay else None
    vae_config = VaeConfig.from_folder(place.folder / "vae")
    scheduler = SchedulerConfig.from_folder(place.folder / "scheduler", filename="scheduler_config.json")
    objective = Objective(
        transformer,
        alphas_cumprod=alphas_cumprod(scheduler),
        scales=Scales(video=vae_config.scaling_factor, image=_image_scale(config, vae_config)),
        device=place.device,
        dtype=place.dtype,
    )
    encoder, samples = make_frozen(config, place, shape, transformer, scheduler, raw=not config.cache.dir)
    _say_arithmetic(config, place, model, shape, sampler, update, start)
    loop = Loop(
        objective=objective, update=update, ema=ema, sampler=sampler, loader=loader, encoder=encoder, device=place.device,
        run_folder=run_folder, num_steps=config.train.steps, num_micros=config.train.gradient_accumulation,
        rate={
            "peak": config.train.learning_rate, "schedule": config.train.schedule, "num_steps": config.train.steps,
            "warmup_steps": config.train.warmup_steps, "num_cycles": config.train.num_cycles,
            "power": config.train.power,
        },
        log_every=config.train.log_every, save_every=config.train.save_every,
        keep_checkpoints=config.train.keep_checkpoints, identity=wanted,
        tokens_per_sample=num_tokens(model, shape) + (config.text.max_sequence_length or 0),
        watch=Watch(
            every=config.validation.every, source=source, clip_ids=held_ids, samples=samples,
            draws=make_draws(config, model, shape, quiet=True),
        ),
    )  # fmt: skip
    loop.run(start)
    with loop.averaged_weights():
        export(transformer, run_folder, method=config.train.method)
    say(f"final weights in {run_folder / 'final'}")
    return run_folder


def make_draws(config: Config, model: TransformerConfig, shape: ClipShape, *, quiet: bool = False) -> Draws:
    """Return what is drawn for each sample; `quiet` drops, noises and flips nothing."""
    return Draws(
        seed=config.run.seed,
        latent_shape=(shape.latent_frames, model.out_channels, shape.latent_height, shape.latent_width),
        num_front_padding=shape.num_front_padding,
        caption_dropout=0 if quiet else config.train.caption_dropout,
        image_dropout=0 if quiet else config.train.image_dropout,
        flip_probability=0 if quiet else config.data.flip_probability,
        image_to_video=config.task == "i2v",
        image_noise=config.train.image_noise and not quiet,
    )


def load_transformer(config: Config, place: Place) -> CogVideoXTransformer:
    """Load the transformer, with a fresh LoRA or with all weights trainable."""
    transformer = CogVideoXTransformer.from_folder(place.transformer_folder, dtype=place.dtype, device=place.device)
    transformer.set_checkpointing(config.train.checkpointing)
    if config.train.method == "lora":
        targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump())
        say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    else:
        transformer.requires_grad_(True)
    return transformer.train()


def make_update(config: Config, place: Place, transformer: CogVideoXTransformer) -> Update:
    """Return what turns gradients into weights.

    Raises:
        FactoryError: stochastic bf16 for a run that is not in bf16, or for a LoRA.
    """
    stochastic = config.train.master_weights == "stochastic_bf16"
    if stochastic and (config.train.method == "lora" or place.dtype != torch.bfloat16):
        raise FactoryError(
            f"train.master_weights=stochastic_bf16 is for full fine-tuning in bfloat16; this run is "
            f"{config.train.method} in {place.dtype}. Use float32 master weights."
        )
    return Update(
        transformer.named_parameters(), dtype=place.dtype, device=place.device,
        betas=(config.train.beta1, config.train.beta2), eps=config.train.epsilon,
        weight_decay=config.train.weight_decay, max_grad_norm=config.train.max_grad_norm,
        stochastic_bf16=stochastic, seed=config.run.seed,
    )  # fmt: skip


def make_frozen(
    config: Config,
    place: Place,
    shape: ClipShape,
    transformer: CogVideoXTransformer,
    scheduler: SchedulerConfig,
    *,
    raw: bool,
) -> tuple[Encoder | None, SampleVideos | None]:
    """Load the VAE and the text encoder where raw clips or sample videos need them; drop what is done with."""
    prompts = config.validation.prompts if config.validation.every else []
    if not raw and not prompts:
        return None, None
    length = config.text.max_sequence_length
    assert length is not None
    text_encoder = TextEncoder.from_folder(place.folder, dtype=place.dtype, device=place.device)
    vae = CogVideoXVAE.from_folder(place.folder / "vae", dtype=place.dtype, device=place.device)
    vae.requires_grad_(False)
    if config.data.vae_tiling:
        vae.enable_tiling()
    samples = None
    if prompts:
        pipeline = CogVideoXPipeline(
            transformer=transformer, vae=vae, text_encoder=text_encoder, scheduler=scheduler,
            device=place.device, dtype=place.dtype,
        )  # fmt: skip
        samples = SampleVideos(
            pipeline,
            prompt_embeds=pipeline.encode_prompts(prompts, max_sequence_length=length),
            negative_embeds=pipeline.encode_prompts([config.sampling.negative_prompt], max_sequence_length=length),
            images=[Path(image) for image in config.validation.images],
            shape=shape,
            call={
                "num_inference_steps": config.sampling.steps, "guidance_scale": config.sampling.guidance_scale,
                "use_dynamic_cfg": config.sampling.dynamic_guidance, "sampler": config.sampling.sampler,
                "seed": config.run.seed,
            },
        )  # fmt: skip
        pipeline.text_encoder = None
    return (Encoder(vae, text_encoder, max_sequence_length=length) if raw else None), samples


def export(transformer: CogVideoXTransformer, run_folder: Path, *, method: str) -> None:
    """Write `final/`: a LoRA file or a transformer folder that diffusers loads as it is."""
    with replace_folder(run_folder / "final") as folder:
        if method == "lora":
            file = folder / "pytorch_lora_weights.safetensors"
            save_lora(file, lora.lora_arrays(transformer), **lora.lora_settings(transformer))
        else:
            transformer.save(folder / "transformer")


def num_tokens(model: TransformerConfig, shape: ClipShape) -> int:
    """Return the video tokens of one clip."""
    frames = (shape.latent_frames + shape.num_front_padding) // (model.patch_size_t or 1)
    return frames * (shape.latent_height // model.patch_size) * (shape.latent_width // model.patch_size)


def _image_scale(config: Config, vae: VaeConfig) -> float:
    return vae.image_scale if config.train.image_scale == "pipeline" else vae.scaling_factor


def _check_validation(config: Config) -> None:
    images, prompts = config.validation.images, config.validation.prompts
    if config.task == "i2v" and prompts and len(images) != len(prompts):
        raise FactoryError(
            f"task=i2v: {len(prompts)} validation.prompts need as many validation.images, not {len(images)}"
        )
    for image in images:
        if not Path(image).is_file():
            raise FactoryError(f"validation.images: {image} is no file")


def _say_arithmetic(
    config: Config,
    place: Place,
    model: TransformerConfig,
    shape: ClipShape,
    sampler: Sampler,
    update: Update,
    start: Path | None,
) -> None:
    trained = sum(p.numel() for p in update.trained.values())
    tokens = num_tokens(model, shape)
    say(
        f"{len(sampler)} clips of {shape.num_frames} frames {shape.height}x{shape.width} at {shape.fps:g} fps = "
        f"{tokens} + {config.text.max_sequence_length} tokens; batch {sampler.batch_size} "
        f"({config.train.batch_size} x {config.train.gradient_accumulation} accumulated), "
        f"{sampler.epochs(config.train.steps):.1f} epochs in {config.train.steps} steps"
    )
    say(
        f"{config.train.method}: {trained:,} of {model.num_parameters:,} parameters, {place.dtype} on {place.device}, "
        f"checkpointing {config.train.checkpointing}, attention {backend_name()}"
    )
    say(f"going on from {start}" if start else f"a fresh run in {existing_parent(Path(config.train.dir))}")
