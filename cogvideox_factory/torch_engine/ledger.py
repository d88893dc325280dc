"""What happened since the last line of the log: the loss of every sample and the gradient norms.

They stay on the device until a line is due, and then come in one transfer. Which clips, shape and timesteps a step had
is not kept at all: it follows from the seed and the step.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory.data.loader import NUM_TRAIN_TIMESTEPS, Draws
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.torch_engine.ranks import Ranks

NUM_BINS = 4
"""Equal parts of the schedule; validation has a timestep in each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """One clip in one step."""

    clip_id: str
    timestep: int
    loss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One step over all processes."""

    number: int
    bucket: str
    samples: list[Sample]
    norm: float
    """Of the gradient, before clipping."""
    limit: float
    """Above which a norm is a spike; infinite where none is looked for."""

    @property
    def loss(self) -> float:
        """Mean over the samples."""
        return sum(sample.loss for sample in self.samples) / len(self.samples)


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What a sample of each shape costs, and what a card could do."""

    tokens: Mapping[str, int]
    flops: Mapping[str, int]
    """Model FLOPs of a forward and backward pass (`plan.flops`)."""
    num_cards: int
    peak_tflops: float | None
    """Of one card; None where it is not known, and then there is no MFU."""

    def rates(self, steps: Sequence[Step], seconds: float) -> dict[str, float]:
        """Return tokens a second over all cards, model TFLOP/s of each, and that as a share of its peak."""

        def rate(cost: Mapping[str, int]) -> float:
            return sum(cost[step.bucket] * len(step.samples) for step in steps) / (len(steps) * seconds)

        tflops = rate(self.flops) / self.num_cards / 1e12
        values = {"tokens_per_second": rate(self.tokens), "tflops_per_card": tflops}
        return values | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})


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


def averages(steps: Sequence[Step], *, by_bucket: bool) -> dict[str, float]:
    """Return the mean loss and norm of `steps`, and the mean loss of each part of the schedule (and, with `by_bucket`,
    each shape) that occurred. What is not finite is left out."""
    values = {
        "loss": _mean(step.loss for step in steps),
        "grad_norm": _mean(step.norm for step in steps),
    }
    samples = [sample for step in steps for sample in step.samples]
    width = NUM_TRAIN_TIMESTEPS // NUM_BINS
    groups: dict[str, list[float]] = {
        f"loss/t{start}-{start + width}": [s.loss for s in samples if start <= s.timestep < start + width]
        for start in range(0, NUM_TRAIN_TIMESTEPS, width)
    }
    if by_bucket:
        for step in steps:
            groups.setdefault(f"loss/bucket/{step.bucket}", []).append(step.loss)
    return values | {name: _mean(losses) for name, losses in groups.items() if losses}


def sample_rows(steps: Sequence[Step], count: int) -> list[dict[str, Any]]:
    """Return a row for each of the last `count` samples of `steps`."""
    rows = [
        {"step": step.number, "clip": s.clip_id, "bucket": step.bucket, "timestep": s.timestep, "loss": s.loss}
        for step in steps
        for s in step.samples
    ]
    return rows[max(0, len(rows) - count) :]


def _mean(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan
