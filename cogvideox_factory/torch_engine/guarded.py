"""What our own optimizers share: a step that changes nothing when it must not, and no waiting to find out."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Total = Callable[[Tensor], Tensor]
"""Sums a tensor over the processes that divide the weights."""


class Guarded(torch.optim.Optimizer):
    """An optimizer whose step `found_inf` (a device scalar of 1) undoes, and whose state is made at once."""

    WHOLE: frozenset[str] = frozenset()
    """State of a weight that every process holds whole; the rest lies beside the weight's rows."""

    def __init__(self, weights: Sequence[Tensor], group: dict[str, Any]) -> None:
        super().__init__(list(weights), group)
        self.found_inf: Tensor | None = None
        self.common: dict[str, Tensor] = {}
        """State that is of no single weight: device scalars, the same in all processes."""

    @property
    def _weights(self) -> list[Tensor]:
        return [p for p in self.param_groups[0]["params"] if p.grad is not None]

    def _keep(self, target: Tensor, value: Tensor) -> None:
        """Put `value` into `target`, unless this step is to change nothing."""
        target.copy_(value if self.found_inf is None else torch.where(self.found_inf.bool(), target, value))

    def _count(self) -> Tensor:
        """Return the number of this step, from 1, not counting steps that changed nothing."""
        return self.common["steps"] + 1
