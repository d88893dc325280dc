"""The denoising loop: nothing waits for the device, nothing is done twice, and what shortcuts leave out is counted."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cogvideox_factory.diffusion.samplers import guidance_scales, sampler_table
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, SchedulerConfig, tiny_facts
from cogvideox_factory.shapes import clip_shape
from cogvideox_factory.torch_engine import sampling
from cogvideox_factory.torch_engine.lora import add_lora, lora_parameters
from cogvideox_factory.torch_engine.objective import make_ofs, predict_v
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.reuse import Reuse, tea_plan
from cogvideox_factory.torch_engine.sampling import denoise
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.host_reads import HostReads

STEPS = 6
TIMES = torch.tensor([999, 731, 500, 20, 0])


def transformer_of(variant: str, **changes) -> CogVideoXTransformer:
    return CogVideoXTransformer(replace(tiny_facts(variant).transformer, **changes)).requires_grad_(False)


def inputs(model: CogVideoXTransformer, *, batch: int = 1):
    """Return latents, prompt and negative embeddings, and the image's latents where there is one."""
    config, draw = model.config, torch.Generator().manual_seed(1)
    frames = 4 if config.patch_size_t else 3
    latents = torch.randn(batch, frames, 16, 8, 12, generator=draw)
    positive, negative = torch.randn(2, batch, config.max_text_seq_length, config.text_embed_dim, generator=draw)
    image = torch.randn(latents.shape, generator=draw) if config.is_image_to_video else None
    return latents, positive, negative, image


def video(model, *, sampler="ddim", guidance=None, **options):
    latents, positive, negative, image = inputs(model)
    guidance = guidance or [6.0] * STEPS
    return denoise(
        model, latents, positive, table=sampler_table(sampler, SchedulerConfig(), len(guidance)), guidance=guidance,
        negative_embeds=negative, image_latents=image,
        step_noise=lambda step: torch.randn(latents.shape, generator=torch.Generator().manual_seed(step)), **options,
    )  # fmt: skip


# --- time, told for the whole schedule ahead --------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("adapters", [False, True])
@torch.no_grad()
def test_the_whole_schedule_at_once_says_what_each_step_would(variant, adapters):
    model = transformer_of(variant)
    if adapters:  # on the modulation's own rows
        add_lora(model, rank=2, alpha=2, target_modules=["norm1.linear", "norm2.linear"], seed=0)
        for parameter in lora_parameters(model):
            parameter.normal_(generator=torch.Generator().manual_seed(2))
    latents, positive, _, image = inputs(model, batch=2)
    latents = latents if image is None else torch.cat([latents, image], dim=2)
    ofs = make_ofs(model, latents.device, latents.dtype)
    instants = model.instants(model.embed_time(TIMES, ofs, latents.dtype))
    for time, instant in zip(TIMES, instants, strict=True):
        alone = predict_v(model, latents, positive, time.expand(2))
        assert (predict_v(model, latents, positive, instant) - alone).abs().max() <= 1e-6


@torch.no_grad()
def test_in_half_precision_it_is_no_less_exact():
    exact = transformer_of("cogvideox1.5-5b-i2v")
    half = transformer_of("cogvideox1.5-5b-i2v").bfloat16()
    exact.load_state_dict(half.state_dict())
    ofs = torch.full((1,), 2.0)
    wanted = torch.stack([torch.stack(i.blocks) for i in exact.instants(exact.embed_time(TIMES, ofs, torch.float32))])
    times = half.embed_time(TIMES, ofs.bfloat16(), torch.bfloat16)
    together = torch.stack([torch.stack(instant.blocks) for instant in half.instants(times)])
    alone = torch.stack([torch.stack(half.instants(time)[0].blocks) for time in times.split(1)])
    assert (together - wanted).abs().mean() <= 1.01 * (alone - wanted).abs().mean()


