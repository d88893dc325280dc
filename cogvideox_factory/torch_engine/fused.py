"""The pieces of a transformer block between its matrix products, each one node of the autograd graph.

All work on the joint token stream, text rows first, and treat text and video rows by row ranges: the rows get their
own shift, scale and gate, nothing is split or joined. What can be recomputed cheaply is not saved:

- `modulated_norm` keeps its input and two numbers a row, as a plain LayerNorm does;
- `norm_rotate_attention` keeps the fused projection, the attention output and its log-sum-exp; the normalised and
  rotated q and k are made again in the backward pass (a torch graph would keep them too, 2 units a block);
- `gated_linear` needs its input only: the gradient of the gate is read off the weight's.

A unit is one activation of the stream, S * D elements. `norm_rotate` and `attention.attention` are the two halves of
`norm_rotate_attention` for callers that exchange tokens for heads in between (sequence parallelism).

Vectors (scale, shift, gate) are [D] when the batch has one sample, [B, 1, D] otherwise.

Legend: B batch, S joint tokens, T text tokens, D width, L heads, K head size, O rows of a weight.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideox_factory.torch_engine.attention import attention_backward, attention_forward
from cogvideox_factory.torch_engine.linear import is_plain, linear, product

aten = torch.ops.aten

# --- adaptive LayerNorm -----------------------------------------------------------------------------------------------


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    text_scale: Tensor,
    text_shift: Tensor,
    *,
    text_length: int,
    eps: float,
) -> Tensor:
    """Return LayerNorm(x) * scale + shift of `x` [B, S, D], its first `text_length` rows with the text's vectors.

    The norm's own weight and bias, if it has any, are expected to be folded into the vectors.
    """
    return _ModulatedNorm.apply(x, scale, shift, text_scale, text_shift, text_length, eps)  # pyright: ignore


def norm_forward(x, scale, shift, text_scale, text_shift, text_length: int, eps: float):
    """Return the modulated norm [B, S, D], and mean and 1/deviation [B, S, 1] for `norm_backward`."""
    size = x.shape[-1:]
    if scale.dim() == 1:  # one sample: LayerNorm's own weight does it, and the few text rows are done again
        out, mean, rstd = torch.native_layer_norm(x, size, scale, shift, eps)
        if text_length:
            out[:, :text_length] = F.layer_norm(x[:, :text_length], size, text_scale, text_shift, eps)
        return out, mean, rstd
    out, mean, rstd = torch.native_layer_norm(x, size, None, None, eps)
    text, video = out[:, :text_length], out[:, text_length:]
    torch.addcmul(text_shift, text, text_scale, out=text)
    torch.addcmul(shift, video, scale, out=video)
    return out, mean, rstd


def norm_backward(grad, x, mean, rstd, vectors, text_length: int, *, vectors_too: bool):
    """Return the gradients of x and (or None) of the four vectors, in the order of `norm_forward`."""
    size = list(x.shape[-1:])
    scale, shift, text_scale, text_shift = (v.reshape(-1, *size) for v in vectors)  # [B, D]
    ranges = [r for r in (range(text_length), range(text_length, x.shape[1])) if len(r)]
    rows, scales, shifts = [], {}, {}
    for sample in range(x.shape[0]):
        for part in ranges:
            at = slice(part.start, part.stop)
            a, b = (text_scale, text_shift) if part.start < text_length else (scale, shift)
            dx, da, db = aten.native_layer_norm_backward(
                grad[sample, at], x[sample, at], size, mean[sample, at], rstd[sample, at], a[sample], b[sample],
                [True, vectors_too, vectors_too],
            )  # fmt: skip
            rows.append(dx)
            scales[sample, part.start < text_length], shifts[sample, part.start < text_length] = da, db
    dx = (torch.cat(rows) if len(rows) > 1 else rows[0]).view_as(x)
    if not vectors_too:
        return dx, None, None, None, None
    zero = torch.zeros_like(scale[0])  # of vectors that no row had

    def gather(parts, is_text):
        return torch.stack([parts.get((s, is_text), zero) for s in range(x.shape[0])]).view_as(vectors[0])

    return dx, gather(scales, False), gather(shifts, False), gather(scales, True), gather(shifts, True)


class _ModulatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, scale, shift, text_scale, text_shift, text_length, eps):
        out, mean, rstd = norm_forward(x, scale, shift, text_scale, text_shift, text_length, eps)
        ctx.save_for_backward(x, mean, rstd, scale, shift, text_scale, text_shift)
        ctx.text_length = text_length
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        x, mean, rstd, *vectors = ctx.saved_tensors
        needs_vectors = any(ctx.needs_input_grad[1:5])
        grads = norm_backward(grads[0].contiguous(), x, mean, rstd, vectors, ctx.text_length, vectors_too=needs_vectors)
        return *grads, None, None


# --- gated residual ---------------------------------------------------------------------------------------------------


def gated_linear(
    x: Tensor, a: Tensor, module: torch.nn.Module, gate: Tensor, text_gate: Tensor, *, text_length: int
) -> Tensor:
    """Return x + gate * module(a), the first `text_length` rows with the text's gate: [B, S, D].

    Args:
        x: the residual stream [B, S, D].
        a: the input of `module`, [B, S, I].
        module: a Linear, or what stands in for one. Only a plain one takes the path that saves just `a`.
        gate: [D] or [B, 1, D], as `text_gate`.
        text_length: rows at the front that are text.
    """
    if is_plain(module, a):
        return _GatedLinear.apply(x, a, module.weight, module.bias, gate, text_gate, text_length)  # pyright: ignore
    return gated_residual(x, module(a), gate, text_gate, text_length=text_length)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, *, text_length: int) -> Tensor:
    """Return x + gate * y, the first `text_length` rows with the text's gate: [B, S, D]."""
    return _GatedResidual.apply(x, y, gate, text_gate, text_length)  # pyright: ignore[reportReturnType]


