"""The layer alone: bits, gradients and dtypes. Parity of whole models with peft is in test_lora.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cogvideox_factory.torch_engine.lora_linear import LoraFactors, LoraLinear, Rows

WIDTH, RANK = 48, 4
HALVES = {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}
"""Allowed relative error: a few roundings of the dtype."""


def layer(dtype=torch.float32, *, targets="qkv", adapters=("default",), use_dora=False, bias=True, trained=True):
    """Return a fused q, k, v projection with adapters on some of its thirds; `trained` fills B."""
    generator = torch.Generator().manual_seed(0)
    fused = LoraLinear(nn.Linear(WIDTH, 3 * WIDTH, bias=bias, dtype=dtype))
    with torch.no_grad():
        for parameter in (p for p in (fused.weight, fused.bias) if p is not None):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * WIDTH**-0.5)
        for adapter in adapters:
            for name in targets:
                start = "qkv".index(name) * WIDTH
                rows = Rows(name=f"transformer_blocks.0.attn1.to_{name}", start=start, stop=start + WIDTH)
                part = LoraFactors(
                    rows,
                    in_features=WIDTH,
                    rank=RANK,
                    scale=0.5,
                    use_dora=use_dora,
                    device=torch.device("cpu"),
                )
                part.lora_A.copy_(torch.randn(RANK, WIDTH, generator=generator))
                if trained:
                    part.lora_B.copy_(torch.randn(WIDTH, RANK, generator=generator))
                fused.attach(adapter, f"attn1_to_{name}", part, {})
            fused.reset_magnitudes(adapter)
    fused.weights = dict.fromkeys(adapters, 1.0)
    return fused


def bits(tensor):
    return tensor.view(torch.int32 if tensor.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("targets", ["qkv", "q", "kv"])
def test_an_untrained_adapter_keeps_every_bit(dtype, targets):
    fused = layer(dtype, targets=targets, trained=False)
    x = torch.randn(2, 33, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert torch.equal(bits(fused(x)), bits(fused.plain()(x)))
    assert torch.equal(bits(fused(x.requires_grad_())), bits(fused.plain()(x)))


def test_an_untrained_adapter_keeps_the_sign_of_zero():
    fused = layer(torch.float16, trained=False, bias=False)
    with torch.no_grad():
        fused.weight[::2] = -1e-7  # times 1e-4 this underflows to -0.0
    x = torch.full((1, 3, WIDTH), 1e-5, dtype=torch.float16)
    expected = fused.plain()(x)
    assert (expected.signbit() & (expected == 0)).any()
    assert torch.equal(bits(fused(x)), bits(expected))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("targets", ["qkv", "qv"])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients_are_those_of_the_plain_formula(dtype, targets, bias):
    fused = layer(dtype, targets=targets, bias=bias, adapters=("one", "two"))
    fused.weights = {"one": 1.0, "two": -0.5}
    x = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    out = fused(x)
    assert out.dtype == dtype
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(grad)

    exact = {name: p.detach().double().requires_grad_() for name, p in fused.named_parameters()}
    x64 = x.detach().double().requires_grad_()
    y = F.linear(x64, exact["weight"], exact.get("bias"))
    for adapter, weight in fused.weights.items():
        for key, part in fused.parts(adapter).items():
            a, b = (exact[f"adapters.{adapter}.{key}.lora_{half}"] for half in "AB")
            delta = 0.5 * weight * (x64 @ a.T @ b.T)
            y = y + F.pad(delta, (part.rows.start, 3 * WIDTH - part.rows.stop))
    y.backward(grad.double())
    assert close(out, y, dtype)
    assert close(x.grad, x64.grad, dtype)
    trained = [(name, p) for name, p in fused.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 2 * len(targets)
    for name, parameter in trained:
        assert parameter.grad.dtype == torch.float32
        assert close(parameter.grad, exact[name].grad, dtype), name


def close(got, expected, dtype):
    error = (got.double() - expected).norm() / expected.norm()
    return error.item() <= HALVES[dtype]


def test_a_trainable_base_gets_its_gradient():
    fused = layer()
    fused.weight.requires_grad_(True)
    fused.bias.requires_grad_(True)
    x = torch.randn(7, WIDTH)
    fused(x).square().sum().backward()
    got = fused.weight.grad, fused.bias.grad
    fused.zero_grad()
    weight = fused.updated_weight().detach()
    out = x @ weight.T + fused.bias
    torch.testing.assert_close(got[0], (2 * out).T @ x, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[1], (2 * out).sum(0), rtol=1e-4, atol=1e-4)


def test_a_wide_activation_is_saved_once_and_nothing_wide_besides():
    fused = layer(targets="qkv")
    x = torch.randn(64, WIDTH, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        fused(x)
    wide = [t for t in saved if t.shape[0] == 64 and t.shape[-1] >= WIDTH]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]


@pytest.mark.parametrize("dtype", HALVES)
def test_an_untrained_dora_is_the_base_up_to_rounding(dtype):
    fused = layer(dtype, use_dora=True, trained=False)
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert close(fused(x), fused.plain()(x).double(), dtype)
    assert (fused._row_gain_minus_one(list(fused._active())) == 0).all()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_merging_is_what_the_live_adapters_do_and_is_undone_exactly(dtype, use_dora):
    fused = layer(dtype, use_dora=use_dora, targets="qv", adapters=("one", "two"))
    fused.weights = {"two": 0.7, "one": 1.0}
    x = torch.randn(9, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    before, live = fused.weight.clone(), fused(x)
    assert not close(live, fused.plain()(x).double(), dtype)
    fused.merge()
    assert fused.weight.dtype == dtype
    assert close(fused(x), live.double(), dtype)
    fused.unmerge()
    assert torch.equal(bits(fused.weight), bits(before))
    assert torch.equal(fused(x), live)


def test_weight_zero_and_no_adapter_are_the_base():
    for fused in (layer(), layer(use_dora=True)):
        x = torch.randn(9, WIDTH)
        fused.weights = {"default": 0.0}
        assert torch.equal(fused(x), fused.plain()(x))
        fused.weights = {}
        assert torch.equal(fused(x), fused.plain()(x))


def test_dora_of_two_adapters_trains_through_the_weight():
    """Several DoRAs at once take the general path; its gradients are those of the formula."""
    fused = layer(use_dora=True, adapters=("one", "two"), targets="k")
    x = torch.randn(6, WIDTH)
    fused(x).square().mean().backward()
    assert all(p.grad.abs().max() > 0 for n, p in fused.named_parameters() if "adapters" in n)


def test_parameter_names_are_stable():
    names = {name for name, _ in layer(use_dora=True, targets="q").named_parameters()}
    target = "adapters.default.attn1_to_q"
    assert names == {
        "weight",
        "bias",
        *(f"{target}.{n}" for n in ("lora_A", "lora_B", "magnitude")),
    }
