"""What a run knows of its steps: the loss of every sample and the norm; means for a line of the log, and bad steps."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvideox_factory.data.loader import NUM_TRAIN_TIMESTEPS

NUM_BINS = 4
"""Equal parts of the schedule; validation has a timestep in each."""

# One draw in each quarter of the schedule; the mean over them stands for the whole range.
TIMESTEPS = (125, 375, 625, 875)
IN_A_ROW = 3
OF_LATE, LATELY = 10, 1000
"""So many bad steps within so many end a run that skips them."""


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


@dataclass(frozen=True, kw_only=True, slots=True)
class BadStep:
    """A step that updated nothing, why, and the samples that are to blame or may be."""

    step: Step
    reason: str
    suspects: list[Sample]


def bad_among(steps: Sequence[Step], *, loss_scale: float | None) -> list[BadStep]:
    """Return the bad ones. With a `loss_scale` (float16) an overflow only halves it, until it is below 1."""
    found = []
    for step in steps:
        lost = [sample for sample in step.samples if not math.isfinite(sample.loss)]
        if lost:
            found.append(BadStep(step=step, reason="loss.nonfinite", suspects=lost))
        elif not math.isfinite(step.norm):
            if loss_scale is None or loss_scale < 1:
                found.append(BadStep(step=step, reason="gradient.nonfinite", suspects=step.samples))
        elif step.norm > step.limit:
            found.append(BadStep(step=step, reason="gradient.spike", suspects=step.samples))
    return found


def too_many(numbers: Sequence[int]) -> str | None:
    """Return why a run that skips these bad steps (in order) must end, or None."""
    for last in range(IN_A_ROW - 1, len(numbers)):
        if numbers[last] - numbers[last - IN_A_ROW + 1] == IN_A_ROW - 1:
            return f"{IN_A_ROW} in a row"
    recent = [number for number in numbers if number > numbers[-1] - LATELY]
    return f"{len(recent)} within {LATELY} steps" if len(recent) >= OF_LATE else None