def test_the_modulation_is_asked_once_a_video_and_in_parts_where_memory_is_short(monkeypatch):
    model, asked = transformer_of("cogvideox-5b"), []
    model.modulation.register_forward_hook(lambda module, arguments, out: asked.append((len(out), out.nbytes)))
    whole = video(model)
    assert [steps for steps, _ in asked] == [STEPS]
    one = asked.pop()[1] // STEPS
    monkeypatch.setattr(sampling, "_INSTANT_BYTES", 4 * one + one // 2)
    assert (video(model) - whole).abs().max() <= 1e-5
    assert asked == [(4, 4 * one), (2, 2 * one)]
    asked.clear()
    monkeypatch.setattr(sampling, "_INSTANT_BYTES", 1)
    video(model)
    assert [steps for steps, _ in asked] == [1] * STEPS


# --- what is waited for, and what is done -----------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", ["cogvideox-2b", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v"])
def test_no_step_waits_for_the_device(variant, sampler):
    """`count.sync.denoise_step` is 0, first step and last included."""
    model = transformer_of(variant)
    scales = guidance_scales(6.0, STEPS, dynamic=True, interval=(0.0, 0.8))
    assert len(set(scales)) == 5  # 1, three in between, 1 again
    with HostReads() as reads:
        video(model, sampler=sampler, guidance=scales)
    assert reads.found == []


def test_shortcuts_wait_as_often_as_they_say():
    model = transformer_of("cogvideox-5b")
    with HostReads() as reads:
        video(model, reuse=Reuse(tea=0.5))
    assert reads.found == ["cpu", "tolist"], "once, before the first step"
    with HostReads() as reads:
        video(model, reuse=Reuse(first_block=0.5))
    assert reads.found == ["tolist"] * (STEPS - 1), "once a step, when there is something to compare with"


def batches(model: CogVideoXTransformer) -> Counter:
    """Count the calls of each block by its number, and the samples in them."""
    counted: Counter = Counter()
    for number, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, number=number: counted.update({number: len(args[0])}))
    return counted


def test_a_step_without_guidance_predicts_once():
    model = transformer_of("cogvideox-5b")
    counted = batches(model)
    scales = guidance_scales(6.0, STEPS, dynamic=True)
    assert scales[0] == 1
    made = video(model, guidance=scales)
    assert set(counted.values()) == {2 * STEPS - 1}
    nearly = [scale if scale != 1 else 1 + 1e-9 for scale in scales]
    assert (video(model, guidance=nearly) - made).abs().max() <= 1e-5
    counted.clear()
    video(model, guidance=guidance_scales(6.0, STEPS, interval=(0.3, 0.7)))
    assert set(counted.values()) == {2 * STEPS - 4}


# --- shortcuts --------------------------------------------------------------------------------------------------------


def test_a_shortcut_that_is_never_taken_changes_no_bit():
    model = transformer_of("cogvideox1.5-5b")
    plain = video(model)
    for reuse in (Reuse(), Reuse(first_block=1e-12), Reuse(tea=1e-12)):
        assert torch.equal(video(model, reuse=reuse), plain)


@pytest.mark.parametrize(("reuse", "least"), [(Reuse(first_block=1e9), 1), (Reuse(tea=1e9), 2)])
def test_of_steps_that_reuse_only_what_they_say_is_run(reuse, least):
    """The first-block cache runs the first step and every first block; TeaCache the first and the last step."""
    model, told = transformer_of("cogvideox-5b", num_layers=3), []
    counted = batches(model)
    made = video(model, reuse=reuse, told=told.append)
    assert told == [STEPS - least]
    assert counted == {0: 2 * STEPS if reuse.first_block else 2 * least, 1: 2 * least, 2: 2 * least}
    assert torch.isfinite(made).all()
    assert not torch.equal(made, video(model))


def test_what_is_reused_is_what_the_blocks_added():
    """A network whose blocks add the same at every step loses nothing."""
    model = transformer_of("cogvideox-5b", num_layers=3)
    for block in model.blocks:
        block.forward = lambda x, vectors, rotary, text_length, share, video_only: (
            (x + 0.25)[:, text_length:] if video_only else x + 0.25
        )
    plain = video(model)
    for reuse in (Reuse(first_block=0.1), Reuse(tea=1e9)):
        assert (video(model, reuse=reuse) - plain).abs().max() <= 1e-5


