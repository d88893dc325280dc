"""The formula of `plan.flops` against torch's counter of what a model really computes."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cogvideox_factory.models import PUBLISHED, tiny_facts
from cogvideox_factory.plan.flops import forward_flops, training_flops
from cogvideox_factory.plan.memory import FROZEN_KEPT
from cogvideox_factory.torch_engine.lora import add_lora
from cogvideox_factory.torch_engine.objective import predict_v
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

TEXT, FRAMES, HEIGHT, WIDTH, RANK = 16, 4, 8, 12, 4


def attention_flops(factor):
    """Two products of the size of the scores forward; twice that backward, scores computed again not counted."""

    def count(q, k, *_, **__):
        batch, tokens, heads, size = q
        return factor * 4 * batch * heads * tokens * k[1] * size

    return count


MAPPING = {
    torch.ops.cogvideox.attention_forward: attention_flops(1),
    torch.ops.cogvideox.attention_backward: lambda grad, q, k, *_, **__: attention_flops(2)(q, k),
    # torch's counter does not know the products that are added in place.
    torch.ops.aten.addmm_: lambda out, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
}


def counted(model, config, batch):
    channels = config.in_channels
    latents, prompt = (
        torch.randn(batch, FRAMES, channels, HEIGHT, WIDTH),
        torch.randn(batch, TEXT, config.text_embed_dim),
    )
    timesteps = torch.randint(0, 1000, (batch,))
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter, torch.no_grad():
        predict_v(model, latents, prompt, timesteps)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False, custom_mapping=MAPPING) as counter:
        predict_v(model, latents, prompt, timesteps).square().mean().backward()
    return forward, counter.get_total_flops()


def shape(config):
    frames = FRAMES // (config.patch_size_t or 1)
    return {"video_tokens": frames * HEIGHT // 2 * WIDTH // 2, "text_length": TEXT}


def tiny(variant):
    return replace(tiny_facts(variant).transformer, sample_height=HEIGHT, sample_width=WIDTH, sample_frames=13)


@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_full_fine_tuning_is_counted_to_the_last_product(variant):
    config = tiny(variant)
    model = CogVideoXTransformer(config).requires_grad_(True)
    forward, training = counted(model, config, batch=1)
    assert forward == forward_flops(config, **shape(config))
    assert training == training_flops(config, method="full", **shape(config))


@pytest.mark.parametrize("variant", ["cogvideox-5b", "cogvideox1.5-5b"])
def test_a_lora_is_counted_but_for_what_its_first_layer_is_spared(variant):
    """Nothing trained lies in front of block 0, so its q, k, v take no gradient to their input: 3 of 12 D^2 a token."""
    config = tiny(variant)
    model = CogVideoXTransformer(config)
    add_lora(model, rank=RANK, alpha=RANK, seed=0)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    for batch in (1, 2):
        _, training = counted(model, config, batch)
        expected = batch * training_flops(config, method="lora", adapter_weights=weights, **shape(config))
        tokens, d = batch * sum(shape(config).values()), config.width
        spared = 2 * tokens * 3 * d * (d + RANK)
        unread = batch * TEXT  # rows that the last block leaves out behind attention
        recomputed = 2 * (config.num_layers * tokens - unread) * d * (4 * d - int(4 * d * FROZEN_KEPT))
        of_adapters = 3 * 2 * unread * 2 * d * RANK  # that of the last block's to_out
        ofs = (batch - 1) * 4 * (config.ofs_embed_dim or 0) ** 2  # one row for the whole batch
        assert training == expected - spared + recomputed - of_adapters - ofs


@pytest.mark.parametrize(("mode", "recomputed"), [("full", (20, 1)), ("save_attention", (20, 0))])
def test_what_checkpointing_computes_again_is_not_the_models(mode, recomputed):
    """The second run of a block is 8 of 12 D^2 in linears (the last 4 are not read) and, without savings, attention."""
    config = tiny("cogvideox-5b")
    model = CogVideoXTransformer(config).requires_grad_(True)
    model.set_checkpointing(mode)
    _, training = counted(model, config, batch=1)
    tokens, d = sum(shape(config).values()), config.width
    again = config.num_layers * (16 * tokens * d * d + recomputed[1] * 4 * tokens * tokens * d) - 10 * TEXT * d * d
    assert training == training_flops(config, method="full", **shape(config)) + again


@pytest.mark.parametrize(
    ("name", "video_tokens", "petaflops"),
    [("cogvideox-2b", 17550, 0.120), ("cogvideox-5b", 17550, 0.332), ("cogvideox1.5-5b", 40800, 1.259)],
)
def test_published_models_cost_what_is_known_of_them(name, video_tokens, petaflops):
    """At 49 x 480 x 720 (1.5: 77 x 768 x 1360); within a percent of the products of blocks alone."""
    flops = forward_flops(PUBLISHED[name].transformer, video_tokens=video_tokens, text_length=226)
    assert flops / 1e15 == pytest.approx(petaflops, rel=0.01)
