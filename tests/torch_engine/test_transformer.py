"""The whole model against diffusers', at its borders: numbers, gradients, files, errors."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.models import LARGER, PUBLISHED, TransformerConfig, tiny_facts
from cogvideox_factory.torch_engine.block import Block
from cogvideox_factory.torch_engine.border import to_array
from cogvideox_factory.torch_engine.lora import add_lora, lora_parameters
from cogvideox_factory.torch_engine.positions import make_positions
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer, diffusers_names

FORWARD, GRADIENT = 1e-5, 1e-4
"""Float32, on outputs of size 1, and relative to the largest entry of each gradient."""


def config_of(variant: str, **changes) -> TransformerConfig:
    return replace(tiny_facts(variant).transformer, **changes)


def pair(config: TransformerConfig, seed: int = 0):
    """Return diffusers' model and ours with the same weights, none of them 0 or 1."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    torch.manual_seed(seed)
    values = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    theirs = diffusers.CogVideoXTransformer3DModel(**values)
    with torch.no_grad():
        for tensor in theirs.state_dict().values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    with torch.device("meta"):
        ours = CogVideoXTransformer(config)
    ours.to_empty(device="cpu")
    ours.load_arrays((name, to_array(tensor)) for name, tensor in theirs.state_dict().items())
    return theirs, ours


