import pytest
import torch
from torch import nn

from cogvideox_factory.torch_engine import linear as module
from cogvideox_factory.torch_engine.linear import Linear, is_plain, linear, product


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def software(request, monkeypatch):
    """A CPU without instructions for the dtype, whatever this one is."""
    monkeypatch.setattr(module, "_SOFTWARE", {request.param})
    return request.param


def operands(dtype):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=draw).to(dtype).requires_grad_() for s in ((2, 5, 24), (8, 24), (8,))]


def test_through_float32_only_the_last_rounding_is_left(software):
    x, weight, bias = operands(software)
    wide = [t.detach().double().requires_grad_() for t in (x, weight, bias)]
    theirs = torch.nn.functional.linear(*wide)
    ours = linear(x, weight, bias)
    grad = torch.randn(theirs.shape, generator=torch.Generator().manual_seed(1)).to(software)
    ours.backward(grad)
    theirs.backward(grad.double())
    assert ours.dtype == x.grad.dtype == software
    rounding = torch.finfo(software).eps
    torch.testing.assert_close(ours.double(), theirs, rtol=rounding, atol=rounding)
    for mine, other in zip((x, weight, bias), wide):
        torch.testing.assert_close(mine.grad.double(), other.grad, rtol=rounding, atol=2 * rounding)
    a, b = x.detach(), weight.detach().T
    assert torch.equal(product(a, b), (a.float() @ b.float()).to(software))


def test_the_float32_copies_are_not_kept(software):
    x, weight, bias = operands(software)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.dtype) or t, lambda t: t):
        linear(x, weight, bias)
    assert saved == [software, software]


def test_elsewhere_it_is_torch(monkeypatch):
    monkeypatch.setattr(module, "_SOFTWARE", set())
    x, weight, bias = operands(torch.float32)
    assert torch.equal(linear(x, weight, bias), torch.nn.functional.linear(x, weight, bias))
    assert torch.equal(linear(x, weight, None), torch.nn.functional.linear(x, weight))


def test_what_must_be_called_as_a_module():
    x = torch.zeros(1, 4)
    assert is_plain(Linear(4, 4), x)
    assert is_plain(nn.Linear(4, 4), x)
    assert not is_plain(Linear(4, 4).bfloat16(), x)
    assert not is_plain(nn.Sequential(Linear(4, 4)), x)
    assert not is_plain(type("Wrapped", (Linear,), {})(4, 4), x)
    hooked = Linear(4, 4)
    hooked.register_forward_hook(lambda *args: None)
    assert not is_plain(hooked, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not is_plain(Linear(4, 4), x)
