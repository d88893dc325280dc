"""Linear layers that stay fast where the CPU has no half-precision instructions.

Without AVX512-BF16 or AMX, torch multiplies bfloat16 matrices in software: about 8 times slower than in float32, and
200 times in the one layout that the gradient of a Linear's input needs. Such products go through float32 here and are
rounded once at the end, as the instructions would do. Everywhere else this is torch's own Linear.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_ONEDNN = torch.backends.mkldnn.is_available()
_SOFTWARE = {
    dtype
    for dtype, supported in (
        (torch.bfloat16, _ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported()),
        (torch.float16, _ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported()),
    )
    if not supported
}
"""The half-precision dtypes this CPU has no matrix instructions for."""


class Linear(nn.Linear):
    """`nn.Linear` whose weights are left as memory was: the model that owns them draws or loads them."""

    def reset_parameters(self) -> None:
        """Do nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x weight^T + bias for `x` [..., I], `weight` [O, I] and `bias` [O]."""
    if emulated(x):
        return _EmulatedLinear.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return the matrix product a b, in a's dtype. Outside autograd, or where neither needs a gradient."""
    return (a.float() @ b.float()).to(a.dtype) if emulated(a) else a @ b


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling `module` on `x` is only `F.linear` with its own parameters, so that they may be used directly.

    It is not once something wraps it (adapters, low-bit weights), hooks into it, shards its weight, or when autocast
    is on: then it must be called as a module.
    """
    return (
        type(module) in (Linear, nn.Linear)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and type(module.weight) in (nn.Parameter, Tensor)
        and module.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def emulated(x: Tensor) -> bool:
    """Whether matrix products in the dtype of `x` are done in software where it is."""
    return x.device.type == "cpu" and x.dtype in _SOFTWARE


class _EmulatedLinear(torch.autograd.Function):
    """Linear through float32 that saves its half-precision operands, not their float32 copies."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            product(grads[0], weight) if needs_x else None,
            product(grad.T, x.flatten(0, -2)) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
        )
