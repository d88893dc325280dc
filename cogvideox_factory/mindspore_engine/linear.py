"""Linear layers and layer norms by a checkpoint's names and shapes, in the dtype of what they are given.

Weights may be kept wider than activations: a Linear rounds its own to the dtype of its input, a norm computes in
float32 whatever comes. So mixed precision is a dtype of the input and one of the weights, and nothing else.

Processes may divide the weights of Linears among them (`weights_in`); each then gathers them where it uses them.
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

from cogvideox_factory.mindspore_engine.border import Rows
from cogvideox_factory.mindspore_engine.collectives import GatherShards
from cogvideox_factory.mindspore_engine.sharding import Shards

# Legend: I O inputs and outputs of a weight

_NUMPY = {ms.float32: np.float32, ms.float16: np.float16, ms.bfloat16: ml_dtypes.bfloat16}
_dtype: ContextVar[Any] = ContextVar("dtype of new weights", default=ms.float32)
_shards: ContextVar[Shards | None] = ContextVar("who divides the weights of new Linears", default=None)


@contextmanager
def weights_in(dtype: Any, shards: Shards | None = None) -> Iterator[None]:
    """Within, cells are made with weights in `dtype`, so that a model is never there in another, or whole, first."""
    tokens = _dtype.set(dtype), _shards.set(shards)
    try:
        yield
    finally:
        _dtype.reset(tokens[0])
        _shards.reset(tokens[1])


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
        shards = _shards.get()
        rows = None if shards is None else Rows(total=out_features, group=shards.group)
        self.weight = empty(rows.held if rows else out_features, *(shape or (in_features,)))
        self.gather = None
        if shards is not None:
            self.weight.rows = rows
            self.gather = GatherShards(shards.group, shards.dtype)
        self.bias = empty(out_features) if bias else None

    def whole_weight(self, dtype: Any) -> Tensor:
        """Return all rows of the weight in `dtype`; the processes that divide it call this at the same point."""
        if self.gather is None:
            return self.weight.astype(dtype)
        return self.gather(self.weight)[: self.out_features].astype(dtype)

    def construct(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]."""
        weight = self.whole_weight(x.dtype).reshape(self.out_features, self.in_features)
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
