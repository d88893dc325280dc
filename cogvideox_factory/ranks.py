"""How the processes of a run divide its work, in numbers; the engines make groups of them (`ranks` of each).

`size = data ranks * guidance ranks * sequence ranks`; neighbours share a sequence. Data ranks take different clips, or
prompts to make videos of; the ranks of a sequence take the same clips and different tokens (`sequence_parallel`). Two
neighbouring sequences may share a video that is made: one predicts with its prompt, the other with the negative one.
Weights lie on a grid of their own over all ranks, (replicas, shards).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cogvideox_factory.errors import FactoryError

ZERO_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """How `size` processes divide the work; numbers only, checked when made.

    Raises:
        FactoryError: numbers that do not go together, with those that would.
    """

    size: int = 1
    sequence: int = 1
    """Ranks that divide each token stream."""
    ring: int | None = None
    """Of those, the ranks along which keys and values travel; None: as few as the heads ask for."""
    guidance: int = 1
    """2: the two predictions of classifier-free guidance are made by different ranks; generation only."""
    zero: int = 0
    replicas: int = 1
    """Whole copies of the model (hybrid sharding); with `zero` 0 every rank has one."""

    def __post_init__(self) -> None:
        if self.zero not in ZERO_STAGES:
            raise FactoryError(f"parallel.zero={self.zero}: there are stages 0, 1, 2 and 3.")
        if self.guidance not in (1, 2) or self.size % self.guidance:
            raise FactoryError(
                f"parallel.guidance={self.guidance} with {self.size} processes: guidance has two predictions, which an "
                "even number of processes divides (2) or each makes both of (1)."
            )
        halves = self.size // self.guidance
        if self.sequence < 1 or halves % self.sequence:
            fitting = [n for n in range(1, halves + 1) if halves % n == 0]
            also = f" x parallel.guidance={self.guidance}" if self.guidance > 1 else ""
            more = ", or start more processes (cogvideox launch)" if self.sequence > halves else ""
            raise FactoryError(
                f"parallel.sequence={self.sequence}{also} does not divide the {self.size} process(es). "
                f"Use one of {fitting}{more}."
            )
        if self.replicas < 1 or self.size % self.replicas or (self.zero == 0 and self.replicas not in (1, self.size)):
            raise FactoryError(
                f"parallel.replicas={self.replicas} with {self.size} processes and parallel.zero={self.zero}: copies "
                "must divide the processes equally (and with zero 0 every process has its own)."
            )

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of them, that take clips or prompts of their own."""
        return self.size // self.num_video_ranks

    @property
    def num_video_ranks(self) -> int:
        """Ranks that have the same clips, or make a video together."""
        return self.guidance * self.sequence

    @property
    def divides_forward(self) -> bool:
        """Whether a process needs others for a forward pass."""
        return self.sequence > 1 or (self.zero > 0 and self.grid[1] > 1)

    @property
    def grid(self) -> tuple[int, int]:
        """(replicas, shards of each)."""
        return (self.size, 1) if self.zero == 0 else (self.replicas, self.size // self.replicas)


class AgreedError(FactoryError):
    """What failed in one process and was told to all, which are at the same point."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Place:
    """One process among those of its run; each engine adds how it talks to the others."""

    layout: Layout
    rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the process that speaks and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Which share of a batch this process takes, of `layout.num_data_ranks`."""
        return self.rank // self.layout.num_video_ranks

    @property
    def leads_video(self) -> bool:
        """Whether this is the one process that writes what it makes with others of its video."""
        return self.rank % self.layout.num_video_ranks == 0


def require_same(facts: Sequence[Mapping[str, Any]], *, leads: bool) -> None:
    """Compare what all processes said, in their order; `leads` says whether this is the one that tells the user.

    Raises:
        FactoryError: naming the first that differs from the leading one, and in what.
    """
    lead, *others = facts
    for rank, own in enumerate(others, start=1):
        if own != lead:
            names = [name for name in dict.fromkeys([*lead, *own]) if lead.get(name) != own.get(name)]
            told = "; ".join(f"{name} is {own.get(name)!r} there and {lead.get(name)!r} here" for name in names[:5])
            error = FactoryError(
                f"process {rank} is not of the same run as process 0: {told}. Start all with the same recipe and "
                "flags, on the same version, model and data."
            )
            error.echoed = not leads
            raise error
