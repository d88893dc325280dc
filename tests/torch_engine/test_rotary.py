"""Values against plain torch and complex numbers, gradients by finite differences in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from cogvideox_factory.torch_engine.attention import attention
from cogvideox_factory.torch_engine.rotary import norm_rotate, norm_rotate_attention, rotate, rotation

TOKENS, WIDTH, HEADS = 5, 8, 2


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def angles():
    return draw(TOKENS, 1, WIDTH // HEADS // 2).detach().float()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forms", ["own", "general"])
def test_rotation_turns_pairs(dtype, forms, monkeypatch):
    """As complex numbers; and the form for CPUs is the form for everything else."""
    if forms == "general":
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    angle, x = angles(), draw(2, TOKENS, HEADS, WIDTH // HEADS).detach().to(dtype)
    rotary = (angle.cos(), angle.sin())
    turned = rotate(x, rotation(rotary, dtype))
    expected = torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * torch.polar(
        torch.ones_like(angle).double(), angle.double()
    )
    limit = torch.finfo(dtype).eps if dtype != torch.float64 else 1e-7  # float32 tables
    assert turned.dtype == dtype
    torch.testing.assert_close(
        turned.double(), torch.view_as_real(expected).flatten(-2), atol=limit * x.abs().max().item(), rtol=0
    )
    back = rotate(turned, rotation(rotary, dtype, back=True))
    torch.testing.assert_close(back, x, atol=4 * limit * x.abs().max().item(), rtol=0)


def plain_norm_rotate(qkv, weights, rotary):
    q, k, v = qkv.unflatten(-1, (3, HEADS, -1)).unbind(2)
    q, k = F.layer_norm(q, q.shape[-1:], *weights[:2], 1e-6), F.layer_norm(k, k.shape[-1:], *weights[2:], 1e-6)
    if rotary is not None:
        tables = rotation(rotary, q.dtype)
        q, k = rotate(q, tables), rotate(k, tables)
    return [x.transpose(1, 2) for x in (q, k, v)]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("rotary", [True, False])
def test_norm_rotate_and_attention(batch, rotary):
    qkv = draw(batch, TOKENS, 3 * WIDTH)
    weights = tuple(draw(WIDTH // HEADS, seed=i) for i in range(4))
    angle = angles()
    tables = (angle.cos(), angle.sin()) if rotary else None
    options = {"num_heads": HEADS, "eps": 1e-6}
    expected = plain_norm_rotate(qkv, weights, tables)
    split = norm_rotate(qkv, weights, tables, **options)
    for ours, plain in zip(split, expected):
        torch.testing.assert_close(ours, plain)
    out = norm_rotate_attention(qkv, weights, tables, **options)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*expected).transpose(1, 2).flatten(2))
    torch.testing.assert_close(out, attention(*split).transpose(1, 2).flatten(2))
    assert gradcheck(lambda qkv, *w: norm_rotate(qkv, w, tables, **options), (qkv, *weights))
    assert gradcheck(lambda qkv, *w: norm_rotate_attention(qkv, w, tables, **options), (qkv, *weights))
    frozen = tuple(w.detach() for w in weights)
    assert gradcheck(lambda qkv: norm_rotate_attention(qkv, frozen, tables, **options), (qkv,))
