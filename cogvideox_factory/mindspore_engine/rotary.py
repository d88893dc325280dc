"""Rotary positions (Su et al., RoFormer, arXiv 2104.09864).

Legend: B batch, S joint tokens, L heads, K head size.
"""

import mindspore as ms
from mindspore import Tensor, ops


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn channels 2i and 2i + 1 of `x` [B, S, L, K] by the angle of column i of its row: equation 34, in float32.

    `cos` and `sin` are [S, 1, K / 2].
    """
    pairs = x.astype(ms.float32).reshape(*x.shape[:-1], -1, 2)  # [B, S, L, K / 2, 2]
    a, b = pairs[..., 0], pairs[..., 1]
    turned = ops.stack((a * cos - b * sin, a * sin + b * cos), axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
