"""Linear layers and layer norms by a checkpoint's names and shapes, in the dtype of what they are given.

Weights may be kept wider than activations: a Linear rounds its own to the dtype of its input, a norm computes in
float32 whatever comes. So mixed precision is a dtype of the input and one of the weights, and nothing else.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

# Legend: I O inputs and outputs of a weight


_NUMPY = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
_dtype: ContextVar[Any] = ContextVar("dtype of new weights", default=ms.float32)


@contextmanager
def weights_in(dtype: Any) -> Iterator[None]:
    """Within, cells are made with weights in `dtype`, so that a model is never there in another first."""
    token = _dtype.set(dtype)
    try:
        yield
    finally:
        _dtype.reset(token)


def empty(*shape: int, requires_grad: bool = True) -> Parameter:
    """Return a parameter of zeros, to be loaded or drawn."""
    zeros = np.zeros(shape, _NUMPY[_dtype.get()])
    return Parameter(Tensor(zeros), requires_grad=requires_grad)


class Linear(nn.Cell):
    """x W^T + b; a `weight` of more than two axes is one of a convolution that sees each input once."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = True, shape: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        assert prod(shape or (in_features,)) == in_features
        self.weight = empty(out_features, *(shape or (in_features,)))
        self.bias = empty(out_features) if bias else None

    def construct(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        weight = self.weight.astype(x.dtype).reshape(self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.astype(x.dtype)
        return mint.nn.functional.linear(x, weight, bias)


class LayerNorm(nn.Cell):
    """Layer norm over the last axis in float32, with or without a weight and a bias of its own."""

    def __init__(self, size: int, *, eps: float, elementwise_affine: bool = True) -> None:
        super().__init__()
        self.norm = ops.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=eps)
        self.weight = self.bias = None
        self.one, self.zero = Tensor(np.ones(size, np.float32)), Tensor(np.zeros(size, np.float32))
        if elementwise_affine:
            self.weight, self.bias = empty(size), empty(size)

    def construct(self, x: Tensor) -> Tensor:
        """Map [..., size] to the same shape and dtype."""
        weight = self.one if self.weight is None else self.weight.astype(ms.float32)
        bias = self.zero if self.bias is None else self.bias.astype(ms.float32)
        return self.norm(x.astype(ms.float32), weight, bias)[0].astype(x.dtype)