def example(config: TransformerConfig, *, batch=2, frames=3, height=8, width=12, text=16, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(batch, frames, config.in_channels, height, width, generator=draw).to(dtype)
    prompt = torch.randn(batch, text, config.text_embed_dim, generator=draw).to(dtype)
    timesteps = torch.randint(0, 1000, (batch,), generator=draw)
    ofs = torch.full((1,), 2.0, dtype=dtype) if config.ofs_embed_dim else None
    return latents, prompt, timesteps, ofs


def positions_for(model: CogVideoXTransformer, latents, prompt):
    _, frames, _, height, width = latents.shape
    return model.positions(
        latent_frames=frames, latent_height=height, latent_width=width, text_length=prompt.shape[1],
        device=latents.device, dtype=latents.dtype,
    )  # fmt: skip


def compare(config: TransformerConfig, **shape):
    theirs, ours = pair(config)
    latents, prompt, timesteps, ofs = example(config, **shape)
    positions = positions_for(ours, latents, prompt)
    rotary = None
    if positions.rotary is not None:  # theirs: video rows only, each angle twice
        rotary = tuple(table[prompt.shape[1] :, 0].repeat_interleave(2, dim=-1) for table in positions.rotary)
    their_inputs, our_inputs = ([x.clone().requires_grad_() for x in (latents, prompt)] for _ in "ab")
    expected = theirs(*their_inputs, timesteps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    out = ours(*our_inputs, timesteps, positions=positions, ofs=ofs)
    assert (out - expected).abs().max() <= FORWARD

    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    expected.backward(grad)
    out.backward(grad)
    own = dict(ours.named_parameters())
    slots = diffusers_names(config)
    pairs = {name: (own[slots[name].name].grad, p.grad, slots[name]) for name, p in theirs.named_parameters()}
    largest = max(p.grad.abs().max() for p in theirs.parameters())
    for name, (mine, other, slot) in pairs.items():
        mine = mine[slot.start : slot.stop].reshape(other.shape)
        # Without rotation, nothing depends on the bias of k's norm: its gradient is rounding, so it has a floor.
        limit = GRADIENT * max(other.abs().max(), 1e-3 * largest)
        assert (mine - other).abs().max() <= limit, name
    for mine, other in zip(our_inputs, their_inputs):
        assert (mine.grad - other.grad).abs().max() <= GRADIENT * other.grad.abs().max()


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("batch", [1, 2])
def test_forward_and_gradients_are_those_of_diffusers(variant, batch):
    config = config_of(variant)
    compare(config, batch=batch, frames=3 if config.patch_size_t is None else 4)


ODD = {
    "2b at another size": ("cogvideox-2b", {}, {"frames": 2, "height": 6, "width": 10}),
    "5b, short text, portrait": ("cogvideox-5b", {}, {"frames": 1, "height": 14, "width": 6, "text": 5}),
    "5b with one text token": ("cogvideox-5b", {}, {"text": 1}),
    "i2v at another length": ("cogvideox-5b-i2v", {}, {"frames": 2}),
    "1.5, six frames, small": ("cogvideox1.5-5b", {}, {"frames": 6, "height": 4, "width": 6, "text": 7}),
    "1.5-i2v, batch of 3": ("cogvideox1.5-5b-i2v", {}, {"frames": 2, "batch": 3}),
    "no patch bias": ("cogvideox-5b", {"patch_bias": False}, {}),
    "no attention bias": ("cogvideox-5b", {"attention_bias": False}, {}),
    "norms without weights": ("cogvideox-5b", {"norm_elementwise_affine": False}, {}),
    "sines first, shifted": ("cogvideox-5b", {"flip_sin_to_cos": False, "freq_shift": 1}, {}),
    "head size 96": ("cogvideox1.5-5b", {"attention_head_dim": 96}, {"frames": 2}),
    "one layer, three heads": ("cogvideox-2b", {"num_layers": 1, "num_attention_heads": 3}, {}),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_shapes_and_settings(case):
    variant, changes, shape = ODD[case]
    compare(config_of(variant, **changes), **shape)


def test_bfloat16_is_as_near_to_float32_as_that_of_diffusers():
    theirs, ours = pair(config_of("cogvideox-5b"))
    latents, prompt, timesteps, _ = example(ours.config)
    positions = positions_for(ours, latents, prompt)
    exact = ours(latents, prompt, timesteps, positions=positions)
    rotary = tuple(table[16:, 0].repeat_interleave(2, dim=-1) for table in positions.rotary)
    half = latents.bfloat16(), prompt.bfloat16()
    out = ours.bfloat16()(*half, timesteps, positions=positions)
    other = theirs.bfloat16()(*half, timesteps, image_rotary_emb=rotary, return_dict=False)[0]
    assert out.dtype == torch.bfloat16
    assert (out - exact).abs().mean() <= 1.1 * (other - exact).abs().mean()


@pytest.mark.parametrize("variant", PUBLISHED)
def test_parameter_counts(variant):
    published = {
        "cogvideox-2b": 1_693_783_872,
        "cogvideox-5b": 5_570_283_072,
        "cogvideox-5b-i2v": 5_570_479_680,
        "cogvideox1.5-5b": 5_570_676_352,
        "cogvideox1.5-5b-i2v": 5_571_594_880,
    }
    with torch.device("meta"):
        model = CogVideoXTransformer(PUBLISHED[variant].transformer)
    assert sum(p.numel() for p in model.parameters()) == published[variant] == model.config.num_parameters


@pytest.mark.parametrize(("name", "billions"), [("10b", 13.62), ("20b", 23.60), ("30b", 31.45)])
def test_parameter_counts_of_the_larger_ones(name, billions):
    with torch.device("meta"):
        model = CogVideoXTransformer(LARGER[name])
    count = sum(p.numel() for p in model.parameters())
    assert count == LARGER[name].num_parameters
    assert round(count / 1e9, 2) == billions


@pytest.mark.parametrize("variant", PUBLISHED)
def test_the_layout_covers_every_element_once(variant):
    model = CogVideoXTransformer(config_of(variant))
    counts = {name: torch.zeros(len(tensor)) for name, tensor in model.state_dict().items()}
    sizes = dict.fromkeys(counts, 0)
    for slot in diffusers_names(model.config).values():
        counts[slot.name][slot.start : slot.stop] += 1
        sizes[slot.name] += int(np.prod(slot.shape))
    assert all((rows == 1).all() for rows in counts.values())
    assert sizes == {name: tensor.numel() for name, tensor in model.state_dict().items()}


# --- positions --------------------------------------------------------------------------------------------------------


def test_a_model_never_runs_without_positions():
    for variant in ("cogvideox-5b", "cogvideox-2b"):
        model = CogVideoXTransformer(config_of(variant))
        latents, prompt, timesteps, _ = example(model.config)
        with pytest.raises(FactoryError, match="positions=None"):
            model(latents, prompt, timesteps, positions=None)


def test_positions_of_another_shape_are_refused():
    model = CogVideoXTransformer(config_of("cogvideox-5b"))
    latents, prompt, timesteps, _ = example(model.config)
    for other in (example(model.config, height=10), example(model.config, text=9)):
        with pytest.raises(FactoryError, match=r"positions are of (16|9) text and (72|90) video tokens"):
            model(latents, prompt, timesteps, positions=positions_for(model, *other[:2]))


@pytest.mark.parametrize("variant", ["cogvideox-2b", "cogvideox-5b-i2v"])
def test_added_positions_need_the_whole_text(variant):
    config = config_of(variant)
    with pytest.raises(FactoryError, match="12 text tokens; this checkpoint adds a position table made for exactly 16"):
        make_positions(config, 3, 8, 12, 12, "cpu", torch.float32)


def test_more_text_than_the_checkpoint_knows():
    with pytest.raises(FactoryError, match="17 text tokens; this checkpoint takes at most 16"):
        make_positions(config_of("cogvideox-5b"), 3, 8, 12, 17, "cpu", torch.float32)


def test_learned_positions_fit_one_size():
    with pytest.raises(FactoryError, match="learned positions"):
        make_positions(config_of("cogvideox-5b-i2v"), 3, 8, 10, 16, "cpu", torch.float32)


def test_text_rows_are_not_turned():
    cos, sin = make_positions(config_of("cogvideox-5b"), 3, 8, 12, 16, "cpu", torch.float32).rotary
    assert cos.shape == (16 + 72, 1, 32)
    assert (cos[:16] == 1).all()
    assert (sin[:16] == 0).all()


def test_tables_made_while_sampling_serve_training():
    model = CogVideoXTransformer(config_of("cogvideox-2b", sample_frames=5))
    latents, prompt, timesteps, _ = example(model.config, frames=2)
    make_positions.cache_clear()
    with torch.inference_mode():
        model(latents, prompt, timesteps, positions=positions_for(model, latents, prompt))
    positions = positions_for(model, latents, prompt)
    model(latents, prompt, timesteps, positions=positions).sum().backward()
    assert positions_for(model, latents, prompt) is positions


# --- wrong input ------------------------------------------------------------------------------------------------------


def test_inputs_that_do_not_fit_say_so():
    i2v, late = CogVideoXTransformer(config_of("cogvideox-5b-i2v")), CogVideoXTransformer(config_of("cogvideox1.5-5b"))
    latents, prompt, timesteps, _ = example(late.config, frames=4)
    positions = positions_for(late, latents, prompt)
    with pytest.raises(FactoryError, match="16 channels; this image-to-video model takes 32"):
        i2v(latents, prompt, timesteps, positions=positions)
    with pytest.raises(FactoryError, match="3 latent frames; this model cuts time into patches of 2"):
        late(latents[:, :3], prompt, timesteps, positions=positions)
    with pytest.raises(FactoryError, match="leave it out"):
        late(latents, prompt, timesteps, positions=positions, ofs=torch.ones(1))
    late_i2v = CogVideoXTransformer(config_of("cogvideox1.5-5b-i2v"))
    latents, prompt, timesteps, _ = example(late_i2v.config, frames=4)
    with pytest.raises(FactoryError, match="needs ofs"):
        late_i2v(latents, prompt, timesteps, positions=positions_for(late_i2v, latents, prompt))
    with pytest.raises(FactoryError, match="did you mean 'save_attention'"):
        late.set_checkpointing("save-attention")


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folders_of_diffusers_load_and_the_reverse(variant, dtype, tmp_path):
    from diffusers import CogVideoXTransformer3DModel

    theirs = pair(config_of(variant))[0].to(dtype)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = CogVideoXTransformer.from_folder(tmp_path / "theirs", dtype=dtype)
    assert next(ours.parameters()).dtype == dtype
    ours.save(tmp_path / "ours")
    back = CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", torch_dtype=dtype)
    again = back.state_dict()
    assert again.keys() == theirs.state_dict().keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in theirs.state_dict().items())
    assert dict(back.config)["patch_size_t"] == theirs.config.patch_size_t


def test_arrays_go_through_unchanged():
    model = CogVideoXTransformer(config_of("cogvideox-5b-i2v")).bfloat16()
    arrays = model.to_arrays()
    assert {array.dtype for array in arrays.values()} == {np.dtype(ml_dtypes.bfloat16)}
    other = CogVideoXTransformer(config_of("cogvideox-5b-i2v")).bfloat16()
    other.initialize(seed=1)
    other.load_arrays(iter(arrays.items()))
    for mine, its in zip(model.state_dict().values(), other.state_dict().values()):
        assert torch.equal(mine, its)
    shared = arrays["transformer_blocks.0.attn1.to_k.bias"]
    shared[0] = 7
    assert model.transformer_blocks[0].attn.qkv.bias[model.config.width] == 7


def test_weights_that_do_not_fit_are_all_named():
    model = CogVideoXTransformer(config_of("cogvideox-5b"))
    arrays = model.to_arrays()
    arrays["stray.weight"] = np.zeros(1, np.float32)
    arrays["proj_out.bias"] = np.zeros(3, np.float32)
    del arrays["transformer_blocks.1.ff.net.2.bias"]
    with pytest.raises(UnfitError) as caught:
        model.load_arrays(arrays.items())
    for part in (
        "in 3 places",
        "stray.weight is not in this model",
        "proj_out.bias is [3], expected [64]",
        "transformer_blocks.1.ff.net.2.bias is missing",
    ):
        assert part in str(caught.value)
    with pytest.raises(UnfitError, match=r"in \d{2} places: ([^;]+; ){5}…\."):
        model.load_arrays([])
    model.load_arrays([("proj_out.bias", np.ones(64, np.float32))], strict=False)
    assert (model.proj_out.bias == 1).all()
    pairs = [("proj_out.bias", np.ones(64, np.float32))] * 2
    with pytest.raises(UnfitError, match="comes twice"):
        model.load_arrays(pairs, strict=False)


def test_another_models_folder_is_refused(tmp_path):
    CogVideoXTransformer(config_of("cogvideox-5b")).save(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"num_layers": 2', '"num_layers": 3')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UnfitError, match=r"transformer_blocks\.2\.norm1\.linear\.weight is missing"):
        CogVideoXTransformer.from_folder(tmp_path)


# --- weights drawn here -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
def test_drawn_weights_are_sane(variant):
    config = config_of(variant, num_layers=8)
    model = CogVideoXTransformer(config)
    latents, prompt, timesteps, ofs = example(config, frames=3 if config.patch_size_t is None else 4)
    positions = positions_for(model, latents, prompt)
    out = model(latents, prompt, timesteps, positions=positions, ofs=ofs)
    assert 0.1 < out.std() < 0.5  # near the mean, and not at it
    (out - torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).square().mean().backward()
    for name, parameter in model.named_parameters():
        if not (variant == "cogvideox-2b" and name.endswith("norm_k.bias")):
            assert parameter.grad.norm() > 1e-6, name
    other = CogVideoXTransformer(config)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))
    other.initialize(seed=1)
    assert not torch.equal(model.proj_out.weight, other.proj_out.weight)


# --- what nobody reads ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("mode", ["none", "full", "save_attention"])
@pytest.mark.parametrize("adapters", [False, True])
def test_leaving_out_the_last_text_rows_changes_no_gradient(adapters, mode, batch, monkeypatch):
    """Against the same model that works on them to the end and drops them then."""
    config = config_of("cogvideox-5b")
    latents, prompt, timesteps, _ = example(config, batch=batch)
    results = []
    whole = Block._forward

    def to_the_end(self, x, vectors, rotary, text_length, share, video_only):
        out = whole(self, x, vectors, rotary, text_length, share, False)
        return out[:, text_length:] if video_only else out

    for forward in (whole, to_the_end):
        monkeypatch.setattr(Block, "_forward", forward)
        model = CogVideoXTransformer(config)
        model.set_checkpointing(mode)
        if adapters:
            add_lora(model, rank=2, alpha=2, target_modules=["to_q", "to_out.0", "ff.net.2"], seed=0)
            for parameter in lora_parameters(model):
                parameter.data.add_(0.1)
        out = model(latents, prompt, timesteps, positions=positions_for(model, latents, prompt))
        out.square().mean().backward()
        results.append((out.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (out, grads), (expected_out, expected) = results
    torch.testing.assert_close(out, expected_out, rtol=1e-5, atol=1e-6)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert grad is not None
        assert expected[name] is not None
        assert (grad - expected[name]).norm() <= 1e-5 * expected[name].norm() + 1e-9, name