def test_where_guidance_begins_or_ends_nothing_is_taken_over():
    scales = guidance_scales(6.0, STEPS, interval=(0.5, 1.0))
    for reuse, layer, samples in ((Reuse(tea=1e9), 0, 1 + 2 + 2), (Reuse(first_block=1e9), 1, 1 + 2)):
        model = transformer_of("cogvideox-5b")
        counted = batches(model)
        video(model, guidance=scales, reuse=reuse)
        assert counted[layer] == samples


def test_a_model_of_one_block_has_nothing_to_leave_out():
    model = transformer_of("cogvideox-5b", num_layers=1)
    assert torch.equal(video(model, reuse=Reuse(first_block=1e9)), video(model))


def test_the_plan_of_teacache_sums_changes_up_to_the_threshold():
    fresh = [True, *[False] * 6]
    assert tea_plan([0.3, 0.3, 0.3, 0.3, 0.3, 0.3], 1.0, fresh) == [True, False, False, False, True, False, True]
    assert tea_plan([2.0] * 6, 1.0, fresh) == [True] * 7
    assert tea_plan([0.0] * 6, 1.0, fresh) == [True, *[False] * 5, True]
    assert tea_plan([0.0] * 6, 1.0, [True, False, False, True, False, False, False])[3]
    assert tea_plan([], 1.0, [True]) == [True]
    assert tea_plan([float("nan")] * 2, 1.0, fresh[:3]) == [True] * 3, "what is no number leaves nothing out"


def test_what_processes_agree_on_is_sent_from_the_device_it_is_on(monkeypatch):
    """The groups of cards have no way for what is in host memory."""
    sent = []

    def broadcast(tensor, **options):
        sent.append(tensor.device.type)
        raise InterruptedError

    monkeypatch.setattr("torch.distributed.broadcast", broadcast)
    with pytest.raises(InterruptedError):
        Reuse(tea=1.0, group=object())._changes(torch.empty(3, 4, device="meta"))
    assert sent == ["meta"]


def test_the_polynomial_is_of_the_change():
    embeddings = torch.tensor([[1.0, -1.0], [1.5, -1.5], [1.5, -1.5]])  # changes by a half, then by nothing
    assert Reuse(tea=1.0)._changes(embeddings) == [0.5, 0.0]
    assert Reuse(tea=1.0, tea_polynomial=(4.0, 2.0, 0.125))._changes(embeddings) == [1 + 1 + 0.125, 0.125]
    with pytest.raises(FactoryError, match="use one of them"):
        Reuse(first_block=0.1, tea=0.1)


# --- padding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_frames", [9, 13, 77, 81, 85])
def test_no_token_is_of_padding_alone(num_frames):
    """1.5 pads a latent frame in front where their number is odd; it shares its tokens with the first real one."""
    config = PUBLISHED["cogvideox1.5-5b"].transformer
    shape = clip_shape(config, num_frames=num_frames, height=None, width=None)
    assert shape.num_front_padding < config.patch_size_t
    assert (shape.latent_frames + shape.num_front_padding) // config.patch_size_t == -(-shape.latent_frames // 2)


def test_padding_is_not_decoded(tiny_model):
    pipe = CogVideoXPipeline.from_pretrained(tiny_model("cogvideox1.5-5b"), device="cpu", text_encoder=False)
    decoded = []
    pipe.vae = SimpleNamespace(
        config=pipe.vae.config,
        decode=lambda latents: decoded.append(latents.shape) or torch.zeros(1, 3, 9, 64, 96),
    )  # fmt: skip
    _, positive, negative, _ = inputs(pipe.transformer)
    call = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 1}
    pipe(prompt_embeds=positive, negative_prompt_embeds=negative, **call)
    assert decoded == [(1, 3, 16, 8, 12)]
