"""Each graph node: values against plain torch, gradients by finite differences in float64."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck

from cogvideox_factory.torch_engine.fused import gated_linear, gated_residual, modulated_norm

TOKENS, WIDTH = 5, 8
CASES = list(itertools.product([1, 2], [0, 2, TOKENS]))  # batch; no text row, some, only text


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def vectors(batch, count, start=1):
    return [draw(*((WIDTH,) if batch == 1 else (batch, 1, WIDTH)), seed=start + i) for i in range(count)]


def by_row(text_value, value, text):
    """Return [1 or B, S, D] with the text's vector in the first `text` rows."""
    rows = [v.reshape(-1, 1, WIDTH).expand(-1, n, -1) for v, n in ((text_value, text), (value, TOKENS - text))]
    return torch.cat(rows, dim=1)


@pytest.mark.parametrize(("batch", "text"), CASES)
def test_modulated_norm(batch, text):
    x, (scale, shift, text_scale, text_shift) = draw(batch, TOKENS, WIDTH), vectors(batch, 4)

    def run(*args):
        return modulated_norm(*args, text_length=text, eps=1e-5)

    expected = F.layer_norm(x, (WIDTH,)) * by_row(text_scale, scale, text) + by_row(text_shift, shift, text)
    torch.testing.assert_close(run(x, scale, shift, text_scale, text_shift), expected)
    assert gradcheck(run, (x, scale, shift, text_scale, text_shift))
    assert gradcheck(lambda x: run(x, *(v.detach() for v in (scale, shift, text_scale, text_shift))), (x,))


@pytest.mark.parametrize(("batch", "text"), CASES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_gated_linear(batch, text, bias, wrapped):
    x, a, (gate, text_gate) = draw(batch, TOKENS, WIDTH), draw(batch, TOKENS, 3), vectors(batch, 2)
    linear = nn.Linear(3, WIDTH, bias=bias, dtype=torch.float64)
    module = nn.Sequential(linear) if wrapped else linear
    parameters = tuple(linear.parameters())

    def run(x, a, gate, text_gate, *_):
        return gated_linear(x, a, module, gate, text_gate, text_length=text)

    torch.testing.assert_close(run(x, a, gate, text_gate), x + by_row(text_gate, gate, text) * linear(a))
    assert gradcheck(run, (x, a, gate, text_gate, *parameters))
    gate, text_gate = gate.detach(), text_gate.detach()
    assert gradcheck(run, (x, a, gate, text_gate, *parameters))
    linear.requires_grad_(False)
    assert gradcheck(run, (x, a, gate, text_gate))
    gate.requires_grad_()  # adapters on the modulation alone
    assert gradcheck(run, (x, a, gate, text_gate))


@pytest.mark.parametrize(("batch", "text"), CASES)
def test_gated_residual(batch, text):
    x, y, (gate, text_gate) = draw(batch, TOKENS, WIDTH), draw(batch, TOKENS, WIDTH, seed=9), vectors(batch, 2)

    def run(*args):
        return gated_residual(*args, text_length=text)

    torch.testing.assert_close(run(x, y, gate, text_gate), x + by_row(text_gate, gate, text) * y)
    assert gradcheck(run, (x, y, gate, text_gate))
    assert gradcheck(run, (x, y, gate.detach(), text_gate.detach()))
