"""Whole models against diffusers and peft: forward, gradients, files in both directions, mixing, merging."""

import numpy as np
import pytest
import torch

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.lora_names import ATTENTION, match_targets
from cogvideox_factory.models import PUBLISHED, tiny_facts
from cogvideox_factory.torch_engine.lora import (
    adapter_names,
    add_lora,
    check_fit,
    load_lora_into,
    lora_arrays,
    lora_parameters,
    lora_settings,
    merge_lora,
    remove_lora,
    set_adapters,
    unmerge_lora,
)
from cogvideox_factory.torch_engine.lora_linear import LoraFactors, LoraLinear
from cogvideox_factory.torch_engine.lora_targets import find_targets
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

TOLERANCE = 1e-5
"""Absolute, on outputs of size 1 in float32 through two blocks."""
WITH_FEED_FORWARD = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
KINDS = {
    "alpha": {"rank": 4, "alpha": 7},
    "rslora": {"rank": 8, "alpha": 4, "use_rslora": True},
    "dora": {"rank": 4, "alpha": 6, "use_dora": True},
}


class Pair:
    """Our transformer and diffusers' with the same weights, and one input for both."""

    def __init__(self, folder, variant="cogvideox-2b"):
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        self.ours = CogVideoXTransformer.from_folder(folder / "transformer")
        self.theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
        parts = dict.fromkeys(("tokenizer", "text_encoder", "vae", "scheduler"))
        self.pipe = diffusers.CogVideoXPipeline(transformer=self.theirs, **parts)
        config = tiny_facts(variant).transformer
        frames = 3 if config.patch_size_t is None else 4
        draw = torch.Generator().manual_seed(0)
        self.latents = torch.randn(1, frames, config.in_channels, 8, 12, generator=draw)
        self.embeds = torch.randn(1, 16, config.text_embed_dim, generator=draw)
        self.timesteps = torch.tensor([321])
        self.ofs = torch.tensor([2.0]) if config.ofs_embed_dim else None
        self.positions = self.ours.positions(
            latent_frames=frames,
            latent_height=8,
            latent_width=12,
            text_length=16,
            device="cpu",
            dtype=torch.float32,
        )

    def run_ours(self):
        return self.ours(self.latents, self.embeds, self.timesteps, positions=self.positions, ofs=self.ofs)

    def run_theirs(self):
        rotary = None
        if self.positions.rotary is not None:
            frames = self.latents.shape[1]
            rotary = self.pipe._prepare_rotary_positional_embeddings(64, 96, frames, torch.device("cpu"))
        return self.theirs(
            self.latents,
            self.embeds,
            self.timesteps,
            ofs=self.ofs,
            image_rotary_emb=rotary,
            return_dict=False,
        )[0]

    def assert_equal(self):
        with torch.no_grad():
            torch.testing.assert_close(self.run_ours(), self.run_theirs(), rtol=0, atol=TOLERANCE)


@pytest.fixture
def pair(tiny_model):
    return Pair(tiny_model("cogvideox-2b"))


def randomise(transformer, adapter_name="default", seed=1):
    """Fill what starts at a neutral value, so that the adapter does something."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if f".{adapter_name}." in name and not name.endswith("lora_A"):
                noise = torch.randn(parameter.shape, generator=draw)
                parameter.add_(0.05 * noise) if "magnitude" in name else parameter.copy_(0.2 * noise)


def add_theirs(transformer, *, rank, alpha, targets=ATTENTION, adapter_name="default", **flags):
    """Add a peft adapter with random B to a diffusers transformer."""
    from peft import LoraConfig

    torch.manual_seed(2)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets), init_lora_weights="gaussian", **flags)
    transformer.add_adapter(config, adapter_name)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.1 * torch.randn_like(parameter))


def save_theirs(pair, folder):
    """Save the adapter of the diffusers model as diffusers' training scripts do."""
    from diffusers.training_utils import _collate_lora_metadata
    from peft.utils import get_peft_model_state_dict

    pair.pipe.save_lora_weights(
        folder,
        transformer_lora_layers=get_peft_model_state_dict(pair.theirs),
        **_collate_lora_metadata({"transformer": pair.theirs}),
    )
    return folder / "pytorch_lora_weights.safetensors"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [ATTENTION, WITH_FEED_FORWARD], ids=["attention", "with_ff"])
