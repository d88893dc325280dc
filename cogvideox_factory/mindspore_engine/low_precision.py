"""Weights and moments in bfloat16, rounded up or down with the probability of the remainder.

bfloat16 keeps 8 bits, so rounding to nearest loses every update below 1/256 of a weight; rounding so keeps them on
average (Gupta et al. 2015, arXiv 1502.02551).

Legend: R rows of a weight (its first axis), C columns (all others together).
"""

from collections.abc import Sequence
from math import prod

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, ops

from cogvideox_factory.draws import generator
from cogvideox_factory.mindspore_engine.border import to_tensor

PARTS = 3
"""What is rounded of each weight: itself and its two moments."""
_BESIDE = 2.0**-8 + 2.0**-10
"""By so much of itself a bfloat16 number must change for the nearest other one to be its neighbour, whatever it is."""


class RoundingDraws:
    """16 random bits for every number of a step.

    What a number gets is the exclusive or of three draws: of its row, of its column, and of its weight and part. Any
    two numbers of a step are then independent, and few draws are made: one a row and one a column, of the largest
    weight. They come from the ground, so a run that is resumed rounds as one that was not.
    """

    def __init__(self, shapes: Sequence[Sequence[int]], *, seed: int) -> None:
        self._seed = seed
        self._sizes = (
            max(shape[0] for shape in shapes), max(prod(shape[1:]) for shape in shapes), PARTS * len(shapes)
        )  # fmt: skip

    def of(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the draws of rows [R], of columns [C] and of weights and parts, for update number `step`."""
        rng = generator(self._seed, "rounding", step)
        rows, columns, keys = (to_tensor(rng.integers(2**16, size=size, dtype=np.int32)) for size in self._sizes)
        return rows, columns, keys


def uniform(rows: Tensor, columns: Tensor, key: Tensor, shape: Sequence[int]) -> Tensor:
    """Return the draws of one part of a weight: float32 of `shape` in [0, 1), in steps of 2^-16.

    `key` is the one number of this weight and part.
    """
    num_columns = prod(shape[1:])
    bits = ops.bitwise_xor(ops.bitwise_xor(rows[: shape[0], None], columns[None, :num_columns]), key)
    return (bits.astype(ms.float32) * 2.0**-16).reshape(shape)


def round_stochastically(value: Tensor, draws: Tensor) -> Tensor:
    """Round float32 to a number bfloat16 has, still in float32, so that the mean over `draws` in [0, 1) is kept.

    Plain arithmetic, for want of an operator that sees the bits: the nearest number, or the one beyond `value`.
    """
    nearest = value.astype(ms.bfloat16).astype(ms.float32)
    grows = mint.where(ops.abs(value) > ops.abs(nearest), 1.0 + _BESIDE, 1.0 - _BESIDE)
    beyond = (nearest * grows).astype(ms.bfloat16).astype(ms.float32)
    return mint.where(draws * ops.abs(beyond - nearest) < ops.abs(value - nearest), beyond, nearest)
