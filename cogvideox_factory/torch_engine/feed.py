"""What a run is fed with: clips and their draws, the parts that are not trained, and the prompts it shows."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import CacheSource, RawSource
from cogvideox_factory.entries import report_cut_captions
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.start import Plan
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import SampleVideos


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
        texts = [config.sampling.negative_prompt, *prompts]
        report_cut_captions(text_encoder.truncated_tokens, texts, plan.text_length, strict=False, called="prompts")
        embeds = text_encoder.encode(texts, plan.text_length).to(plan.dtype)
    vae = CogVideoXVAE.from_folder(plan.folder / "vae", dtype=plan.dtype, device=plan.device).requires_grad_(False)
    if config.data.vae_tiling:
        vae.enable_tiling()
    vae.group = ranks.video
    encoder = None
    if raw:
        captions = source.captions
        report_cut_captions(text_encoder.truncated_tokens, captions, plan.text_length, strict=config.data.strict)
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
