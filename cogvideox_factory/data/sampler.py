"""Which clips make up step N: a pure function of the seed and the step.

Every epoch is a fresh shuffle of all clips; epochs follow one another in one endless stream, and step N takes
the N-th piece of `batch_size` from it. So within an epoch no clip is left out or seen twice, nothing is ever
dropped (a batch may hold the end of one epoch and the start of the next, and a set smaller than a batch
works), the order does not depend on the number of ranks or workers, and resuming means "start at step N".
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from cogvideox_factory.draws import generator
from cogvideox_factory.errors import DataError, FactoryError


class Pick(NamedTuple):
    """One place in a batch. (clip, epoch) happens once in a run, so it keys the place's random numbers."""

    clip_id: str
    epoch: int


class Sampler:
    """Draws global batches of clips.

    Args:
        clip_ids: the clips; their order does not matter.
        batch_size: clips a step over all ranks and accumulation steps together.
        seed: of the shuffles.
        buckets: shape key of each clip. A batch needs one shape, and so far a run does.

    Raises:
        DataError: no clips, or clips of several shapes.
    """

    def __init__(
        self, clip_ids: Iterable[str], *, batch_size: int, seed: int, buckets: Mapping[str, str] | None = None
    ) -> None:
        self.clip_ids: list[str] = sorted(clip_ids)
        if not self.clip_ids:
            raise DataError("there is no clip to train on; see the report of the data set for what became of each.")
        assert len(set(self.clip_ids)) == len(self.clip_ids), "clip ids must differ"
        if batch_size < 1:
            raise FactoryError(f"batch_size={batch_size}: a step needs at least one clip.")
        shapes = sorted({buckets[clip_id] for clip_id in self.clip_ids}) if buckets else []
        if len(shapes) > 1:
            raise DataError(f"the clips have {len(shapes)} shapes ({', '.join(shapes[:5])}); prepare them at one size.")
        self.batch_size = batch_size
        self.seed = seed
        self._orders: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self.clip_ids)

    def order(self, epoch: int) -> list[str]:
        """Return all clips in the order of `epoch`."""
        return [self.clip_ids[place] for place in self._permutation(epoch)]

    def _permutation(self, epoch: int) -> np.ndarray:
        orders = self._orders
        if epoch not in orders:
            order = generator(self.seed, "epoch order", epoch).permutation(len(self.clip_ids))
            # Replaced, never changed, so that threads may read while another adds.
            self._orders = orders = {**{e: o for e, o in orders.items() if abs(e - epoch) < 2}, epoch: order}
        return orders[epoch]

    def batch(self, step: int) -> list[Pick]:
        """Return the global batch of `step` (counted from 0)."""
        picks = []
        for position in range(step * self.batch_size, (step + 1) * self.batch_size):
            epoch, place = divmod(position, len(self.clip_ids))
            picks.append(Pick(self.clip_ids[self._permutation(epoch)[place]], epoch))
        return picks

    def share(self, step: int, *, rank: int = 0, num_ranks: int = 1, micro: int = 0, num_micros: int = 1) -> list[Pick]:
        """Return the part of the global batch that data-parallel `rank` computes in accumulation step
        `micro`.

        Raises:
            FactoryError: the batch does not divide evenly, which would weight clips unequally.
        """
        assert 0 <= rank < num_ranks, (rank, num_ranks)
        assert 0 <= micro < num_micros, (micro, num_micros)
        parts = num_ranks * num_micros
        if self.batch_size % parts:
            below, above = self.batch_size // parts * parts, -(-self.batch_size // parts) * parts
            choices = f"{below} or {above}" if below else f"{above}"
            raise FactoryError(
                f"a global batch of {self.batch_size} does not divide over {num_ranks} ranks x {num_micros} "
                f"accumulation steps. Use a batch of {choices}."
            )
        size = self.batch_size // parts
        start = (micro * num_ranks + rank) * size
        return self.batch(step)[start : start + size]

    def epochs(self, step: int) -> float:
        """Return how many times the data has been seen when `step` steps are done."""
        return step * self.batch_size / len(self.clip_ids)


def hold_out(clip_ids: Iterable[str], count: int) -> tuple[list[str], list[str]]:
    """Split clips into (train, held out), choosing by hash so that adding clips moves few of the others.

    Raises:
        DataError: nothing would be left to train on.
    """
    ranked = sorted(clip_ids, key=lambda clip_id: hashlib.sha256(f"hold out {clip_id}".encode()).digest())
    if count >= len(ranked):
        raise DataError(f"{count} clips to hold out of {len(ranked)} leave none to train on. Hold out fewer.")
    return sorted(ranked[count:]), sorted(ranked[:count])
