"""What device functions are held to: the same written out in float64 with numpy, and how far a function is from it.

Each takes the function that it tries, so a test can try another one on a CPU.

Legend: B batch, L heads, S tokens, K head size, C input channels, O output channels, T frames, H W height and width.
"""

from collections.abc import Callable
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from cogvideox_factory import draws
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor


def apart(found: Tensor, expected: np.ndarray) -> float:
    """Return the largest difference in parts of the largest entry expected."""
    difference = np.abs(to_array(found.astype(ms.float32)).astype(np.float64) - expected).max()
    return float(difference / np.abs(expected).max())


def _drawn(name: str, shape: tuple[int, ...], dtype: Any) -> tuple[Tensor, np.ndarray]:
    """Return a tensor, and what it holds in float64."""
    tensor = to_tensor(draws.normal(0, "ascend", name, shape=shape), dtype)
    return tensor, to_array(tensor.astype(ms.float32)).astype(np.float64)


def product(dtype: Any, size: int = 256) -> float:
    """Return how far a matrix product is off."""
    (a, exact_a), (b, exact_b) = (_drawn(name, (size, size), dtype) for name in "ab")
    return apart(ms.mint.matmul(a, b), exact_a @ exact_b)


def attention(attend: Callable[..., Tensor], dtype: Any, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Return how far an attention over [B, L, S, K] is off, and its gradients."""
    (q, exact_q), (k, exact_k), (v, exact_v), (grad, exact_grad) = (_drawn(name, shape, dtype) for name in "qkvg")
    scale = shape[-1] ** -0.5

    def run(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out = attend(q, k, v, num_heads=shape[1], scale=scale)
        return (out.astype(ms.float32) * grad.astype(ms.float32)).sum(), out

    (_, out), grads = ms.value_and_grad(run, (0, 1, 2), None, has_aux=True)(q, k, v)
    scores = exact_q @ exact_k.swapaxes(-1, -2) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)  # [B, L, S, S]
    of_weights = exact_grad @ exact_v.swapaxes(-1, -2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) * scale
    expected = {
        "output": weights @ exact_v, "gradient of q": of_scores @ exact_k,
        "gradient of k": of_scores.swapaxes(-1, -2) @ exact_q, "gradient of v": weights.swapaxes(-1, -2) @ exact_grad,
    }  # fmt: skip
    return {name: apart(tensor, exact) for (name, exact), tensor in zip(expected.items(), (out, *grads), strict=True)}


def convolution(make: Callable[[int], Callable[..., Tensor]], dtype: Any, frames: int = 5) -> float:
    """Return how far a convolution of [B, C, 2 + T, H, W], padded in space and not in time, is off."""
    outside, inside = 16, 8
    x, exact = _drawn("video", (2, inside, 2 + frames, 12, 10), dtype)
    weight, exact_weight = _drawn("weight", (outside, inside, 3, 3, 3), dtype)
    padded, expected = np.pad(exact, ((0, 0), (0, 0), (0, 0), (1, 1), (1, 1))), 0
    for t, h, w in np.ndindex(3, 3, 3):
        part = padded[:, :, t : t + frames, h : h + 12, w : w + 10]
        expected = expected + np.einsum("oc,bcthw->bothw", exact_weight[..., t, h, w], part)
    return apart(make(outside)(x, weight), np.asarray(expected))
