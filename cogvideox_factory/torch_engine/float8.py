"""Matrix products of training in float8: both matrices are rounded to 8 bits, scaled, and multiplied in float32.

Micikevicius et al., "FP8 Formats for Deep Learning" (arXiv 2209.05433). A linear layer has three such products, its
output x W^T and the gradients dy W and dy^T x; weights, optimizer and everything between the products stay as they are.

| scales | one for | x and W | gradients |
|---|---|---|---|
| rowwise | each row of the left, each column of the right | e4m3, 3 bits of mantissa | e4m3 |
| tensorwise | each matrix | e4m3 | e5m2, 2 bits and the range that one scale for all rows needs |

These are torchao's recipes (`torchao.float8`), but not its layer: that is a module to be called, which would undo the
nodes that `fused`, `feed_forward` and `lora_linear` make of a linear layer and what is around it. A scale comes from
the matrix itself, so nothing is remembered from step to step. It is a power of two, so scaling is exact, and a number
is rounded alike whatever it is scaled with, unless it is 2^-13 of the largest or less: other rows beside it, in another
process say, change its last bits at most.

On a CPU the same numbers are multiplied in float32.

Legend: M K N rows, inner size and columns of a product.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_factory.errors import FactoryError

SCALINGS = ("rowwise", "tensorwise")

ALIGNMENT = 16
"""What K and N of a product on a card are multiples of."""

_SMALLEST = 2.0**-60
"""Matrices with no larger entry are scaled as if they had one: two scales together must be a float32."""

_EXPONENT = 0x7F800000
"""Of a float32: what is left when the mantissa is cleared, a power of two."""


def check_float8(scaling: str, *, width: int, dtype: torch.dtype, device: torch.device) -> None:
    """Check that blocks of a `width` can be trained so in `dtype`; whether `device` can is `device.require_float8`'s.

    Raises:
        FactoryError: the width or the dtype does not fit.
    """
    if width % ALIGNMENT:
        raise FactoryError(
            f"train.fp8={scaling} needs widths that {ALIGNMENT} divides, and this model's is {width}. "
            "Use --train.fp8 none."
        )
    fits = (torch.bfloat16, torch.float32) if device.type == "cpu" else (torch.bfloat16,)
    if dtype not in fits:
        raise FactoryError(
            f"train.fp8={scaling} goes with run.dtype=bfloat16, not {str(dtype).removeprefix('torch.')}: products come "
            "out in bfloat16, and scales need its range. Use --run.dtype bfloat16, or --train.fp8 none."
        )


def multiply(a: Tensor, b: Tensor, *, scaling: str, bias: Tensor | None = None, of_gradient: bool = False) -> Tensor:
    """Return a b + bias, [M, N] in the dtype of `a`, of both rounded to float8. Outside autograd.

    Args:
        a: [M, K], float32 or bfloat16.
        b: [K, N] in the same dtype.
        scaling: one of `SCALINGS`.
        bias: [N], added before the only other rounding.
        of_gradient: `a` is a gradient.
    """
    rowwise = scaling == "rowwise"
    left, left_scale = _round(a, torch.float8_e5m2 if of_gradient and not rowwise else torch.float8_e4m3fn, rowwise)
    right, right_scale = (part.T for part in _round(b.T, torch.float8_e4m3fn, rowwise))
    if a.device.type == "cpu":
        return _in_float32(left, right, left_scale, right_scale, bias).to(a.dtype)
    # Sums in the units' own, shorter registers do for the output; gradients are summed in whole ones, as in torchao.
    return torch._scaled_mm(
        left, right, scale_a=left_scale, scale_b=right_scale, bias=bias, out_dtype=a.dtype,
        use_fast_accum=not of_gradient,
    )  # fmt: skip


def _in_float32(left: Tensor, right: Tensor, left_scale: Tensor, right_scale: Tensor, bias: Tensor | None) -> Tensor:
    out = left.float() @ right.float() * left_scale * right_scale
    return out if bias is None else out + bias


def _round(x: Tensor, dtype: torch.dtype, rowwise: bool) -> tuple[Tensor, Tensor]:
    """Return `x` [R, K] in float8, K filled up with zeros, and what to multiply it with: float32 [R, 1] or [1, 1]."""
    largest = torch.linalg.vector_norm(x, math.inf, dim=1 if rowwise else (0, 1), keepdim=True).float()
    scale = torch.finfo(dtype).max / largest.clamp(min=_SMALLEST)
    scale = scale.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    rounded = (x * scale.to(x.dtype)).to(dtype)
    if missing := -x.shape[1] % ALIGNMENT:
        rounded = F.pad(rounded, (0, missing))
    return rounded.contiguous(), scale.reciprocal()