def test_a_file_of_diffusers_gives_the_same_output_and_gradients_here(pair, tmp_path, kind, targets):
    settings = KINDS[kind]
    add_theirs(pair.theirs, targets=targets, **settings)
    load_lora_into(pair.ours, load_lora(save_theirs(pair, tmp_path)), trainable=True)
    ours, theirs = pair.run_ours(), pair.run_theirs()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=TOLERANCE)
    grad = torch.randn(ours.shape, generator=torch.Generator().manual_seed(3))
    ours.backward(grad)
    theirs.backward(grad)
    expected = {
        name.replace(".default", "").replace("vector.weight", "vector"): parameter.grad
        for name, parameter in pair.theirs.named_parameters()
        if "lora_" in name
    }
    got = gradients(pair.ours)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        assert scale > 0
        torch.testing.assert_close(got[name], gradient, rtol=0, atol=TOLERANCE * float(scale.clamp(min=1)))
    trained = {id(p) for p in lora_parameters(pair.ours)}
    assert all((p.grad is not None) == (id(p) in trained) for p in pair.ours.parameters())


def gradients(transformer):
    """Return the gradients of the default adapter under the names of a LoRA file."""
    result = {}
    for part in transformer.modules():
        if isinstance(part, LoraFactors):
            result[f"{part.rows.name}.lora_A.weight"] = part.lora_A.grad
            result[f"{part.rows.name}.lora_B.weight"] = part.lora_B.grad
            if part.magnitude is not None:
                result[f"{part.rows.name}.lora_magnitude_vector"] = part.magnitude.grad
    return result


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", [ATTENTION, WITH_FEED_FORWARD], ids=["attention", "with_ff"])
def test_a_file_of_ours_gives_the_same_output_in_diffusers(pair, tmp_path, kind, targets):
    add_lora(pair.ours, target_modules=targets, seed=5, **KINDS[kind])
    randomise(pair.ours)
    save_lora(tmp_path, lora_arrays(pair.ours), **lora_settings(pair.ours))
    base = pair.run_theirs()
    pair.pipe.load_lora_weights(tmp_path)
    assert (pair.run_theirs() - base).abs().max() > 0.01
    pair.assert_equal()


def test_ranks_and_alphas_may_differ_by_module(pair, tmp_path):
    patterns = {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"to_v": 9, "0.attn1.to_k": 3}}
    add_theirs(pair.theirs, rank=4, alpha=6, **patterns)
    assert load_lora_into(pair.ours, load_lora(save_theirs(pair, tmp_path / "theirs")), "it") == 8
    pair.assert_equal()
    save_lora(tmp_path / "ours", lora_arrays(pair.ours, "it"), **lora_settings(pair.ours, "it"))
    pair.theirs.delete_adapters("default")
    pair.pipe.load_lora_weights(tmp_path / "ours")
    pair.assert_equal()