def add_gated(x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, text_length: int) -> Tensor:
    """Compute `gated_residual` outside autograd."""
    out = torch.addcmul(x, y, gate)
    if text_length:  # few rows: doing them twice is cheaper than two strided passes
        torch.addcmul(x[:, :text_length], y[:, :text_length], text_gate, out=out[:, :text_length])
    return out


def gate_rows(grad: Tensor, gate: Tensor, text_gate: Tensor, text_length: int) -> Tensor:
    """Return `grad` [B, S, D] times the gate of each row."""
    out = grad * gate
    if text_length:
        torch.mul(grad[:, :text_length], text_gate, out=out[:, :text_length])
    return out


def gated_linear_backward(grad, a, weight, bias, gate, text_gate, text_length: int, needs: tuple[bool, bool, bool]):
    """Return the gradients of (weight, bias, gate, text_gate) of x + gate * (a weight^T + bias).

    With G = grad^T a over the rows that share a gate, the weight's gradient is gate * G summed over such groups and the
    gate's is rowsum(weight * G) + bias * sum(grad): the product `a weight^T` itself is not needed. `needs` says which of
    weight, bias and gates want one.
    """
    needs_weight, needs_bias, needs_gates = needs
    if not needs_gates:
        gated = gate_rows(grad, gate, text_gate, text_length).flatten(0, 1)
        d_weight = product(gated.T, a.flatten(0, 1)) if needs_weight else None
        return d_weight, gated.sum(0) if needs_bias else None, None, None
    d_weight = d_bias = None
    d_gates = []
    gates = torch.stack([text_gate.reshape(-1, grad.shape[-1]), gate.reshape(-1, grad.shape[-1])], 1)  # [B, 2, D]
    for sample in range(grad.shape[0]):
        for part, rows in enumerate((slice(0, text_length), slice(text_length, None))):
            g = product(grad[sample, rows].T, a[sample, rows])  # [O, I]
            total = grad[sample, rows].sum(0)  # [O]
            d_gate = torch.linalg.vecdot(g, weight)
            d_gates.append(d_gate if bias is None else torch.addcmul(d_gate, bias, total))
            factor = gates[sample, part]
            if needs_weight:
                factors = factor[:, None]
                d_weight = g.mul_(factors) if d_weight is None else d_weight.addcmul_(g, factors)
            if needs_bias:
                d_bias = total * factor if d_bias is None else d_bias.addcmul_(total, factor)
    d_text, d_video = torch.stack(d_gates).view(-1, 2, grad.shape[-1]).unbind(1)
    return d_weight, d_bias, d_video.view_as(gate), d_text.view_as(gate)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, a, weight, bias, gate, text_gate, text_length):
        ctx.save_for_backward(a if any(ctx.needs_input_grad[2:6]) else None, weight, bias, gate, text_gate)
        ctx.text_length = text_length
        return add_gated(x, linear(a, weight, bias), gate, text_gate, text_length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        a, weight, bias, gate, text_gate = ctx.saved_tensors
        grad = grads[0].contiguous()
        needs = ctx.needs_input_grad
        d_a = None
        if needs[1]:
            d_a = product(gate_rows(grad, gate, text_gate, ctx.text_length), weight)
        others = (None, None, None, None)
        if any(needs[2:6]):
            others = gated_linear_backward(
                grad,
                a,
                weight,
                bias,
                gate,
                text_gate,
                ctx.text_length,
                (needs[2], needs[3], needs[4] or needs[5]),
            )
        return grad, d_a, *others, None


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, y, gate, text_gate, text_length):
        needs_gates = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
        ctx.save_for_backward(y if needs_gates else None, gate, text_gate)
        ctx.text_length = text_length
        return add_gated(x, y, gate, text_gate, text_length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        y, gate, text_gate = ctx.saved_tensors
        grad, text = grads[0].contiguous(), ctx.text_length
        d_y = gate_rows(grad, gate, text_gate, text) if ctx.needs_input_grad[1] else None
        d_gate = d_text = None
        if y is not None:
            weighted = grad * y
            d_gate = weighted[:, text:].sum(1, keepdim=True).view_as(gate)
            d_text = weighted[:, :text].sum(1, keepdim=True).view_as(gate)
        return grad, d_y, d_gate, d_text, None


# --- q and k: LayerNorm and rotary position embedding -----------------------------------------------------------------


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
    """Return the tables `rotate` needs for tensors of `dtype`, from (cos, sin) [S, 1, K / 2]; `back` turns the other way."""
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
    pairs = x.unflatten(-1, (-1, 2))
    if len(tables) == 1:
        turned = torch.view_as_real(torch.view_as_complex(pairs.float()) * tables[0])
    else:
        turned = torch.addcmul(pairs * tables[0], pairs.flip(-1), tables[1])
    return turned.flatten(-2).to(x.dtype)


def _norm_rotate_forward(qkv, weights, rotary, num_heads: int, eps: float):
    """Return q, k, v as [B, S, L, K] and the statistics of both norms."""
    q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(2)  # each [B, S, L, K]
    q, *q_stats = torch.native_layer_norm(q, q.shape[-1:], weights[0], weights[1], eps)
    k, *k_stats = torch.native_layer_norm(k, k.shape[-1:], weights[2], weights[3], eps)
    if rotary is not None:
        tables = rotation(rotary, q.dtype)
        q, k = rotate(q, tables), rotate(k, tables)
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
        out, lse = attention_forward(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None)
        out = out.transpose(1, 2).flatten(2)  # [B, S, D], a view
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
        heads = [x.unflatten(-1, (num_heads, -1)) for x in (grads[0], out)]
        grad, q, k, v, out = (x.transpose(1, 2) for x in (heads[0], q, k, v, heads[1]))
        dq, dk, dv = (g.transpose(1, 2) for g in attention_backward(grad, q, k, v, None, out, lse))
        needs_weights = any(ctx.needs_input_grad[1:5])
        out = _norm_rotate_backward(dq, dk, dv, qkv, stats, weights, _rotary(cos, sin), num_heads, needs_weights)
        return *out, None, None, None, None
