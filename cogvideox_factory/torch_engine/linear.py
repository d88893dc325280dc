"""Linear layers that stay fast where the CPU has no half-precision instructions, and know weights of few bits.

Without AVX512-BF16 or AMX, torch multiplies bfloat16 matrices in software: about 8 times slower than in float32, and
200 times in the one layout that the gradient of a Linear's input needs. Such products go through float32 here and are
rounded once at the end, as the instructions would do. Frozen weights of few bits (`low_bit`) are made a matrix again
for each product, forward and backward, and never kept as one. Products in `float8` are for training alone:
without gradients, as for held-out losses, they are those of the model that will be exported. Everywhere else this is
torch's own Linear.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cogvideox_factory.torch_engine.float8 import multiply

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

    float8: str | None = None
    """How matrices are scaled for products in float8 (`float8.SCALINGS`), if these are wanted in training."""

    def reset_parameters(self) -> None:
        """Do nothing."""

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        return linear(input, self.weight, self.bias, scaling_of(self))


def set_float8(modules: nn.Module, scaling: str | None) -> None:
    """Let every `Linear` in `modules` multiply in float8 in training, or no more."""
    for module in modules.modules():
        if isinstance(module, Linear):
            module.float8 = scaling


def scaling_of(module: nn.Module) -> str | None:
    """Return how `module` scales matrices for float8 now; None: it does not."""
    return module.float8 if isinstance(module, Linear) and torch.is_grad_enabled() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, scaling: str | None = None) -> Tensor:
    """Return x weight^T + bias for `x` [..., I], `weight` [O, I] and `bias` [O]; with a `scaling`, in float8."""
    if scaling or emulated(x) or is_low_bit(weight):
        return _SparingLinear.apply(x, weight, bias, scaling)  # pyright: ignore[reportReturnType]
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, scaling: str | None = None) -> Tensor:
    """Return the matrix product a b, in a's dtype. Outside autograd, or where neither needs a gradient.

    With a `scaling` it is made in float8, and `a` is a gradient.
    """
    if scaling:
        return multiply(a.flatten(0, -2), b, scaling=scaling, of_gradient=True).unflatten(0, a.shape[:-1])
    return (a.float() @ b.float()).to(a.dtype) if emulated(a) else a @ b


def is_low_bit(weight: object) -> bool:
    """Whether `weight` is kept in few bits, as one of torchao's tensors."""
    divided = hasattr(weight, "full_tensor")  # among processes, which wraps tensors as well
    return is_traceable_wrapper_subclass(weight) and not divided


def dense(weight: Tensor) -> Tensor:
    """Return `weight` as a plain tensor of its dtype; weights of few bits are made one, to be dropped after use."""
    if not is_low_bit(weight):
        return weight
    restore = getattr(weight, "get_original_weight", weight.dequantize)  # nf4's name for it
    return restore()


def is_plain(module: nn.Module, x: Tensor) -> bool:
    """Whether calling `module` on `x` is only `F.linear` with its own parameters, so that they may be used directly.

    It is not once something wraps it (adapters), hooks into it, shards its weight, or when autocast is on: then it
    must be called as a module. A weight of few bits is used directly through `dense`.
    """
    return (
        type(module) in (Linear, nn.Linear)
        and not module._forward_hooks
        and not module._forward_pre_hooks
        and (type(module.weight) in (nn.Parameter, Tensor) or is_low_bit(module.weight))
        and module.weight.dtype == x.dtype
        and not torch.is_autocast_enabled(x.device.type)
    )


def emulated(x: Tensor) -> bool:
    """Whether matrix products in the dtype of `x` are done in software where it is."""
    return x.device.type == "cpu" and x.dtype in _SOFTWARE


class _SparingLinear(torch.autograd.Function):
    """Linear that saves its operands as they are, not what is made of them: float32 copies, matrices of few bits."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, scaling):
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        ctx.scaling = scaling
        if scaling:
            return multiply(x.flatten(0, -2), weight.T, scaling=scaling, bias=bias).unflatten(0, x.shape[:-1])
        if not emulated(x):
            return F.linear(x, dense(weight), bias)
        return F.linear(x.float(), dense(weight).float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        x, weight = ctx.saved_tensors
        grad = grads[0].flatten(0, -2)
        needs_x, needs_weight, needs_bias, _ = ctx.needs_input_grad
        return (
            product(grads[0], dense(weight), ctx.scaling) if needs_x else None,
            product(grad.T, x.flatten(0, -2), ctx.scaling) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
        )
