"""Two ways of doing one thing, timed turn by turn in one process.

Absolute seconds on a shared machine mean nothing; the ratio of neighbouring runs does. A round runs baseline and
ours once each, in alternating order; the figure is the median of the rounds' ratios, beside their spread.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

SHARED = {
    "aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
}  # fmt: skip
"""What both sides call the same library for."""


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """How many times faster ours is than the baseline."""

    name: str
    median: float
    low: float
    high: float
    target: float | None
    """What the project promises; None reports only."""
    note: str = ""
    ceiling: float | None = None
    """The ratio if all of the baseline but its matrix products and its attention kernel took no time."""

    @property
    def met(self) -> bool:
        """Whether the median reaches the target."""
        return self.target is None or self.median >= self.target

    @property
    def row(self) -> str:
        """One line of the table in README.md."""
        target = "" if self.target is None else f">= {self.target:g}"
        ceiling = "" if self.ceiling is None else f"{self.ceiling:.2f}"
        spread = f"{self.low:.2f} – {self.high:.2f}"
        return f"| `{self.name}` | {self.median:.2f} | {spread} | {ceiling} | {target} | {self.note} |"


def interleave(
    name: str,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    *,
    target: float | None = None,
    num_rounds: int = 7,
    num_threads: int = 2,
    note: str = "",
    with_ceiling: bool = False,
) -> Ratio:
    """Return the ratio of the two, after one unmeasured run of each; torch computes with `num_threads`."""
    torch.set_num_threads(num_threads)
    baseline()
    ours()
    ceiling = ceiling_of(baseline) if with_ceiling else None
    ratios = []
    for index in range(num_rounds):
        order = (baseline, ours) if index % 2 == 0 else (ours, baseline)
        seconds = {function: _seconds(function) for function in order}
        ratios.append(seconds[baseline] / seconds[ours])
    return Ratio(
        name=name,
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        target=target,
        note=note,
        ceiling=ceiling,
    )


def ceiling_of(function: Callable[[], object]) -> float:
    """Return the time of `function` over that which it spends in `SHARED` operations."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    events = profile.key_averages()
    shared = sum(event.self_cpu_time_total for event in events if event.key in SHARED)
    return sum(event.self_cpu_time_total for event in events) / shared


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
