"""A LoRA for another model is refused, whatever makes it another."""

import numpy as np
import pytest

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import load_lora, save_lora

TARGETS = ("to_k", "to_out.0", "to_q", "to_v")


def modules(depth):
    return [f"transformer_blocks.{block}.attn1.{target}" for block in range(depth) for target in TARGETS]


def model(depth, width):
    """Shapes of the linear layers of a transformer, feed-forward included."""
    shapes = dict.fromkeys(modules(depth), (width, width))
    for block in range(depth):
        shapes[f"transformer_blocks.{block}.ff.net.0.proj"] = (4 * width, width)
    return shapes | {"proj_out": (64, width)}


def lora(tmp_path, depth, width, *, change=None, header=True, **settings):
    """Save and load a LoRA of rank 4; `change` edits its tensors first."""
    arrays = {}
    for module in modules(depth):
        arrays[f"{module}.lora_A.weight"] = np.zeros((4, width), dtype=np.float32)
        arrays[f"{module}.lora_B.weight"] = np.zeros((width, 4), dtype=np.float32)
    if change is not None:
        change(arrays)
    options = {"rank": 4, "alpha": 4, "target_modules": TARGETS} | settings
    path = save_lora(tmp_path / f"{depth}-{width}", arrays, **options)
    if not header:
        from cogvideox_factory.tensors import save_tensors

        save_tensors(path, arrays)
    return load_lora(path)


@pytest.mark.parametrize("header", [True, False])
def test_fits(tmp_path, header):
    assert check_lora(lora(tmp_path, 3, 32, header=header), model(3, 32)) == 12


@pytest.mark.parametrize("header", [True, False])
def test_deeper_model(tmp_path, header):
    """The case the usual loaders pass over in silence: all keys are used, half the model is untouched."""
    file = lora(tmp_path, 2, 32, header=header)
    with pytest.raises(
        UnfitError, match=r"transformer_blocks\.2\.attn1\.to_k: not in the LoRA.*3 more.*2 blocks, width 32"
    ):
        check_lora(file, model(4, 32))
    assert check_lora(file, model(4, 32), allow_partial=True) == 8


def test_shallower_model(tmp_path):
    file = lora(tmp_path, 3, 32)
    with pytest.raises(UnfitError, match=r"transformer_blocks\.2\.attn1\.to_k: the model has no such layer"):
        check_lora(file, model(2, 32))


def test_other_width_names_the_model_it_was_for(tmp_path):
    file = lora(tmp_path, 30, 1920)
    with pytest.raises(UnfitError) as caught:
        check_lora(file, model(42, 3072))
    text = str(caught.value)
    assert "lora_A is [4, 1920], the model needs [4, 3072]" in text
    assert text.count("the model needs") == 5
    assert "and 235 more" in text
    assert "probably trained for cogvideox-2b (30 blocks, width 1920)" in text


def test_models_of_one_shape_are_all_named(tmp_path):
    file = lora(tmp_path, 42, 3072)
    with pytest.raises(
        UnfitError, match=r"cogvideox-5b or cogvideox-5b-i2v or cogvideox1\.5-5b or cogvideox1\.5-5b-i2v"
    ):
        check_lora(file, model(30, 1920))


@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
def test_half_a_pair(tmp_path, part):
    name = f"transformer_blocks.1.attn1.to_q.{part}.weight"
    file = lora(tmp_path, 2, 32, change=lambda arrays: arrays.pop(name))
    with pytest.raises(UnfitError, match=rf"transformer_blocks\.1\.attn1\.to_q: {part} is missing"):
        check_lora(file, model(2, 32), allow_partial=True)


def test_ranks_of_a_pair_differ(tmp_path):
    name = "transformer_blocks.1.attn1.to_q.lora_B.weight"
    file = lora(tmp_path, 2, 32, change=lambda arrays: arrays.update({name: np.zeros((32, 8), dtype=np.float32)}))
    with pytest.raises(UnfitError, match=r"to_q: lora_B is \[32, 8\], the model needs \[32, 4\]"):
        check_lora(file, model(2, 32))


def add_magnitudes(arrays, size=32):
    arrays |= {f"{module}.lora_magnitude_vector": np.ones(size, dtype=np.float32) for module in modules(2)}


def test_dora(tmp_path):
    assert check_lora(lora(tmp_path, 2, 32, change=add_magnitudes, use_dora=True), model(2, 32)) == 8
    file = lora(tmp_path, 2, 32, change=lambda arrays: add_magnitudes(arrays, 16), use_dora=True)
    with pytest.raises(UnfitError, match=r"magnitude is \[16\], the model needs \[32\]"):
        check_lora(file, model(2, 32))

    def forget_one(arrays):
        add_magnitudes(arrays)
        arrays.pop("transformer_blocks.0.attn1.to_v.lora_magnitude_vector")

    with pytest.raises(UnfitError, match="to_v: lora_magnitude_vector is missing"):
        check_lora(lora(tmp_path, 2, 32, change=forget_one, use_dora=True), model(2, 32))


def test_missing_target_layer(tmp_path):
    def forget_one(arrays):
        for part in "AB":
            arrays.pop(f"transformer_blocks.0.attn1.to_v.lora_{part}.weight")

    with pytest.raises(UnfitError, match=r"transformer_blocks\.0\.attn1\.to_v: not in the LoRA"):
        check_lora(lora(tmp_path, 2, 32, change=forget_one), model(2, 32))


def test_targets_by_pattern(tmp_path):
    pattern = r"transformer_blocks\.[01]\.attn1\..*"
    assert check_lora(lora(tmp_path, 2, 32, target_modules=pattern), model(4, 32)) == 8


def test_another_kind_of_model(tmp_path):
    def rename(arrays):
        for name in list(arrays):
            arrays[name.replace("transformer_blocks", "unet.blocks").replace("attn1", "attn2")] = arrays.pop(name)

    with pytest.raises(UnfitError, match="another kind of model"):
        check_lora(lora(tmp_path, 2, 32, change=rename), model(2, 32))


def test_convolution_of_a_lora_is_no_pair(tmp_path):
    """A tensor of other dimensions is a mismatch, not a crash."""
    name = "transformer_blocks.1.attn1.to_q.lora_A.weight"
    file = lora(tmp_path, 2, 32, change=lambda arrays: arrays.update({name: np.zeros((4, 32, 1), dtype=np.float32)}))
    with pytest.raises(UnfitError, match=r"lora_A is \[4, 32, 1\]"):
        check_lora(file, model(2, 32))
