"""Attention: the flash kernel on Ascend, plain matrix products elsewhere.

Legend: B batch, L heads, S query tokens, T key tokens, K head size.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine import device


class AttentionKernel(nn.Cell):
    """softmax(q k^T / sqrt(K)) v."""

    def __init__(self) -> None:
        super().__init__()
        self.has_flash = device.is_ascend()  # a graph cannot ask

    def construct(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return [B, L, S, K] of `q` [B, L, S, K] and `k`, `v` [B, L, T, K]."""
        scale = q.shape[-1] ** -0.5
        if self.has_flash and q.dtype != ms.float32:
            return device.flash_attention(q, k, v, num_heads=q.shape[1], scale=scale)
        scores = ops.BatchMatMul(transpose_b=True)(q, k).astype(ms.float32) * scale
        return ops.BatchMatMul()(ops.softmax(scores, axis=-1).astype(v.dtype), v)
