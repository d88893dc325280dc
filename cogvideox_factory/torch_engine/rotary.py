"""From the fused projection to attention: LayerNorm of q and k, rotary positions, the attention itself.

`norm_rotate_attention` is one node of the autograd graph that keeps the projection, the attention output and its
log-sum-exp. The normalised and rotated q and k are made again in the backward pass; a torch graph would keep them too,
2 of its 7 units (activations of the stream). `norm_rotate` and `attention.attention` are its two halves, for callers
that exchange tokens for heads in between (sequence parallelism).

Legend: B batch, S joint tokens, D width, L heads, K head size.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideox_factory.torch_engine.attention import attention_backward, attention_forward

aten = torch.ops.aten


def norm_rotate(
    qkv: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused projection into normalised and rotated q and k, and v: each [B, L, S, K].

    Args:
        qkv: [B, S, 3 * L * K].
        weights: LayerNorm weight and bias of q, then of k, each [K].
        rotary: (cos, sin), each float32 [S, 1, K / 2], identity (1, 0) in text rows; None for a model without.
        num_heads: L.
        eps: of the LayerNorms.
    """
    v = qkv.unflatten(-1, (3, num_heads, -1))[:, :, 2].transpose(1, 2)
    q, k = _NormRotate.apply(qkv, *weights, *(rotary or (None, None)), num_heads, eps)  # pyright: ignore
    return q, k, v


def norm_rotate_attention(
    qkv: Tensor,
    weights: tuple[Tensor, ...],
    rotary: tuple[Tensor, Tensor] | None,
    *,
    num_heads: int,
    eps: float,
) -> Tensor:
    """Return the attention of `norm_rotate(...)` with heads joined, [B, S, L * K], keeping no q and k of its own."""
    return _NormRotateAttention.apply(qkv, *weights, *(rotary or (None, None)), num_heads, eps)  # pyright: ignore


def rotation(rotary: tuple[Tensor, Tensor], dtype: torch.dtype, *, back: bool = False) -> tuple[Tensor, ...]:
    """Return the tables `rotate` needs for tensors of `dtype`, from (cos, sin) [S, 1, K / 2].

    With `back` they turn the other way.
    """
    cos, sin = rotary
    sin = -sin if back else sin
    if cos.device.type == "cpu" and dtype != torch.float64 and not torch.compiler.is_compiling():
        # One pass over memory instead of three; elsewhere complex numbers are slow or missing.
        return (torch.complex(cos, sin),)
    return cos.unsqueeze(-1), torch.stack([-sin, sin], dim=-1)  # [S, 1, K / 2, 1 or 2]


def rotate(x: Tensor, tables: tuple[Tensor, ...]) -> Tensor:
    """Turn channels 2i and 2i + 1 of `x` [B, S, L, K] by the angle of column i of its row's tables.

    Su et al., RoFormer (arXiv 2104.09864), equation 34, in float32 as the checkpoints were trained.
    """
    if len(tables) == 1:
        return (x.float().view(torch.complex64) * tables[0]).view(torch.float32).to(x.dtype)
    pairs = x.unflatten(-1, (-1, 2))
    return (pairs * tables[0]).addcmul_(pairs.flip(-1), tables[1]).flatten(-2).to(x.dtype)


def _norm_rotate_forward(qkv, weights, rotary, num_heads: int, eps: float):
    """Return q, k, v as [B, S, L, K] and the statistics of both norms."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # each [B, S, L, K]
    tables = None if rotary is None else rotation(rotary, q.dtype)
    q, *q_stats = torch.native_layer_norm(q, q.shape[-1:], weights[0], weights[1], eps)
    q = q if tables is None else rotate(q, tables)
    k, *k_stats = torch.native_layer_norm(k, k.shape[-1:], weights[2], weights[3], eps)
    k = k if tables is None else rotate(k, tables)
    return q, k, v, [*q_stats, *k_stats]


def _norm_rotate_backward(dq, dk, dv, qkv, stats, weights, rotary, num_heads: int, needs_weights: bool):
    """Return the gradients of qkv [B, S, 3D] and of the four weights, from those of q, k and v [B, S, L, K]."""
    q, k, _ = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)
    if rotary is not None:
        tables = rotation(rotary, dq.dtype, back=True)
        dq, dk = rotate(dq, tables), rotate(dk, tables)
    mask = [True, needs_weights, needs_weights]
    size = list(q.shape[-1:])
    dq, dqw, dqb = aten.native_layer_norm_backward(dq, q, size, *stats[:2], *weights[:2], mask)
    dk, dkw, dkb = aten.native_layer_norm_backward(dk, k, size, *stats[2:], *weights[2:], mask)
    return torch.stack([dq, dk, dv], dim=2).view_as(qkv), dqw, dqb, dkw, dkb


def _rotary(cos: Tensor | None, sin: Tensor | None) -> tuple[Tensor, Tensor] | None:
    return None if cos is None or sin is None else (cos, sin)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, qw, qb, kw, kb, cos, sin, num_heads, eps):
        q, k, _, stats = _norm_rotate_forward(qkv, (qw, qb, kw, kb), _rotary(cos, sin), num_heads, eps)
        ctx.save_for_backward(qkv, *stats, qw, qb, kw, kb, cos, sin)
        ctx.num_heads = num_heads
        return q.transpose(1, 2), k.transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        qkv, *saved, cos, sin = ctx.saved_tensors
        dq, dk = (g.transpose(1, 2) for g in grads)
        out = _norm_rotate_backward(
            dq, dk, torch.zeros_like(dq), qkv, saved[:4], saved[4:], _rotary(cos, sin), ctx.num_heads,
            any(ctx.needs_input_grad[1:5]),
        )  # fmt: skip
        return *out, None, None, None, None


class _NormRotateAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv, qw, qb, kw, kb, cos, sin, num_heads, eps):
        q, k, v, _ = _norm_rotate_forward(qkv, (qw, qb, kw, kb), _rotary(cos, sin), num_heads, eps)
        out, lse = attention_forward(q, k, v, None)
        out = out.flatten(2)  # [B, S, D]
        ctx.save_for_backward(qkv, qw, qb, kw, kb, cos, sin, out, lse)
        ctx.settings = num_heads, eps
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        qkv, qw, qb, kw, kb, cos, sin, out, lse = ctx.saved_tensors
        num_heads, eps = ctx.settings
        weights = (qw, qb, kw, kb)
        q, k, v, stats = _norm_rotate_forward(qkv, weights, _rotary(cos, sin), num_heads, eps)
        grad, out = (x.unflatten(-1, (num_heads, -1)) for x in (grads[0], out))
        dq, dk, dv = attention_backward(grad, q, k, v, None, out, lse)
        needs_weights = any(ctx.needs_input_grad[1:5])
        out = _norm_rotate_backward(dq, dk, dv, qkv, stats, weights, _rotary(cos, sin), num_heads, needs_weights)
        return *out, None, None, None, None
