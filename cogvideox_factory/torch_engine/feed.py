"""What a run is fed with: clips and their draws, the parts that are not trained, and the prompts it shows."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cogvideox_factory import intake
from cogvideox_factory.data.cache import is_imported, open_cache, recorded_dtype
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import CacheSource, Draws, RawSource
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.torch_engine import prepare
from cogvideox_factory.torch_engine.device import dtype_name
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.resume import digest_of
from cogvideox_factory.torch_engine.start import Plan
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import SampleVideos


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
        dtype = recorded_dtype(Path(config.cache.dir)) or dtype_name(plan.dtype)
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
        tiling=sampling.tiling is not False,
        group=ranks.video,
        call={
            "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.dynamic_guidance, "sampler": sampling.sampler, "seed": plan.config.run.seed,
        },
        ranks=ranks,
    )  # fmt: skip
