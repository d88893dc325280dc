"""Lossy shortcuts of the denoising loop: steps that take over what the blocks did to the stream in an earlier one.

Successive steps ask the transformer nearly the same, so what its blocks add to the stream changes little from one to
the next. Two ways to tell where little is little enough:

- the first-block cache runs the first block and looks how much what it adds has changed (after ParaAttention's);
- TeaCache adds up how much the time embedding changes (Liu et al. 2024, arXiv 2411.19108, section 3.3), which is known
  before the first step, so nothing waits for the device.

Both are off unless asked for: the video is another one than without.

Legend: B batch, S rows of the stream, N those that are left behind the last block, D width, T steps, E size of the time
embedding.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.errors import FactoryError

Through = Callable[[Tensor, int, int], Tensor]
"""Takes a stream [B, S, D] through the blocks from one number up to, but without, another."""


class Shortcut(Protocol):
    """What stands in for the walk through the blocks."""

    num_reused: int
    """Steps so far that left blocks out."""

    def __call__(self, x: Tensor, through: Through, num_blocks: int, num_tokens: int) -> Tensor:
        """Return the stream [B, N, D] behind the last block from `x` [B, S, D], its first `num_tokens` rows tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Reuse:
    """Which shortcut to take; every video begins with a fresh one.

    Raises:
        FactoryError: both at once.
    """

    first_block: float = 0.0
    """Relative change of what the first block adds, below which the others are left out; 0: never."""
    tea: float = 0.0
    """Summed relative change of the time embedding, below which all blocks are left out; 0: never."""
    tea_polynomial: Sequence[float] = ()
    """What is summed is this polynomial of the change, highest power first; the change itself if empty."""
    group: dist.ProcessGroup | None = None
    """Processes that must all decide alike, because they meet inside the blocks."""

    def __post_init__(self) -> None:
        if self.first_block and self.tea:
            raise FactoryError("first_block and tea are two ways to the same end; use one of them.")

    def begin(self, embeddings: Tensor, fresh: Sequence[bool]) -> Shortcut | None:
        """Return the shortcut of one video, from the time embeddings [T, E] of its steps; None if none is asked for.

        `fresh` names the steps that have nothing to take over: those that predict otherwise than the step before.
        """
        if self.first_block:
            return FirstBlockCache(self.first_block, fresh, self.group)
        if self.tea:
            return TeaCache(tea_plan(self._changes(embeddings), self.tea, fresh))
        return None

    def _changes(self, embeddings: Tensor) -> list[float]:
        """Return what each of T - 1 steps adds to the sum."""
        embeddings = embeddings.float()
        changes = embeddings.diff(dim=0).abs().mean(1) / embeddings[:-1].abs().mean(1)
        if self.group is not None:  # the same numbers everywhere, but for the last bits of cards that differ
            dist.broadcast(changes, group=self.group, group_src=0)  # on the card: its groups carry nothing else
        values = changes.cpu().double()
        if self.tea_polynomial:
            total = torch.zeros_like(values)
            for factor in self.tea_polynomial:
                total = total * values + factor
            values = total
        return values.tolist()


def tea_plan(changes: Sequence[float], threshold: float, fresh: Sequence[bool]) -> list[bool]:
    """Return for each of T steps whether its blocks are run; the first and the last always are.

    Args:
        changes: what each of the T - 1 steps from the second on adds to the sum.
        threshold: a step whose sum since the last that was run reaches it is run.
        fresh: steps that must be.
    """
    plan, total = [True], 0.0
    for step, change in enumerate(changes, 1):
        total += change
        run = not total < threshold or fresh[step] or step == len(changes)
        plan.append(run)
        total = 0.0 if run else total
    return plan


class TeaCache:
    """Leaves out all blocks at the steps that a plan says."""

    def __init__(self, plan: Sequence[bool]) -> None:
        self.num_reused = 0
        self._plan = iter(plan)
        self._added: Tensor | None = None

    def __call__(self, x: Tensor, through: Through, num_blocks: int, num_tokens: int) -> Tensor:
        """See `Shortcut`."""
        if next(self._plan) or self._added is None:
            out = through(x, 0, num_blocks)
            self._added = out - x[:, -out.shape[1] :]
            return out
        self.num_reused += 1
        return x[:, -self._added.shape[1] :] + self._added


class FirstBlockCache:
    """Leaves out all blocks but the first where what that one adds is nearly what it added before.

    Whether it is, the host must know: one number a step is waited for.
    """

    def __init__(self, threshold: float, fresh: Sequence[bool], group: dist.ProcessGroup | None) -> None:
        self.num_reused = 0
        self._threshold = threshold
        self._fresh = iter(fresh)
        self._group = group
        self._first: Tensor | None = None
        self._rest: Tensor | None = None

    def __call__(self, x: Tensor, through: Through, num_blocks: int, num_tokens: int) -> Tensor:
        """See `Shortcut`."""
        is_fresh = next(self._fresh)
        if num_blocks < 2:
            return through(x, 0, num_blocks)
        stream = through(x, 0, 1)
        first = (stream - x)[:, :num_tokens]
        if not is_fresh and self._rest is not None and self._is_near(first):
            self.num_reused += 1
            return stream[:, -self._rest.shape[1] :] + self._rest
        out = through(stream, 1, num_blocks)
        self._first, self._rest = first, out - stream[:, -out.shape[1] :]
        return out

    def _is_near(self, first: Tensor) -> bool:
        assert self._first is not None
        change, size = (x.abs().sum(dtype=torch.float32) for x in (first - self._first, self._first))
        sums = torch.stack([change, size])
        if self._group is not None:
            dist.all_reduce(sums, group=self._group)
        total_change, total_size = sums.tolist()
        return total_change < self._threshold * total_size
