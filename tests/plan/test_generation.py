"""Memory of a video by formula against runs that are traced, mode by mode, on tensors without memory behind them.

On them everything takes the way it takes on a card (`meta` is no CPU), so what is counted is what a card would hold.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5EncoderModel

from cogvideox_factory.diffusion.samplers import sampler_table
from cogvideox_factory.models import PUBLISHED, ModelFacts, VaeConfig, tiny_facts
from cogvideox_factory.plan import decoding
from cogvideox_factory.plan.generation import T5_XXL, Generation, TextModel, need
from cogvideox_factory.shapes import clip_shape
from cogvideox_factory.torch_engine import passage, swap
from cogvideox_factory.torch_engine.device import memory_allocated, peak_memory, pick_device, reset_peak_memory
from cogvideox_factory.torch_engine.loading import Keeping
from cogvideox_factory.torch_engine.positions import make_positions
from cogvideox_factory.torch_engine.sampling import denoise
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.turns import Turns
from cogvideox_factory.torch_engine.vae import CogVideoXVAE, uint8_from_pixels
from cogvideox_factory.torch_engine.vae_scratch import Scratch
from tests.torch_engine.live_memory import LiveMemory

META, BF16 = torch.device("meta"), torch.bfloat16
TEXT = T5Config(
    vocab_size=2000, d_model=256, d_kv=32, num_heads=8, d_ff=640, num_layers=6, feed_forward_proj="gated-gelu"
)


@pytest.fixture
def as_on_a_card(monkeypatch):
    """Let tensors without memory be a card: copies are done at once, and buffers are freed when they are given back."""

    def give(self, tensor: Tensor) -> None:
        if self.is_active:
            tensor.untyped_storage().resize_(0)

    monkeypatch.setattr(Scratch, "give", give)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind=None: False)  # which knows no such kind of device
    for module in (passage, swap):
        monkeypatch.setattr(module, "host_like", lambda tensor: torch.empty_like(tensor, device="cpu"))
    monkeypatch.setattr(passage.Lane, "__init__", lambda self, device: setattr(self, "stream", None))


def numbers(facts: ModelFacts, **options) -> Generation:
    """Return a video of the model's own size in bfloat16."""
    shape = clip_shape(facts.transformer, num_frames=facts.num_frames, height=facts.height, width=facts.width)
    values = {
        "model": facts.transformer, "vae": facts.vae, "num_frames": shape.num_frames, "height": shape.height,
        "width": shape.width, "latent_frames": shape.latent_frames + shape.num_front_padding,
        "text_tokens": facts.transformer.max_text_seq_length, "item_bytes": 2,
    }  # fmt: skip
    return Generation(**values | options)


def shallow(facts: ModelFacts) -> ModelFacts:
    """Return the model with two layers, which take what all take one after the other."""
    return replace(facts, transformer=replace(facts.transformer, num_layers=2))


def run_denoise(model: CogVideoXTransformer, video: Generation, device: torch.device = META) -> Tensor:
    dtype = {2: BF16, 4: torch.float32}[video.item_bytes]
    size = 1, video.latent_frames, 16, video.height // 8, video.width // 8
    prompt = torch.zeros(1, video.text_tokens, video.model.text_embed_dim, dtype=dtype, device=device)
    return denoise(
        model, torch.zeros(size, device=device), prompt, negative_embeds=prompt.clone() if video.guided else None,
        table=sampler_table("dpm", PUBLISHED["cogvideox-5b"].scheduler, 2), guidance=[6.0 if video.guided else 1.0] * 2,
        image_latents=torch.zeros(size, device=device) if video.model.is_image_to_video else None,
        step_noise=lambda step: torch.zeros(size, device=device),
    )  # fmt: skip


def run_decode(vae: CogVideoXVAE, video: Generation, device: torch.device = META) -> Tensor:
    vae.enable_tiling() if video.tiling else vae.disable_tiling()
    size = 1, (video.num_frames - 1) // 4 + 1, 16, video.height // 8, video.width // 8
    return uint8_from_pixels(vae.decode(torch.zeros(size, dtype=vae.dtype, device=device)))


# --- real sizes, weights apart ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_denoising_at_real_size(name, as_on_a_card):
    facts = shallow(PUBLISHED[name])
    for options in ({}, {"guided": False}, {"item_bytes": 4}):
        video = numbers(facts, **options)
        with torch.device(META):
            model = CogVideoXTransformer(facts.transformer).to({2: BF16, 4: torch.float32}[video.item_bytes])
        make_positions.cache_clear()  # they count, once
        with torch.inference_mode(), LiveMemory() as memory:
            run_denoise(model, video)
        told = need(video)
        assert told.denoise - told.weights == pytest.approx(memory.peak, rel=0.1), (name, options)


