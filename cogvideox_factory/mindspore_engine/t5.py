"""T5's encoder (Raffel et al., arXiv 1910.10683; version 1.1), with the checkpoint's parameter names.

The residual stream is float32 and products are in the encoder's dtype: T5 overflows float16 in the stream and in its
last product, which therefore is float32 too when the dtype is float16.

Legend: B captions, T text tokens, E embedding width, L heads, K head size.
"""

import math
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.mindspore_engine.linear import Linear, empty


class T5Encoder(nn.Cell):
    """Token ids to embeddings."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        if config.get("feed_forward_proj") != "gated-gelu":
            raise UnfitError(
                f"feed_forward_proj={config.get('feed_forward_proj')!r}: the text encoder of CogVideoX has "
                "'gated-gelu' (T5 v1.1), and this engine knows no other. Point to a CogVideoX model's root folder."
            )
        self.num_buckets = config["relative_attention_num_buckets"]
        self.max_distance = config["relative_attention_max_distance"]
        self.shared = _Embedding(config["vocab_size"], config["d_model"])
        self.encoder = _Stack(config)

    def construct(self, ids: Tensor, buckets: Tensor) -> Tensor:
        """Return [B, T, E] of `ids` [B, T]; `buckets` [T, T] are `relative_buckets`' of that length."""
        return self.encoder(self.shared(ids), buckets)

    def buckets(self, length: int) -> Tensor:
        """Return `relative_buckets` for texts of `length` tokens."""
        return Tensor(relative_buckets(length, self.num_buckets, self.max_distance))


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Return int32 [length, length]: in which bucket of distances each key (column) is for each query (row).

    Half of the buckets are for words ahead; in each half, half is for single distances and the rest grow
    logarithmically up to `max_distance` (appendix of the paper's code, in float32 as the checkpoints were trained).
    """
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    far = np.maximum(np.abs(distance), 1).astype(np.float32) / np.float32(exact)
    steps = np.log(far) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far_bucket = np.minimum(exact + steps.astype(np.int64), half - 1)
    bucket = np.where(np.abs(distance) < exact, np.abs(distance), far_bucket)
    return (bucket + half * (distance > 0)).astype(np.int32)


class _Embedding(nn.Cell):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.weight = empty(count, width)

    def construct(self, ids: Tensor) -> Tensor:
        return ops.gather(self.weight, ids, 0)


class _Stack(nn.Cell):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.block = nn.CellList([_Block(config, has_bias=index == 0) for index in range(config["num_layers"])])
        self.final_layer_norm = _RootMeanSquareNorm(config["d_model"], config["layer_norm_epsilon"])

    def construct(self, embeds: Tensor, buckets: Tensor) -> Tensor:
        dtype = embeds.dtype
        # [1, L, T, T], of the first block and for all
        bias = self.block[0].layer[0].SelfAttention.relative_attention_bias(buckets)
        bias = bias.transpose(2, 0, 1)[None].astype(ms.float32)
        x = embeds.astype(ms.float32)
        for block in self.block:
            x = block(x, bias, dtype)
        return self.final_layer_norm(x).astype(dtype)


class _Block(nn.Cell):
    def __init__(self, config: dict[str, Any], *, has_bias: bool) -> None:
        super().__init__()
        self.layer = nn.CellList([_AttentionLayer(config, has_bias=has_bias), _FeedForwardLayer(config)])

    def construct(self, x: Tensor, bias: Tensor, dtype: Any) -> Tensor:
        return self.layer[1](self.layer[0](x, bias, dtype), dtype)


class _AttentionLayer(nn.Cell):
    def __init__(self, config: dict[str, Any], *, has_bias: bool) -> None:
        super().__init__()
        self.SelfAttention = _SelfAttention(config, has_bias=has_bias)
        self.layer_norm = _RootMeanSquareNorm(config["d_model"], config["layer_norm_epsilon"])

    def construct(self, x: Tensor, bias: Tensor, dtype: Any) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x).astype(dtype), bias).astype(ms.float32)


class _SelfAttention(nn.Cell):
    def __init__(self, config: dict[str, Any], *, has_bias: bool) -> None:
        super().__init__()
        width, self.num_heads, self.head_dim = config["d_model"], config["num_heads"], config["d_kv"]
        inner = self.num_heads * self.head_dim
        self.q, self.k, self.v = (Linear(width, inner, bias=False) for _ in "qkv")
        self.o = Linear(inner, width, bias=False)
        self.relative_attention_bias = None
        if has_bias:
            self.relative_attention_bias = _Embedding(config["relative_attention_num_buckets"], self.num_heads)

    def construct(self, x: Tensor, bias: Tensor) -> Tensor:
        batch, tokens = x.shape[:2]
        heads = (batch, tokens, self.num_heads, self.head_dim)
        q = self.q(x).reshape(heads).transpose(0, 2, 1, 3)  # [B, L, T, K]
        k = self.k(x).reshape(heads).transpose(0, 2, 1, 3)
        v = self.v(x).reshape(heads).transpose(0, 2, 1, 3)
        scores = ops.BatchMatMul(transpose_b=True)(q, k).astype(ms.float32) + bias  # T5 divides by nothing
        out = ops.BatchMatMul()(ops.softmax(scores, axis=-1).astype(x.dtype), v)
        return self.o(out.transpose(0, 2, 1, 3).reshape(batch, tokens, -1))


class _FeedForwardLayer(nn.Cell):
    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.DenseReluDense = _GatedGelu(config["d_model"], config["d_ff"])
        self.layer_norm = _RootMeanSquareNorm(config["d_model"], config["layer_norm_epsilon"])

    def construct(self, x: Tensor, dtype: Any) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x).astype(dtype)).astype(ms.float32)


class _GatedGelu(nn.Cell):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = Linear(width, inner, bias=False), Linear(width, inner, bias=False)
        self.wo = Linear(inner, width, bias=False)

    def construct(self, x: Tensor) -> Tensor:
        gate, value = ops.gelu(self.wi_0(x), approximate="tanh"), self.wi_1(x)
        if x.dtype == ms.float16:
            gate, value = gate.astype(ms.float32), value.astype(ms.float32)
        return self.wo(gate * value)


class _RootMeanSquareNorm(nn.Cell):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = empty(size)
        self.eps = eps

    def construct(self, x: Tensor) -> Tensor:
        mean = x.square().mean(-1, keep_dims=True)
        return self.weight.astype(ms.float32) * (x * ops.rsqrt(mean + self.eps))
