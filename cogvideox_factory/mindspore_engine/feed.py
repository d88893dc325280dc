"""What a run is fed with beside its clips: the parts that are not trained, and the prompts it shows."""

from dataclasses import dataclass
from pathlib import Path

from mindspore import Tensor

from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.loader import CacheSource, RawSource
from cogvideox_factory.entries import report_cut_captions
from cogvideox_factory.mindspore_engine.encode import Encoder
from cogvideox_factory.mindspore_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.mindspore_engine.start import Plan
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE
from cogvideox_factory.mindspore_engine.watch import SampleVideos


@dataclass(frozen=True, kw_only=True, slots=True)
class Frozen:
    """The parts that are not trained, where a run needs them."""

    encoder: Encoder | None
    """Encodes raw clips; None with a cache."""
    vae: CogVideoXVAE | None
    prompt_embeds: list[Tensor]
    """Of the negative prompt and the sample videos' prompts, each [1, S, E]; none without prompts."""


def load_frozen(plan: Plan, source: CacheSource | RawSource) -> Frozen:
    """Load VAE and text encoder where raw clips or sample videos need them, and encode all text that fits."""
    config, machine = plan.config, plan.machine
    prompts = config.validation.prompts
    raw = isinstance(source, RawSource)
    if not raw and not prompts:
        return Frozen(encoder=None, vae=None, prompt_embeds=[])
    text_encoder = TextEncoder.from_folder(plan.folder, dtype=machine.dtype, mode=machine.mode)
    texts = [config.sampling.negative_prompt, *prompts] if prompts else []
    report_cut_captions(text_encoder.truncated_tokens, texts, plan.text_length, strict=False, called="prompts")
    embeds = [text_encoder.encode([text], plan.text_length) for text in texts]
    vae = CogVideoXVAE.from_folder(plan.folder / "vae", dtype=machine.dtype, mode=machine.mode)
    if config.data.vae_tiling:
        vae.enable_tiling()
    encoder = None
    if raw:
        captions = source.captions
        report_cut_captions(text_encoder.truncated_tokens, captions, plan.text_length, strict=config.data.strict)
        encoder = Encoder(vae, text_encoder, max_sequence_length=plan.text_length)
        encoder.remember(captions)
    return Frozen(encoder=encoder, vae=vae, prompt_embeds=embeds)


def make_samples(plan: Plan, frozen: Frozen, transformer: CogVideoXTransformer) -> SampleVideos | None:
    """Return what makes the sample videos, if prompts ask for some."""
    if not frozen.prompt_embeds:
        return None
    assert frozen.vae is not None
    sampling = plan.config.sampling
    pipeline = CogVideoXPipeline(
        transformer=transformer, vae=frozen.vae, scheduler=plan.scheduler, machine=plan.machine
    )
    return SampleVideos(
        pipeline,
        prompt_embeds=frozen.prompt_embeds[1:],
        negative_embeds=frozen.prompt_embeds[0],
        images=[read_image(Path(i), plan.shape.height, plan.shape.width) for i in plan.config.validation.images],
        shape=plan.shape,
        tiling=sampling.tiling is not False,
        ranks=plan.machine.ranks,
        call={
            "num_inference_steps": sampling.steps, "guidance_scale": sampling.guidance_scale,
            "use_dynamic_cfg": sampling.dynamic_guidance, "sampler": sampling.sampler, "seed": plan.config.run.seed,
        },
    )  # fmt: skip
