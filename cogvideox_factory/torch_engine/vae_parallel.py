"""The VAE over several processes that hold the same video: each codes a part, all end with the whole, bit for bit.

| | who codes what | against one process |
|---|---|---|
| tiles | tile after tile to process after process | the same bits, as its tiles are the same work |
| clips | equal shares of a batch, where processes divide it | as its clips by themselves, up to rounding |
| rows | everything else: the rows of every picture, cut into contiguous parts of whole latents | equal up to rounding |

Time is not divided: every convolution waits for the frames before it. Rows are: before a 3x3 window slides over them,
neighbours give each other the row at their common edge, and group norm averages over what all have found. That is one
exchange of edges a convolution and one gather of a few numbers a norm, for each frame batch.

Legend: B batch, T frames of a chunk, H W height and width, C channels, P processes of the group.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor

Moments = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The rows of every picture that this process codes, counted in latents."""

    group: dist.ProcessGroup
    rank: int
    starts: tuple[int, ...]
    """The first row of each process, and behind them the number of rows: P + 1 numbers."""

    @classmethod
    def divide(cls, height: int, group: dist.ProcessGroup) -> "Rows":
        """Cut `height` latent rows, at least P, into parts that differ by one row at most."""
        size = group.size()
        assert height >= size
        return cls(group=group, rank=group.rank(), starts=tuple(height * n // size for n in range(size + 1)))

    def cut(self, video: Tensor, scale: int) -> Tensor:
        """Return this process' rows of `video` [B, C, F, H, W], of which a latent covers `scale`."""
        start, stop = self.starts[self.rank : self.rank + 2]
        return video[:, :, :, start * scale : stop * scale]

    def join(self, coded: Tensor, out: Tensor) -> None:
        """Fill `out` [B, C, F, H, W] with the rows `coded` by each process."""
        scale = out.shape[3] // self.starts[-1]
        heights = [(stop - start) * scale for start, stop in zip(self.starts, self.starts[1:])]
        equal = coded.new_zeros((*coded.shape[:3], max(heights), coded.shape[4]))
        equal[:, :, :, : coded.shape[3]] = coded
        for start, height, part in zip(self.starts, heights, _gather(equal, self.group)):
            out.narrow(3, start * scale, height).copy_(part[:, :, :, :height])

    def fill_edges(self, x: Tensor, *, above: bool = True) -> None:
        """Write the neighbours' nearest rows into the last and, if `above`, the first row of `x` [B, T, H, W, C].

        At the ends of the picture they are zeros.
        """
        sides = (
            (self.rank - 1, x[:, :, int(above)], x[:, :, 0] if above else None),
            (self.rank + 1, x[:, :, -2] if above else None, x[:, :, -1]),
        )  # (neighbour, the row it is given, the row it fills)
        operations, arriving = [], []
        for neighbour, given, edge in sides:
            if not 0 <= neighbour < self.group.size():
                if edge is not None:
                    edge.zero_()
                continue
            there = dist.get_global_rank(self.group, neighbour)
            if given is not None:
                operations.append(dist.P2POp(dist.isend, given.contiguous(), there, self.group))
            if edge is not None:
                came = edge.new_empty(edge.shape)
                operations.append(dist.P2POp(dist.irecv, came, there, self.group))
                arriving.append((edge, came))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        for edge, came in arriving:
            edge.copy_(came)

    def gather_moments(self, found: Sequence[Moments], shares: Sequence[float]) -> tuple[list[Moments], list[float]]:
        """Return the moments of every process' parts, in one order everywhere, and the share of each in the whole.

        Args:
            found: mean and variance [B, C] of each part of this process' rows.
            shares: of each part in them, the same in every process.
        """
        packed = torch.stack([torch.stack(part) for part in found])  # [parts, 2, B, C]
        gathered = torch.cat(_gather(packed, self.group))  # [P * parts, 2, B, C]
        sizes = [(stop - start) / self.starts[-1] for start, stop in zip(self.starts, self.starts[1:])]
        return [(mean, var) for mean, var in gathered], [size * share for size in sizes for share in shares]


def share_out(
    code: Callable[[Tensor], Tensor],
    parts: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
    group: dist.ProcessGroup,
    *,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    """Yield `code(part)` of every part in order; in a round, each process codes one and all get what came out.

    `shapes` and `dtype` are those of the results; no more than a round of them is held.
    """
    rank, size = group.rank(), group.size()
    for start in range(0, len(parts), size):
        counts = [prod(shape) for shape in shapes[start : start + size]]
        flat = parts[start].new_zeros(max(counts), dtype=dtype)  # those of a round may differ, messages may not
        if rank < len(counts):
            flat[: counts[rank]] = code(parts[start + rank]).flatten()
        for coded, count, shape in zip(_gather(flat, group), counts, shapes[start:]):
            yield coded[:count].view(*shape)


def _gather(x: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """Return the `x` of every process, all of one shape."""
    gathered = [torch.empty_like(x) for _ in range(group.size())]
    dist.all_gather(gathered, x, group=group)
    return gathered
