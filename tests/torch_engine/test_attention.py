"""Every kernel is a forward and a backward; what is not in this machine is held to its documented interface."""

import logging
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.torch_engine import attention as module
from cogvideox_factory.torch_engine.attention import (
    ENVIRONMENT_VARIABLE,
    attention,
    attention_backward,
    attention_forward,
    backend_name,
    set_attention_backend,
)

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}


@pytest.fixture(autouse=True)
def own_choice(monkeypatch):
    monkeypatch.delenv(ENVIRONMENT_VARIABLE, raising=False)
    set_attention_backend(None)
    yield
    set_attention_backend(None)


def inputs(dtype=torch.float32, queries=37, keys=37, heads=3, size=16, batch=2):
    draw = torch.Generator().manual_seed(0)

    def one(tokens):  # as the model has them: a strided view of a fused projection
        fused = torch.randn(batch, tokens, 3, heads, size, generator=draw, dtype=torch.float64).to(dtype)
        return fused[:, :, 1].transpose(1, 2).requires_grad_()

    return one(queries), one(keys), one(keys)


def masks(kind, queries, keys):
    if kind == "none":
        return None
    padding = torch.arange(keys).view(1, 1, 1, keys) < keys - 5
    if kind == "two axes":
        return padding.view(1, keys)
    return padding if kind == "bool" else torch.randn(2, 1, queries, keys, generator=torch.Generator().manual_seed(1))


def check(ours, q, k, v, mask, dtype):
    wide = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide_mask = mask.double() if mask is not None and mask.dtype != torch.bool else mask
    theirs = F.scaled_dot_product_attention(*wide, attn_mask=wide_mask)
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    theirs.backward(grad)
    ours.backward(grad.to(dtype))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours.double(), theirs, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    for mine, other in zip((q, k, v), wide):
        limit = 4 * TOLERANCE[dtype]  # sums over the tokens
        torch.testing.assert_close(mine.grad.double(), other.grad, atol=limit, rtol=limit)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize("kind", ["none", "bool", "float", "two axes"])
def test_output_and_gradients_are_those_of_torch(dtype, backend, kind):
    set_attention_backend(backend)
    q, k, v = inputs(dtype, queries=37, keys=29)
    mask = masks(kind, 37, 29)
    check(attention(q, k, v, mask=mask), q, k, v, mask, dtype)


def test_memory_is_laid_out_for_the_projection_that_follows():
    q, k, v = inputs()
    out = attention(q, k, v)
    assert out.transpose(1, 2).is_contiguous()
    out.sum().backward()
    assert q.grad is not None


@pytest.mark.parametrize("masked", [False, True])
def test_the_operators_keep_the_rules_compilers_rely_on(masked):
    q, k, v = (x.detach().transpose(1, 2) for x in inputs(heads=2))
    mask = torch.zeros(1, 1, 1, 37) if masked else None
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(attention_forward, (q, k, v, mask), test_utils=checks)
    out, lse = attention_forward(q, k, v, mask)
    torch.library.opcheck(attention_backward, (out, q, k, v, mask, out, lse), test_utils=checks)


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            attention(*inputs())
    assert caplog.text.count("attention on cpu, torch.float32, head size 16: cpu") == 1
    assert backend_name(torch.device("cpu")) == "cpu"


def test_the_choice_can_be_overridden(monkeypatch):
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "math")
    assert backend_name(torch.device("cpu")) == "math"
    set_attention_backend("cpu")
    assert backend_name(torch.device("cpu")) == "cpu"


def test_what_cannot_be_chosen(monkeypatch):
    with pytest.raises(FactoryError, match="did you mean 'flash'"):
        set_attention_backend("flsh")
    monkeypatch.setenv(ENVIRONMENT_VARIABLE, "flash")
    with pytest.raises(FactoryError, match="cannot do torch"):
        attention(*inputs())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="flash_attn_interface"):
        set_attention_backend("fa3")


def test_a_kernel_is_tried_before_it_is_trusted(caplog):
    q = torch.empty(1, 1, 1, 16)

    def missing(*args):
        raise RuntimeError("no kernel image is available\nlong story")

    good = module._BACKENDS["math"]
    assert module._works(good, q, False)
    assert module._works(good, q, True)
    assert not module._works(replace(good, name="broken", forward=missing), q, False)
    assert not module._works(replace(good, name="wrong", backward=lambda g, q, k, v, *_: (g, g, g)), q, False)
    assert "broken does not run here: no kernel image is available" in caplog.text
    assert "wrong is off by" in caplog.text


