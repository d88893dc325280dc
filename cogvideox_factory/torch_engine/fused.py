"""Adaptive LayerNorm and gated residual of a transformer block, each one node of the autograd graph.

All work on the joint token stream, text rows first, and treat text and video rows by row ranges: the rows get their
own shift, scale and gate, nothing is split or joined. What can be recomputed cheaply is not saved: `modulated_norm`
keeps its input and two numbers a row, as a plain LayerNorm does, and `gated_linear` its input only, for the gradient
of the gate is read off the weight's.

Vectors (scale, shift, gate) are [D] when the batch has one sample, [B, 1, D] otherwise.

Legend: B batch, S joint tokens, T text tokens, D width, I O inputs and outputs of a weight.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideox_factory.torch_engine.linear import dense, is_plain, linear, product, scaling_of

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
    _write(text, torch.addcmul, text_shift, text, text_scale)
    _write(video, torch.addcmul, shift, video, scale)
    return out, mean, rstd


def _write(out: Tensor, function: Callable[..., Tensor], *args: Tensor) -> None:
    """Put `function(*args)` into the view `out`."""
    if torch.compiler.is_compiling():  # compilers take no strided `out`, and need none
        out.copy_(function(*args))
    else:
        function(*args, out=out)


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

    def gather(parts, is_text):
        if (0, is_text) not in parts:  # no row had these vectors
            return torch.zeros_like(vectors[0])
        return _joined([parts[sample, is_text] for sample in range(x.shape[0])], vectors[0])

    return dx, gather(scales, False), gather(shifts, False), gather(scales, True), gather(shifts, True)


def _joined(rows: list[Tensor], like: Tensor) -> Tensor:
    """Return one row [D] a sample, in the shape of `like`: [D] or [B, 1, D]."""
    return (rows[0] if len(rows) == 1 else torch.stack(rows)).view_as(like)


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
        return _GatedLinear.apply(  # pyright: ignore[reportReturnType]
            x, a, module.weight, module.bias, gate, text_gate, text_length, scaling_of(module)
        )
    return gated_residual(x, module(a), gate, text_gate, text_length=text_length)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, *, text_length: int) -> Tensor:
    """Return x + gate * y, the first `text_length` rows with the text's gate: [B, S, D]."""
    return _GatedResidual.apply(x, y, gate, text_gate, text_length)  # pyright: ignore[reportReturnType]


def add_gated(x: Tensor, y: Tensor, gate: Tensor, text_gate: Tensor, text_length: int) -> Tensor:
    """Compute `gated_residual` outside autograd."""
    out = torch.addcmul(x, y, gate)
    if text_length:  # few rows: doing them twice is cheaper than two strided passes
        _write(out[:, :text_length], torch.addcmul, x[:, :text_length], y[:, :text_length], text_gate)
    return out


def gate_rows(grad: Tensor, gate: Tensor, text_gate: Tensor, text_length: int) -> Tensor:
    """Return `grad` [B, S, D] times the gate of each row."""
    out = grad * gate
    if text_length:
        _write(out[:, :text_length], torch.mul, grad[:, :text_length], text_gate)
    return out


def gated_linear_backward(
    grad, a, weight, bias, gate, text_gate, text_length: int, needs: tuple[bool, bool, bool], scaling: str | None
):
    """Return the gradients of (weight, bias, gate, text_gate) of x + gate * (a weight^T + bias).

    With G = grad^T a over the rows that share a gate, the weight's gradient is gate * G summed over such groups and
    the gate's is rowsum(weight * G) + bias * sum(grad): the product `a weight^T` itself is not needed. `needs` says
    which of weight, bias and gates want one, `scaling` is for products in float8.
    """
    needs_weight, needs_bias, needs_gates = needs
    if not needs_gates:
        gated = gate_rows(grad, gate, text_gate, text_length).flatten(0, 1)
        d_weight = product(gated.T, a.flatten(0, 1), scaling) if needs_weight else None
        return d_weight, gated.sum(0) if needs_bias else None, None, None
    d_weight = d_bias = None
    gates = text_gate.reshape(-1, grad.shape[-1]), gate.reshape(-1, grad.shape[-1])  # each [B, D]
    d_gates: tuple[list[Tensor], list[Tensor]] = [], []
    for sample in range(grad.shape[0]):
        for part, rows in enumerate((slice(0, text_length), slice(text_length, None))):
            if part == 0 and not text_length:
                d_gates[part].append(torch.zeros_like(gates[part][sample]))
                continue
            g = product(grad[sample, rows].T, a[sample, rows], scaling)  # [O, I]
            total = grad[sample, rows].sum(0)  # [O]
            d_gate = torch.linalg.vecdot(g, weight)
            d_gates[part].append(d_gate if bias is None else torch.addcmul(d_gate, bias, total))
            factor = gates[part][sample]
            if needs_weight:
                factors = factor[:, None]
                d_weight = g.mul_(factors) if d_weight is None else d_weight.addcmul_(g, factors)
            if needs_bias:
                d_bias = total * factor if d_bias is None else d_bias.addcmul_(total, factor)
    return d_weight, d_bias, _joined(d_gates[1], gate), _joined(d_gates[0], gate)


class _GatedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, a, weight, bias, gate, text_gate, text_length, scaling):
        ctx.save_for_backward(a if any(ctx.needs_input_grad[2:6]) else None, weight, bias, gate, text_gate)
        ctx.text_length, ctx.scaling = text_length, scaling
        return add_gated(x, linear(a, dense(weight), bias, scaling), gate, text_gate, text_length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        a, weight, bias, gate, text_gate = ctx.saved_tensors
        weight, grad = dense(weight), grads[0].contiguous()
        needs = ctx.needs_input_grad
        d_a = None
        if needs[1]:
            d_a = product(gate_rows(grad, gate, text_gate, ctx.text_length), weight, ctx.scaling)
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
                ctx.scaling,
            )
        return grad, d_a, *others, None, None


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
