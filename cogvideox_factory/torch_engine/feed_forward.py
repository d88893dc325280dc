"""The feed-forward half of a block as one node of the autograd graph.

x + gate * down(gelu(up(modulated norm of x))) keeps x and the 4-unit hidden activation before GELU; the norm's output
and GELU's are made again in the backward pass. Under frozen weights (LoRA elsewhere) that would be 5 of 10 units of a
block, so then only part of the hidden columns is kept and the rest multiplied out again.

Legend: B batch, S joint tokens, D width, H hidden width (4 D).
"""

from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cogvideox_factory.plan.memory import FROZEN_KEPT
from cogvideox_factory.torch_engine.float8 import ALIGNMENT
from cogvideox_factory.torch_engine.fused import (
    add_gated,
    gate_rows,
    gated_linear,
    gated_linear_backward,
    modulated_norm,
    norm_backward,
    norm_forward,
)
from cogvideox_factory.torch_engine.linear import Linear, dense, is_plain, linear, product, scaling_of

aten = torch.ops.aten

_output_unread: ContextVar[bool] = ContextVar("output_unread", default=False)


@contextmanager
def output_unread():
    """Within, the output of the last feed-forward is not going to be read: checkpointing recomputes what it saves."""
    token = _output_unread.set(True)
    try:
        yield
    finally:
        _output_unread.reset(token)


def _is_output_unread() -> bool:
    return not torch.compiler.is_compiling() and _output_unread.get()  # a compiler drops dead code itself


class FeedForward(nn.Module):
    """Modulated norm, `up`, GELU (tanh form), `down`, gate and residual."""

    def __init__(self, width: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.up = Linear(width, 4 * width)
        self.down = Linear(4 * width, width)
        self.checkpointed = False
        """Set while the block runs under checkpointing, where keeping less saves nothing."""

    def forward(self, x: Tensor, vectors: tuple[Tensor, ...], text_length: int) -> Tensor:
        """Return `x` [B, S, D] plus its update; `vectors` are scale, shift, gate of video rows, then of text rows."""
        scale, shift, gate, text_scale, text_shift, text_gate = vectors
        if is_plain(self.up, x) and is_plain(self.down, x):
            kept, scaling = self.up.out_features, scaling_of(self.up)
            trained = self.up.weight.requires_grad or self.down.weight.requires_grad
            if torch.is_grad_enabled() and not trained and not self.checkpointed:
                kept = int(kept * FROZEN_KEPT)
                kept -= kept % ALIGNMENT if scaling else 0
            return _FeedForward.apply(
                x, *vectors, self.up.weight, self.up.bias, self.down.weight, self.down.bias, text_length, self.eps,
                kept, _is_output_unread(), torch.is_grad_enabled(), scaling,
            )  # fmt: skip
        normed = modulated_norm(x, scale, shift, text_scale, text_shift, text_length=text_length, eps=self.eps)
        hidden = self.up(normed)
        activate = F.gelu if torch.is_grad_enabled() else aten.gelu_
        return gated_linear(
            x, activate(hidden, approximate="tanh"), self.down, gate, text_gate, text_length=text_length
        )


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x, scale, shift, gate, text_scale, text_shift, text_gate, up, up_bias, down, down_bias, text_length,
        eps, kept, output_unread, recording, scaling,
    ):  # fmt: skip
        normed, mean, rstd = norm_forward(x, scale, shift, text_scale, text_shift, text_length, eps)
        hidden = linear(normed.flatten(0, 1), dense(up), up_bias, scaling)  # [B * S, H]
        if not recording:  # nothing is kept, so nothing is copied
            del normed
            update = linear(aten.gelu_(hidden, approximate="tanh"), dense(down), down_bias, scaling).view_as(x)
            del hidden
            return add_gated(x, update, gate, text_gate, text_length)
        saved = hidden if kept == len(up) else hidden[:, :kept].contiguous()
        ctx.save_for_backward(
            x,
            mean,
            rstd,
            saved,
            scale,
            shift,
            gate,
            text_scale,
            text_shift,
            text_gate,
            up,
            up_bias,
            down,
            down_bias,
        )
        ctx.text_length, ctx.eps, ctx.scaling = text_length, eps, scaling
        if output_unread:
            return normed  # any tensor of that shape
        update = linear(F.gelu(hidden, approximate="tanh"), dense(down), down_bias, scaling).view_as(x)
        return add_gated(x, update, gate, text_gate, text_length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        x, mean, rstd, hidden, scale, shift, gate, text_scale, text_shift, text_gate, *weights = ctx.saved_tensors
        up, up_bias, down, down_bias = weights
        up, down = dense(up), dense(down)
        text, needs, scaling = ctx.text_length, ctx.needs_input_grad, ctx.scaling
        needs_up, needs_up_bias, *needs_down = needs[7:11]
        needs_gates = needs[3] or needs[6]
        grad, kept = grads[0].contiguous(), hidden.shape[-1]
        vectors = scale, shift, text_scale, text_shift

        normed = x
        if needs_up or kept < len(up):
            normed = norm_forward(x, *vectors, text, ctx.eps)[0].flatten(0, 1)  # [B * S, D]
        if kept < len(up):
            hidden = torch.cat([hidden, linear(normed, up[kept:], up_bias[kept:], scaling)], dim=1)  # [B * S, H]

        d_hidden = product(gate_rows(grad, gate, text_gate, text).flatten(0, 1), down, scaling)
        of_down = (None, None, None, None)
        if needs_gates or any(needs_down):
            active = F.gelu(hidden, approximate="tanh").unflatten(0, x.shape[:2])
            of_down = gated_linear_backward(
                grad, active, down, down_bias, gate, text_gate, text, (*needs_down, needs_gates), scaling
            )
            del active
        d_hidden = aten.gelu_backward(d_hidden, hidden, approximate="tanh")
        d_up = product(d_hidden.T, normed, scaling) if needs_up else None
        d_up_bias = d_hidden.sum(0) if needs_up_bias else None
        del hidden, normed
        d_x, d_scale, d_shift, d_text_scale, d_text_shift = norm_backward(
            product(d_hidden, up, scaling).view_as(x), x, mean, rstd, vectors, text,
            vectors_too=any(needs[i] for i in (1, 2, 4, 5)),
        )  # fmt: skip
        d_down, d_down_bias, d_gate, d_text_gate = of_down
        return (
            d_x.add_(grad), d_scale, d_shift, d_gate, d_text_scale, d_text_shift, d_text_gate,
            d_up, d_up_bias, d_down, d_down_bias, None, None, None, None, None, None,
        )  # fmt: skip
