"""What a training run is, before a framework is imported: its model and shape, its clips, and the size of its steps.

Both engines begin here, so that the same settings mean the same run.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.auto_buckets import balanced_batches, step_cost
from cogvideox_factory.data.buckets import Bucket, read_buckets
from cogvideox_factory.data.cache_index import is_imported, open_cache, recorded_dtype
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import NUM_TRAIN_TIMESTEPS, CacheSource, Draws, RawSource
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.plan.flops import training_flops
from cogvideox_factory.resume import digest_of
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape, num_video_tokens


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything about a run that is known before a weight is loaded, but for the machine."""

    config: Config
    folder: Path
    transformer_folder: Path
    model: TransformerConfig
    scheduler: SchedulerConfig
    shape: ClipShape

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.train.dir)

    @property
    def is_random(self) -> bool:
        """Whether the transformer starts from random weights."""
        return bool(self.config.model.transformer_config) and not self.config.model.transformer

    @property
    def text_length(self) -> int:
        """Tokens of a caption."""
        return intake.text_length(self.config, self.model)


def read_plan(config: Config) -> RunPlan:
    """Read the configs of the model and check task, shape and text length against them."""
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    transformer_folder = intake.transformer_folder(config, folder)
    model = intake.transformer_config(config, folder)
    check_task(config.task, model, source=str(transformer_folder))
    scheduler = SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json")
    if scheduler.num_train_timesteps != NUM_TRAIN_TIMESTEPS:
        raise FactoryError(
            f"{folder / 'scheduler'}: num_train_timesteps={scheduler.num_train_timesteps}; timesteps are drawn from "
            f"{NUM_TRAIN_TIMESTEPS}, which every CogVideoX checkpoint has. Check scheduler_config.json."
        )
    shape = intake.training_shape(config, model)
    return RunPlan(
        config=complete(config, model, shape), folder=folder, transformer_folder=transformer_folder, model=model,
        scheduler=scheduler, shape=shape,
    )  # fmt: skip


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
            "text": config.text.model_copy(update={"max_sequence_length": intake.text_length(config, model)}),
        }
    )


def check_sample_images(plan: RunPlan) -> None:
    """See that the prompts of sample videos have the images they need, and that these can be read.

    Raises:
        FactoryError: another number of them than of prompts.
        DataError: one that cannot be read.
    """
    images, prompts = plan.config.validation.images, plan.config.validation.prompts
    if plan.config.task == "i2v" and prompts and len(images) != len(prompts):
        raise FactoryError(
            f"task=i2v: {len(prompts)} validation.prompts need as many validation.images, not {len(images)}"
        )
    for image in images:
        read_image(Path(image), plan.shape.height, plan.shape.width)


def num_tokens(plan: RunPlan, bucket: Bucket) -> int:
    """Return the video tokens of one clip of a shape."""
    shape = clip_shape(plan.model, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
    return num_video_tokens(plan.model, shape)


def model_flops(plan: RunPlan, bucket: Bucket, *, adapter_weights: int) -> int:
    """Return the model FLOPs of training on one clip of a shape, forward and backward."""
    return training_flops(
        plan.model, video_tokens=num_tokens(plan, bucket), text_length=plan.text_length,
        method=plan.config.train.method, adapter_weights=adapter_weights,
    )  # fmt: skip


def excluded_clips(path: str | None) -> set[str]:
    """Return the clip ids of `train.exclude`.

    Raises:
        FactoryError: no such file, or a line that names no clip.
    """
    if path is None:
        return set()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FactoryError(f"train.exclude={path} cannot be read: {error}. Give a quarantine.jsonl.") from error
    found = set()
    for number, line in enumerate(lines, 1):
        try:
            found.add(str(json.loads(line)["clip"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FactoryError(
                f'train.exclude={path}, line {number}: every line is an object with a clip id, {{"clip": "…"}}.'
            ) from error
    return found


def batch_sizes(plan: RunPlan, keys: Iterable[str]) -> dict[str, int]:
    """Return the clips of a forward pass for each shape in use: the same number, or what the buckets say.

    A bucket file states them. `auto` gives shapes that cost less than the full one so many more clips that a step
    costs about as much.
    """
    config, shape = plan.config, plan.shape
    size, used = config.train.batch_size, {Bucket.parse(key) for key in keys}
    if config.data.buckets is None:
        return {bucket.key: size for bucket in used}
    if config.data.buckets != "auto":
        listed = read_buckets(Path(config.data.buckets), seed=config.run.seed)
        return {bucket.key: listed.batch_size(bucket) for bucket in used}
    width = plan.model.num_attention_heads * plan.model.attention_head_dim

    def cost(bucket: Bucket) -> float:
        return step_cost(num_tokens(plan, bucket) + plan.text_length, width=width)

    native = cost(Bucket(shape.num_frames, shape.height, shape.width))
    sizes = balanced_batches({bucket: cost(bucket) for bucket in used}, batch_size=size, native_cost=native)
    return {bucket.key: count for bucket, count in sizes.items()}


def open_source(plan: RunPlan, dtype: str) -> tuple[CacheSource | RawSource, str, dict[str, float]]:
    """Return where samples come from, a digest of what is in it, and the weights of its data sets if it has several.

    A run that names no clips takes the weights its cache was prepared with. `dtype` is what the run encodes in.

    Raises:
        UnfitError: a cache made with other settings or from other clips, or damaged.
        DataError: raw clips that cannot be used.
    """
    config = plan.config
    spec = intake.clip_spec(config, plan.shape)
    if config.cache.dir:
        # What the encoders ran in is the cache's affair: float32 latents feed a bfloat16 run as well.
        dtype = recorded_dtype(Path(config.cache.dir)) or dtype
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
    source = RawSource(manifest.usable, latent_channels=plan.model.out_channels, counts=manifest.counts())
    return source, digest_of(clip_ids, spec), intake.set_weights(config)


def make_draws(plan: RunPlan, *, quiet: bool = False) -> Draws:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Clips:
    """What a run is trained on."""

    source: CacheSource | RawSource
    sizes: dict[str, int]
    """Clips of a forward pass for each shape."""
    set_weights: dict[str, float]
    """Of data sets, if there are several."""
    excluded: set[str]
    described: str
    """A digest of all that decides which clips a step has."""


def open_clips(plan: RunPlan, dtype: str) -> Clips:
    """Open the data of a run; raises as `open_source`, `batch_sizes` and `excluded_clips`."""
    config = plan.config
    source, described, set_weights = open_source(plan, dtype)
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
    return Clips(source=source, sizes=sizes, set_weights=set_weights, excluded=excluded, described=described)
