"""What an optimizer and the weights it trains need in memory, in bytes, before any of it is there."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import ceil, prod

BLOCK, SMALLEST = 256, 4096
"""Of 8-bit moments: values that share a float32 scale, and the size below which a weight keeps float32 ones."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerMemory:
    """Bytes of all trained weights together, before they are divided among processes."""

    weights: int
    """The model's own."""
    gradients: int
    """As they are added up."""
    masters: int
    """float32 copies of weights; 0 where the weights are their own."""
    state: int
    """What the optimizer remembers."""
    host_gradients: int = 0
    """Copies of `gradients` in host memory, for an optimizer that works there."""


def optimizer_memory(
    optimizer: str, shapes: Iterable[tuple[int, ...]], *, half: bool, stochastic: bool = False, offload: bool = False
) -> OptimizerMemory:
    """Return what training weights of `shapes` takes.

    Args:
        optimizer: as `train.optimizer`.
        shapes: of the trained weights.
        half: they are in half precision.
        stochastic: and stay so (`train.master_weights=stochastic_bf16`).
        offload: masters and state are in host memory, where float32 weights have masters too, and gradients again.
    """
    shapes = list(shapes)
    total = sum(map(prod, shapes))
    return OptimizerMemory(
        weights=total * (2 if half or stochastic else 4),
        gradients=total * (2 if stochastic else 4),
        masters=total * 4 if (half and not stochastic) or offload else 0,
        state=sum(_state(optimizer, shape, value=2 if stochastic else 4) for shape in shapes),
        host_gradients=total * 4 if offload else 0,
    )


def _state(optimizer: str, shape: tuple[int, ...], *, value: int) -> int:
    """Return the bytes remembered of one weight, with moments of `value` bytes."""
    size, rows = prod(shape), shape[0]
    columns = size // max(rows, 1)
    if optimizer == "adamw8bit":
        small = len(shape) < 2 or size < SMALLEST
        return 8 * size if small else 2 * (size + 4 * rows * ceil(columns / BLOCK))
    if optimizer == "came":
        return 8 * size if len(shape) < 2 else 4 * (size + 2 * (rows + columns))
    return (4 if optimizer == "prodigy" else 2) * value * size