@pytest.mark.parametrize("tiling", [False, True])
@pytest.mark.parametrize(("num_frames", "item_bytes"), [(17, 2), (13, 4), (1, 2)])
def test_decoding_at_real_size(tiling, num_frames, item_bytes, as_on_a_card):
    facts = PUBLISHED["cogvideox-5b"]
    video = numbers(
        facts, num_frames=num_frames, item_bytes=item_bytes, tiling=tiling, offload="model", height=320, width=480
    )
    with torch.device(META):
        vae = CogVideoXVAE(facts.vae).to({2: BF16, 4: torch.float32}[item_bytes]).requires_grad_(False)
    with torch.inference_mode(), LiveMemory() as memory:
        run_decode(vae, video)
    weights = decoding.parameters(facts.vae)[1] * item_bytes
    assert need(video).decode - weights == pytest.approx(memory.peak, rel=0.1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_are_exact(name):
    for facts in (PUBLISHED[name], tiny_facts(name)):
        with torch.device(META):
            vae, model = CogVideoXVAE(facts.vae), CogVideoXTransformer(facts.transformer)
        parts = [sum(p.numel() for p in part.parameters()) for part in (vae.encoder, vae.decoder)]
        assert decoding.parameters(facts.vae) == tuple(parts)
        held = sum(t.numel() for t in (*model.parameters(), *model.buffers()))
        assert need(numbers(facts, item_bytes=4)).weights == 4 * (held + sum(parts))


def test_the_text_encoder_is_as_large_as_it_says():
    with torch.device(META):
        model = T5EncoderModel(TEXT)
        xxl = T5EncoderModel(T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24,
            feed_forward_proj="gated-gelu",
        ))  # fmt: skip
    assert text_of(TEXT).num_parameters == sum(p.numel() for p in model.parameters())
    assert T5_XXL.num_parameters == sum(p.numel() for p in xxl.parameters())


def text_of(config: T5Config) -> TextModel:
    names = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")
    return TextModel.t5(**{name: getattr(config, name) for name in names})


# --- whole runs, mode by mode -----------------------------------------------------------------------------------------

MIDDLE = replace(
    PUBLISHED["cogvideox1.5-5b"],
    transformer=replace(
        PUBLISHED["cogvideox1.5-5b"].transformer, num_attention_heads=6, num_layers=8, time_embed_dim=128,
        text_embed_dim=256, max_text_seq_length=64,
    ),
    vae=VaeConfig(block_out_channels=(32, 64, 64, 128), norm_num_groups=8, sample_height=160, sample_width=160),
    num_frames=17, height=192, width=320,
)  # fmt: skip
"""Weights and activations of one size, so that neither hides an error in the other."""

WAYS = [Keeping(), Keeping(offload="model"), Keeping(offload="group", group=2), Keeping(offload="block")]


def phases(keeping: Keeping, video: Generation, device: torch.device, peak_of) -> tuple[int, int, int]:
    """Make a whole video; return the most bytes of each phase, as `peak_of(work)` counts those on `device`."""
    encoders = [T5EncoderModel(TEXT).encoder.to(BF16).requires_grad_(False).eval()]
    model = CogVideoXTransformer(MIDDLE.transformer).to(BF16).requires_grad_(False)
    vae = CogVideoXVAE(MIDDLE.vae).to(BF16).requires_grad_(False)
    if keeping.offload in ("block", "group"):
        Turns(device, keeping.offload, group=keeping.group).add(encoders[0], encoders[0].block)
    else:
        encoders[0].to(device)
    ids = torch.zeros(1, video.text_tokens, dtype=torch.int64, device=device)
    text = peak_of(lambda: encoders[0](ids, return_dict=False))
    encoders.clear()
    turns = keeping.turns(device)
    if turns:
        turns.add(model, model.blocks)
        turns.add(vae.encoder)
        turns.add(vae.decoder)
    else:
        model.to(device)
        vae.to(device)
    return text, peak_of(lambda: run_denoise(model, video, device)), peak_of(lambda: run_decode(vae, video, device))


def assert_announced(video: Generation, text: int, denoising: int, decoding: int) -> None:
    told = need(video)
    assert told.text == pytest.approx(text, rel=0.1)
    assert told.denoise == pytest.approx(denoising, rel=0.1)
    assert told.decode == pytest.approx(decoding, rel=0.1)
    assert told.device == pytest.approx(max(text, denoising, decoding), rel=0.1)


def video_kept(keeping: Keeping) -> Generation:
    return numbers(MIDDLE, text=text_of(TEXT), offload=keeping.offload, group=keeping.group, tiling=False)


@pytest.mark.parametrize("keeping", WAYS, ids=lambda keeping: keeping.offload)
def test_every_mode_takes_what_was_announced(keeping, as_on_a_card):
    video = video_kept(keeping)
    make_positions.cache_clear()
    with torch.no_grad(), LiveMemory(device_type="meta") as memory:

        def peak_of(work) -> int:
            memory.peak = memory.bytes
            work()
            return memory.peak

        assert_announced(video, *phases(keeping, video, META, peak_of))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="there is no accelerator to measure")
@pytest.mark.parametrize("keeping", WAYS, ids=lambda keeping: keeping.offload)
def test_a_card_takes_what_was_announced(keeping):
    video, card = video_kept(keeping), pick_device("auto")

    others = memory_allocated(card)  # of tests before this one

    def peak_of(work) -> int:
        reset_peak_memory(card)
        work()
        return peak_memory(card) - others

    with torch.no_grad():
        assert_announced(video, *phases(keeping, video, card, peak_of))