@pytest.mark.filterwarnings("error:While injecting")
@pytest.mark.parametrize("variant", PUBLISHED)
def test_every_variant_takes_adapters_on_every_linear_layer(tiny_model, tmp_path, variant):
    """Every name is one peft finds too, so files may target whatever either side can."""
    pair = Pair(tiny_model(variant), variant)
    linears = {name for name, m in pair.theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    assert set(find_targets(pair.ours)) == linears
    names = add_lora(pair.ours, rank=2, alpha=2, target_modules=[".*"], seed=0)
    assert set(names) == linears
    randomise(pair.ours)
    save_lora(tmp_path, lora_arrays(pair.ours), **lora_settings(pair.ours))
    assert set(load_lora(tmp_path).modules) == linears
    pair.pipe.load_lora_weights(tmp_path)
    pair.assert_equal()


@pytest.mark.filterwarnings("error:While injecting")
def test_adapters_mix_as_in_diffusers(pair, tmp_path):
    settings = {
        "one": {"rank": 4, "alpha": 2},
        "two": {"rank": 6, "alpha": 6, "use_rslora": True},
        "dora": KINDS["dora"],
    }
    targets = {"one": ATTENTION, "two": ("to_v", "ff.net.2", "norm1.linear"), "dora": ("to_q", "to_v")}
    for seed, name in enumerate(settings):
        add_lora(pair.ours, target_modules=targets[name], seed=seed, adapter_name=name, **settings[name])
        randomise(pair.ours, name, seed)
        save_lora(tmp_path / name, lora_arrays(pair.ours, name), **lora_settings(pair.ours, name))
        pair.pipe.load_lora_weights(tmp_path / name, adapter_name=name)
        pair.assert_equal()  # the newest is on, alone
    assert set(adapter_names(pair.ours)) == set(settings)
    for names, weights in (
        (["one", "two"], [1.0, 0.5]),
        (["two", "one"], [-1.0, 2.0]),
        (["dora"], [0.7]),
        (["one", "dora", "two"], [1.0, 0.5, 1.0]),
        (["dora", "two"], [1.0, 1.0]),
    ):
        set_adapters(pair.ours, names, weights)
        pair.pipe.set_adapters(names, weights)
        pair.assert_equal()
        with torch.no_grad():
            live = pair.run_ours()
            merge_lora(pair.ours, restorable=True)
            torch.testing.assert_close(pair.run_ours(), live, rtol=0, atol=TOLERANCE)
            unmerge_lora(pair.ours)
            assert torch.equal(pair.run_ours(), live)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_trained_with_learning_rate_zero_changes_no_bit(tiny_model, dtype):
    pair = Pair(tiny_model("cogvideox-5b"), "cogvideox-5b")
    pair.ours.to(dtype)
    pair.latents, pair.embeds = pair.latents.to(dtype), pair.embeds.to(dtype)
    with torch.no_grad():
        before = pair.run_ours()
    add_lora(pair.ours, rank=4, alpha=8, target_modules=[".*"], seed=0)
    assert all(p.dtype == torch.float32 for p in lora_parameters(pair.ours))
    optimizer = torch.optim.AdamW(lora_parameters(pair.ours), lr=0.0, weight_decay=0.1)
    for _ in range(2):
        pair.run_ours().square().mean().backward()
        optimizer.step()
    after = pair.run_ours().detach()
    assert torch.equal(after.view(torch.uint8), before.view(torch.uint8))


def test_training_moves_the_adapter_and_nothing_else(pair):
    frozen = {name: p.clone() for name, p in pair.ours.named_parameters()}
    add_lora(pair.ours, rank=4, alpha=4, seed=0)
    optimizer = torch.optim.SGD(lora_parameters(pair.ours), lr=1.0)
    losses = []
    for _ in range(4):
        loss = pair.run_ours().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    now = dict(pair.ours.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in frozen.items())
    assert {n for n, p in now.items() if p.requires_grad} == now.keys() - frozen.keys()


@pytest.mark.parametrize("mode", ["full", "save_attention"])
def test_gradients_are_the_same_under_checkpointing(pair, mode):
    add_lora(pair.ours, rank=4, alpha=4, target_modules=WITH_FEED_FORWARD, seed=0)
    randomise(pair.ours)
    pair.run_ours().square().mean().backward()
    plain = gradients(pair.ours)
    pair.ours.zero_grad()
    pair.ours.set_checkpointing(mode)
    pair.run_ours().square().mean().backward()
    for name, gradient in gradients(pair.ours).items():
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7)


def test_the_start_depends_on_the_seed_and_the_target_only(tiny_model):
    def start(seed, **changes):
        transformer = CogVideoXTransformer.from_folder(tiny_model("cogvideox-2b") / "transformer")
        add_lora(transformer, **({"rank": 4, "alpha": 4, "seed": seed} | changes))
        return lora_arrays(transformer, changes.get("adapter_name", "default"))

    one = start(1)
    assert all((a == b).all() for a, b in zip(one.values(), start(1, adapter_name="other", alpha=1).values()))
    fewer = start(1, target_modules=["to_k"])
    assert fewer.keys() < one.keys()
    assert all((fewer[name] == one[name]).all() for name in fewer)
    name = "transformer_blocks.0.attn1.to_q.lora_A.weight"
    assert (one[name] != start(2)[name]).all()
    assert (one[name] != one[name.replace("to_q", "to_k")]).all()
    values = np.concatenate([array.ravel() for key, array in one.items() if "lora_A" in key]) * 128**0.5
    assert np.abs(values).max() <= 1
    assert values.std() == pytest.approx(3**-0.5, rel=0.03)  # uniform in [-1, 1]
    assert all((array == 0).all() for key, array in one.items() if "lora_B" in key)


def test_merging_for_good_leaves_a_plain_model_that_diffusers_loads(pair, tmp_path):
    import diffusers

    add_lora(pair.ours, rank=4, alpha=8, use_dora=True, target_modules=[".*to_q", "ff.net.2"], seed=0)
    randomise(pair.ours)
    with torch.no_grad():
        live = pair.run_ours()
        merge_lora(pair.ours)
        assert adapter_names(pair.ours) == []
        torch.testing.assert_close(pair.run_ours(), live, rtol=0, atol=TOLERANCE)
    pair.ours.save(tmp_path)
    pair.theirs = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path)
    pair.assert_equal()


