"""Gradient norms far above what is usual, recognised on the device: nothing waits for the answer.

The usual is the median of the last steps' norms, which single spikes do not move. The window is part of a run's state,
so a resumed run skips exactly what the whole one would have skipped.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.torch_engine.ranks import Ranks

WINDOW = 64
LEAST = 16
"""Norms that must be known before one can be unusual."""


class Spikes:
    """Accepts finite norms up to `factor` times the running median; every finite one if `factor` is None."""

    def __init__(self, factor: float | None, *, device: torch.device, ranks: Ranks) -> None:
        self.factor = factor
        self.ranks = ranks
        self.limit = torch.full((), torch.inf, device=device)
        """Of the norm judged last."""
        self._norms = torch.full((WINDOW,), torch.nan, device=device)

    def accept(self, norm: Tensor) -> Tensor:
        """Return whether a step with this gradient norm (a device scalar) may update weights, and remember the norm."""
        if self.factor is None:
            return norm.isfinite()
        known = self._norms.isfinite().sum()
        ordered = self._norms.sort().values  # NaN, a place not filled or a step that was not finite, comes last
        median = ordered.gather(0, ((known - 1) // 2).clamp(min=0).reshape(1))[0]
        self.limit = torch.where(known >= LEAST, self.factor * median, torch.inf)
        accepted = norm.isfinite() & (norm <= self.limit)
        self._norms = torch.cat([self._norms[1:], torch.where(norm.isfinite(), norm, torch.nan).reshape(1)])
        if self.ranks.mesh is not None:  # copies of the model may differ in a norm's last bit
            agreed = accepted.int()
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN)
            accepted = agreed.bool()
        return accepted

    def state(self) -> list[float | None]:
        """Return the window, None where it is empty (this waits for the device)."""
        return [] if self.factor is None else [None if n != n else n for n in self._norms.tolist()]

    def restore(self, state: list[float | None]) -> None:
        """Set the window from `state`."""
        if state:
            values = [float("nan") if norm is None else norm for norm in state]
            self._norms.copy_(torch.tensor(values))
