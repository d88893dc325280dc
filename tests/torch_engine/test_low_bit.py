"""A frozen base of few bits: its bytes, its numbers, and that what is trained over it fits the plain model."""

import sys

import pytest
import torch

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.torch_engine.linear import Linear, dense, is_low_bit
from cogvideox_factory.torch_engine.lora import load_lora_into, lora_arrays, lora_settings, merge_lora
from cogvideox_factory.torch_engine.low_bit import BASES, quantize, require_torchao
from cogvideox_factory.torch_engine.offload import Offload
from cogvideox_factory.torch_engine.passage import plain_parts
from cogvideox_factory.torch_engine.swap import Swap
from tests.torch_engine.stepping import CPU, adapt, assert_same_bits, loss_of, small_model, step

pytest.importorskip("torchao", reason="the extra lowbit is not installed")

BYTES = {"int8": 1, "fp8": 1, "nf4": 0.5 + 1 / 64}
"""A weight, scales of rows apart."""
ROUNDING = {"int8": 0.012, "fp8": 0.04, "nf4": 0.11}
"""Relative error of normal weights: half a step of 127 to the largest of 128; 3 bits of mantissa; 16 levels."""
EVERYTHING = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def model_over(base, *, dtype=torch.float32, mode="none", made_dense=False, **options):
    """Return a model with adapters over a base of few bits, or over the plain weights that those stand for."""
    model = small_model(num_layers=2, dtype=dtype)
    quantize(model, base, device=CPU)
    if made_dense:
        for module in model.transformer_blocks.modules():
            if isinstance(module, Linear):
                module.weight = torch.nn.Parameter(dense(module.weight), requires_grad=False)
    adapt(model, **options)
    model.set_checkpointing(mode)
    return model


@pytest.mark.parametrize("base", BASES)
def test_the_base_has_the_bytes_promised_and_the_error_of_its_rounding(base):
    plain, model = small_model(num_layers=2), small_model(num_layers=2)
    quantize(model, base, device=CPU)
    linears = {n: m for n, m in model.transformer_blocks.named_modules() if isinstance(m, Linear)}
    assert len(linears) == 2 * 4
    weights = sum(m.weight.numel() for m in linears.values())
    rows = sum(m.out_features for m in linears.values())
    held = sum(part.nbytes for m in linears.values() for part in plain_parts(m.weight))
    assert BYTES[base] * weights <= held <= BYTES[base] * weights + 5 * rows
    for name, module in linears.items():
        assert is_low_bit(module.weight)
        assert not module.weight.requires_grad
        exact = plain.transformer_blocks.get_submodule(name).weight
        assert (dense(module.weight) - exact).norm() <= ROUNDING[base] * exact.norm(), name
    assert not is_low_bit(model.modulation.linear.weight)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": EVERYTHING}, {"use_dora": True}, {"target_modules": ["norm1.linear"]}]
)
def test_loss_and_gradients_are_those_over_the_weights_it_stands_for(base, options):
    over, plain = model_over(base, **options), model_over(base, made_dense=True, **options)
    assert_same_bits(step(over), step(plain))
    assert all(grad.abs().max() > 0 for grad in step(over)[1].values())


@pytest.mark.parametrize("base", BASES)
def test_half_precision_under_every_kind_of_saving(base):
    expected = step(model_over(base, dtype=torch.bfloat16, made_dense=True), times=2)
    model = model_over(base, dtype=torch.bfloat16, mode="save_attention")
    Swap(model.blocks, 2, device=CPU)
    Offload(model.blocks, device=CPU, smallest=1024)
    loss, grads = step(model, times=2)
    assert torch.equal(loss, expected[0])
    for name, grad in grads.items():  # checkpointing multiplies hidden columns in other products
        assert (grad - expected[1][name]).norm() <= 1e-2 * expected[1][name].norm(), name


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("options", [{}, {"target_modules": EVERYTHING}])
def test_no_matrix_is_kept_whole_between_forward_and_backward(base, options):
    model = model_over(base, **options)
    sizes = {m.weight.numel() for m in model.transformer_blocks.modules() if isinstance(m, Linear)}
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss_of(model)
    kept = [t for t in saved if not is_low_bit(t) and t.dim() == 2 and t.numel() in sizes and t.shape[-1] in (128, 512)]
    assert not [t.shape for t in kept if t.shape[0] in (128, 384, 512)]


@pytest.mark.parametrize("base", BASES)
def test_what_is_trained_over_it_loads_over_the_plain_model(base, tmp_path):
    model = model_over(base)
    file = tmp_path / "lora.safetensors"
    save_lora(file, lora_arrays(model), **lora_settings(model))
    plain = small_model(num_layers=2)
    load_lora_into(plain, load_lora(file))
    adapted, base_only = loss_of(plain), loss_of(small_model(num_layers=2))
    assert abs(loss_of(model) - adapted) <= 3 * ROUNDING[base] * adapted
    assert abs(adapted - base_only) > 1e-3 * base_only


def test_adapters_are_not_merged_into_it():
    with pytest.raises(FactoryError, match="load the plain model and merge there"):
        merge_lora(model_over("int8"))


def test_nf4_says_which_sizes_it_takes():
    model = small_model(num_layers=1)
    model.transformer_blocks[0].attn.out = Linear(96, 128)
    with pytest.raises(FactoryError, match=r"multiple of 16384 weights; 0.attn.out has 128 x 96. Use int8 or fp8"):
        quantize(model, "nf4", device=CPU)


def test_a_base_that_cannot_be_made_is_refused(monkeypatch):
    with pytest.raises(FactoryError, match=r"'int4' \(did you mean 'int8'\?\)"):
        require_torchao("int4")
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingError, match=r"pip install 'cogvideox-factory\[lowbit\]'"):
        require_torchao("int8")