def test_saving_with_adapters_on_saves_the_base(pair, tmp_path):
    before = pair.ours.to_arrays()
    add_lora(pair.ours, rank=2, alpha=2, seed=0)
    after = pair.ours.to_arrays()
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_removing_gives_the_base_back(pair):
    with torch.no_grad():
        before = pair.run_ours()
        for name in ("one", "two"):
            add_lora(pair.ours, rank=2, alpha=2, seed=0, adapter_name=name)
            randomise(pair.ours, name)
        remove_lora(pair.ours, "two")
        assert adapter_names(pair.ours) == ["one"]
        set_adapters(pair.ours, "one")
        assert not torch.equal(pair.run_ours(), before)
        remove_lora(pair.ours)
        assert not any(isinstance(module, LoraLinear) for module in pair.ours.modules())
        assert torch.equal(pair.run_ours(), before)


def test_arrays_are_a_copy(pair):
    add_lora(pair.ours, rank=2, alpha=2, seed=0)
    arrays = lora_arrays(pair.ours)
    randomise(pair.ours)
    assert all((array == 0).all() for name, array in arrays.items() if "lora_B" in name)
    assert {str(array.dtype) for array in arrays.values()} == {"float32"}


NAMES = [f"transformer_blocks.{i}.attn1.{n}" for i in range(12) for n in ATTENTION] + ["proj_out"]


@pytest.mark.parametrize(
    ("patterns", "count"),
    [
        (["to_q"], 12),
        (["attn1.to_q", "to_q"], 12),
        (["to_out.0", "proj_out"], 13),
        (["transformer_blocks.1.attn1.to_q"], 1),
        ([r".*\.[0-3]\.attn1\.to_(q|k)"], 8),
        ([".*"], 49),
    ],
)
def test_patterns_match_by_ending_or_as_regular_expressions(patterns, count):
    matched = match_targets(NAMES, patterns)
    assert len(matched) == count
    assert matched == [name for name in NAMES if name in matched]


def test_a_pattern_without_a_match_names_the_nearest():
    with pytest.raises(FactoryError, match=r"'to_quer' matches no .*did you mean 'to_q'.*attn1\.to_out\.0"):
        match_targets(NAMES, ["to_k", "to_quer"])
    with pytest.raises(FactoryError, match="no valid regular expression"):
        match_targets(NAMES, ["to_(q"])
    with pytest.raises(FactoryError, match="at least one"):
        match_targets(NAMES, [])
    with pytest.raises(FactoryError, match="at least one"):
        match_targets(NAMES, "to_q")


def test_a_lora_of_another_model_is_refused_and_leaves_no_trace(pair, tiny_model, tmp_path):
    add_lora(pair.ours, rank=2, alpha=2, target_modules=["proj_out"], seed=0)
    save_lora(tmp_path, lora_arrays(pair.ours), **lora_settings(pair.ours))
    file = load_lora(tmp_path)
    other = CogVideoXTransformer.from_folder(tiny_model("cogvideox1.5-5b") / "transformer")
    with pytest.raises(UnfitError, match=r"proj_out: lora_B is \[64, 2\], the model needs \[128, 2\]"):
        load_lora_into(other, file)
    assert adapter_names(other) == []
    with pytest.raises(UnfitError, match="proj_out"):
        check_fit(file, tiny_facts("cogvideox1.5-5b").transformer)
    check_fit(file, tiny_facts("cogvideox-2b").transformer)


def test_wrong_requests_are_answered(pair):
    add_lora(pair.ours, rank=2, alpha=2, seed=0, adapter_name="mine")
    with pytest.raises(FactoryError, match="'mine' is in use"):
        add_lora(pair.ours, rank=2, alpha=2, seed=0, adapter_name="mine")
    for bad in ("train", "a.b", ""):
        with pytest.raises(FactoryError, match="letters, digits"):
            add_lora(pair.ours, rank=2, alpha=2, seed=0, adapter_name=bad)
    with pytest.raises(FactoryError, match="rank=0"):
        add_lora(pair.ours, rank=0, alpha=2, seed=0, adapter_name="b")
    with pytest.raises(FactoryError, match=r"'mne' is not loaded \(did you mean 'mine'\?\)"):
        set_adapters(pair.ours, ["mne"])
    with pytest.raises(FactoryError, match="one weight"):
        set_adapters(pair.ours, ["mine"], [1.0, 2.0])
    with pytest.raises(FactoryError, match="'default' is not loaded"):
        lora_parameters(pair.ours)
    merge_lora(pair.ours, restorable=True)
    with pytest.raises(FactoryError, match="unmerge_lora first"):
        set_adapters(pair.ours, "mine", 0.5)
    assert adapter_names(pair.ours) == ["mine"]
