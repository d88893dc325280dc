"""What happened since the last line of the log: the loss of every sample and the gradient norms.

They stay on the device until a line is due, and then come in one transfer. Which clips, shape and timesteps a step had
is not kept at all: it follows from the seed and the step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cogvideox_factory.data.loader import Draws
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.step_records import Sample, Step
from cogvideox_factory.torch_engine.ranks import Ranks


class Ledger:
    """Collects steps between two lines.

    Args:
        sampler: which clips a step has.
        draws: which timesteps they get.
        num_micros: accumulation steps.
        ranks: the processes, each of which notes its own share.
    """

    def __init__(self, sampler: Sampler, draws: Draws, *, num_micros: int, ranks: Ranks) -> None:
        self.sampler, self.draws, self.num_micros, self.ranks = sampler, draws, num_micros, ranks
        self._pending: list[tuple[int, list[Tensor], Tensor, Tensor]] = []

    def note(self, step: int, losses: list[Tensor], norm: Tensor, limit: Tensor) -> None:
        """Keep what this process computed in `step`: losses [B] of each accumulation step, norm and its limit."""
        self._pending.append((step, losses, norm, limit))

    def fetch(self, *more: Tensor) -> tuple[list[Step], list[float]]:
        """Return the steps noted since the last call, and `more` device scalars; all processes call this alike."""
        rows = [self._place(torch.stack(losses)) for _, losses, _, _ in self._pending]
        scalars = torch.stack([x for _, _, norm, limit in self._pending for x in (norm, limit)] + list(more)).float()
        values = self.ranks.mean(torch.cat([*rows, scalars])).tolist()
        steps, start, behind = [], 0, sum(map(len, rows))
        for index, ((number, _, _, _), row) in enumerate(zip(self._pending, rows, strict=True)):
            losses = [value * self.ranks.layout.num_data_ranks for value in values[start : start + len(row)]]
            norm, limit = values[behind + 2 * index : behind + 2 * index + 2]
            steps.append(self._step(number, losses, norm, limit))
            start += len(row)
        self._pending.clear()
        return steps, values[len(values) - len(more) :]

    def _place(self, losses: Tensor) -> Tensor:
        """Put this process' `losses` [M, B] where they are in the global batch, [M * ranks * B], zeros around them."""
        num_micros, size = losses.shape
        row = losses.new_zeros(num_micros, self.ranks.layout.num_data_ranks, size)
        row[:, self.ranks.data_rank] = losses
        return row.flatten()

    def _step(self, number: int, losses: Sequence[float], norm: float, limit: float) -> Step:
        picks = self.sampler.batch(number - 1)
        samples = [
            Sample(clip_id=pick.clip_id, timestep=self.draws.timestep(pick), loss=loss)
            for pick, loss in zip(picks, losses, strict=True)
        ]
        return Step(
            number=number, bucket=self.sampler.bucket(number - 1), samples=samples, norm=norm, limit=limit
        )  # fmt: skip