@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
@pytest.mark.parametrize("masked", [False, True])
def test_calls_match_the_signatures_of_torch(name, masked):
    """The kernels need a card, but torch checks a call's arguments and result shapes without one."""
    backend = module._BACKENDS[name]
    if masked and not backend.masks:
        return
    with FakeTensorMode():
        fused = torch.empty(2, 37, 3, 4, 64, dtype=torch.bfloat16, device="cuda")
        q, k, v = fused.unbind(2)
        mask = torch.empty(1, 1, 1, 37, dtype=torch.bfloat16, device="cuda") if masked else None
        out, lse = backend.run_forward(q, k, v, mask)
        assert out.shape == q.shape
        assert lse.shape == (2, 4, 37)
        grads = backend.run_backward(out, q, k, v, mask, out, lse)
    assert [g.shape for g in grads] == [q.shape] * 3


reference, reference_backward = module._MATH.run_forward, module._MATH.run_backward


class Ascend:
    """torch_npu's fused attention as documented: BSND, softmax statistics eight times over, True hides."""

    @staticmethod
    def _mask(hidden):
        return None if hidden is None else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)

    @classmethod
    def npu_fusion_attention(cls, q, k, v, heads, layout, *, atten_mask, scale):
        assert (layout, heads, scale) == ("BSND", q.shape[2], q.shape[3] ** -0.5)
        out, lse = reference(q, k, v, cls._mask(atten_mask))
        top = lse - 1.5
        eight = [x[..., None].expand(*x.shape, 8).contiguous() for x in (top, torch.full_like(lse, 1.5).exp())]
        return out, *eight, torch.empty(0), 0, 0, 0

    @classmethod
    def npu_fusion_attention_grad(
        cls, q, k, v, dy, heads, layout, *, atten_mask, softmax_max, softmax_sum, attention_in, scale_value
    ):
        assert (layout, heads, scale_value) == ("BSND", q.shape[2], q.shape[3] ** -0.5)
        assert softmax_max.shape[-1] == softmax_sum.shape[-1] == 8
        lse = softmax_max[..., 0] + softmax_sum[..., 0].log()
        return *reference_backward(dy, q, k, v, cls._mask(atten_mask), attention_in, lse), torch.empty(0)


def flash3():
    def forward(q, k, v, *, softmax_scale):
        assert softmax_scale == q.shape[-1] ** -0.5
        return *reference(q, k, v, None), torch.empty(0), torch.empty(0)

    def backward(dout, q, k, v, out, lse, *, dq, dk, dv, softmax_scale, deterministic):
        assert softmax_scale == q.shape[-1] ** -0.5
        for into, grad in zip((dq, dk, dv), reference_backward(dout, q, k, v, None, out, lse)):
            into.copy_(grad)

    return SimpleNamespace(_flash_attn_forward=forward, _flash_attn_backward=backward)


@pytest.mark.parametrize(("name", "package"), [("npu", "torch_npu"), ("fa3", "flash_attn_interface")])
@pytest.mark.parametrize("kind", ["none", "bool"])
def test_packages_are_called_as_documented(monkeypatch, name, package, kind):
    backend = module._BACKENDS[name]
    if kind != "none" and not backend.masks:
        return
    monkeypatch.setitem(sys.modules, package, Ascend if name == "npu" else flash3())
    here = replace(backend, device_types=("cpu",), half_only=False, package=None)
    monkeypatch.setitem(module._BACKENDS, name, here)
    set_attention_backend(name)
    q, k, v = inputs()
    mask = masks(kind, 37, 37)
    check(attention(q, k, v, mask=mask), q, k, v, mask, torch.float32)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.accelerator.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", [name for name in module._BACKENDS if name != "cpu"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_of_this_card(name, masked, dtype):
    device = torch.accelerator.current_accelerator()
    if not module._BACKENDS[name].fits(device.type, dtype, masked=masked):
        pytest.skip(f"{name} is not for {dtype} on {device.type}{' with a mask' if masked else ''}")
    q = torch.empty(1, 1, 1, 64, dtype=dtype, device=device)
    assert module._works(module._BACKENDS[name], q, masked)
