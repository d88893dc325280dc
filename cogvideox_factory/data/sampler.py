"""Which clips make up step N: a pure function of the seed and the step.

Every epoch is a fresh shuffle of all clips; epochs follow one another in one endless stream. Walk along it and put
each clip into the line of its shape: whenever a line is as long as a batch of that shape, it leaves as the next step.
So all clips of a step have one shape, every clip is seen once an epoch, nothing is ever dropped (what is left in a line
at the end of an epoch waits for clips of the next), the order does not depend on the number of ranks or workers, and
resuming means "start at step N". With one shape this is simply the stream cut into pieces.

The walk is never made: the k-th batch of a shape is clips k n to (k + 1) n of that shape's own stream, and it leaves
when its last clip comes by.
"""

import hashlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from cogvideox_factory.data.manifest import without_window
from cogvideox_factory.draws import generator
from cogvideox_factory.errors import DataError, FactoryError


class Pick(NamedTuple):
    """One place in a batch. (clip, epoch) happens once in a run, so it keys the place's random numbers."""

    clip_id: str
    epoch: int


class _Epoch(NamedTuple):
    """One epoch's part of the stream."""

    orders: dict[str, list[str]]
    """Clips of each shape in the order they come by."""
    leaving: list[tuple[str, int]]
    """(shape, number of the batch in that shape's stream) of each batch that leaves in this epoch, in turn."""


class Sampler:
    """Draws global batches of clips.

    Args:
        clip_ids: the clips; their order does not matter.
        batch_size: clips a step over all ranks and accumulation steps together; of each shape, if a mapping.
        seed: of the shuffles.
        buckets: shape key of each clip; without it all have one.

    Raises:
        DataError: no clips.
        FactoryError: a batch size below 1.
    """

    def __init__(
        self,
        clip_ids: Iterable[str],
        *,
        batch_size: int | Mapping[str, int],
        seed: int,
        buckets: Mapping[str, str] | None = None,
    ) -> None:
        self.clip_ids: list[str] = sorted(clip_ids)
        if not self.clip_ids:
            raise DataError("there is no clip to train on; see the report of the data set for what became of each.")
        assert len(set(self.clip_ids)) == len(self.clip_ids), "clip ids must differ"
        self._buckets = {clip_id: buckets[clip_id] if buckets else "" for clip_id in self.clip_ids}
        self.counts: dict[str, int] = {}
        """Clips of each shape."""
        for key in self._buckets.values():
            self.counts[key] = self.counts.get(key, 0) + 1
        self.counts = dict(sorted(self.counts.items()))
        self.batch_sizes = {key: batch_size if isinstance(batch_size, int) else batch_size[key] for key in self.counts}
        """Clips a step of each shape."""
        for size in self.batch_sizes.values():
            if size < 1:
                raise FactoryError(f"batch_size={size}: a step needs at least one clip.")
        self.seed = seed
        self._epochs: dict[int, _Epoch] = {}

    def __len__(self) -> int:
        return len(self.clip_ids)

    def order(self, epoch: int) -> list[str]:
        """Return all clips in the order of `epoch`."""
        order = generator(self.seed, "epoch order", epoch).permutation(len(self.clip_ids))
        return [self.clip_ids[place] for place in order]

    def batch(self, step: int) -> list[Pick]:
        """Return the global batch of `step` (counted from 0)."""
        key, number = self._leaving(step)
        size, count = self.batch_sizes[key], self.counts[key]
        picks = []
        for position in range(number * size, (number + 1) * size):
            epoch, place = divmod(position, count)
            picks.append(Pick(self._epoch(epoch).orders[key][place], epoch))
        return picks

    def steps_before(self, epoch: int) -> int:
        """Return how many steps have left when `epoch` begins."""
        return sum(epoch * self.counts[key] // size for key, size in self.batch_sizes.items())

    def bucket(self, step: int) -> str:
        """Return the shape of `step`."""
        return self._leaving(step)[0]

    def epochs(self, step: int) -> float:
        """Return how many times the data has been seen when `step` steps are done."""
        epoch = self._epoch_of(step)
        seen = sum(epoch * self.counts[key] // size * size for key, size in self.batch_sizes.items())
        left = self._epoch(epoch).leaving[: step - self.steps_before(epoch)]
        return (seen + sum(self.batch_sizes[key] for key, _ in left)) / len(self)

    def _leaving(self, step: int) -> tuple[str, int]:
        epoch = self._epoch_of(step)
        return self._epoch(epoch).leaving[step - self.steps_before(epoch)]

    def _epoch_of(self, step: int) -> int:
        """Return the epoch in which the batch of `step` leaves: the last that begins with no more steps behind it."""
        low, high = 0, 1
        while self.steps_before(high) <= step:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.steps_before(middle) <= step else (low, middle)
        return low

    def _epoch(self, epoch: int) -> _Epoch:
        epochs = self._epochs
        if epoch not in epochs:
            # Replaced, never changed, so that threads may read while another adds.
            reach = 2 + max(size // self.counts[key] for key, size in self.batch_sizes.items())
            kept = {e: o for e, o in epochs.items() if abs(e - epoch) < reach}
            self._epochs = epochs = {**kept, epoch: self._make_epoch(epoch)}
        return epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        orders: dict[str, list[str]] = {key: [] for key in self.counts}
        leaving = []
        for clip_id in self.order(epoch):
            key = self._buckets[clip_id]
            orders[key].append(clip_id)
            come = epoch * self.counts[key] + len(orders[key])
            if come % self.batch_sizes[key] == 0:
                leaving.append((key, come // self.batch_sizes[key] - 1))
        return _Epoch(orders=orders, leaving=leaving)

    def share(self, step: int, *, rank: int = 0, num_ranks: int = 1, micro: int = 0, num_micros: int = 1) -> list[Pick]:
        """Return the part of the global batch that data-parallel `rank` computes in accumulation step
        `micro`.

        Raises:
            FactoryError: the batch does not divide evenly, which would weight clips unequally.
        """
        assert 0 <= rank < num_ranks, (rank, num_ranks)
        assert 0 <= micro < num_micros, (micro, num_micros)
        self.require_even(num_ranks * num_micros, f"{num_ranks} ranks x {num_micros} accumulation steps")
        picks = self.batch(step)
        size = len(picks) // (num_ranks * num_micros)
        start = (micro * num_ranks + rank) * size
        return picks[start : start + size]

    def require_even(self, parts: int, among: str) -> None:
        """Refuse batches that `parts` cannot share equally.

        Raises:
            FactoryError: naming the nearest sizes that work.
        """
        for key, size in self.batch_sizes.items():
            if size % parts:
                below, above = size // parts * parts, -(-size // parts) * parts
                choices = f"{below} or {above}" if below else f"{above}"
                where = f" of {key}" if key and len(self.counts) > 1 else ""
                raise FactoryError(
                    f"a global batch of {size}{where} does not divide over {among}. Use a batch of {choices}."
                )


def hold_out(clip_ids: Iterable[str], count: int) -> tuple[list[str], list[str]]:
    """Split clips into (train, held out), choosing by hash so that adding clips moves few of the others.

    The other windows of a video that is held out are in neither: they would give away what is held out.

    Raises:
        DataError: nothing would be left to train on.
    """

    def rank(clip_id: str) -> tuple[bytes, str]:
        return hashlib.sha256(f"hold out {without_window(clip_id)}".encode()).digest(), clip_id

    ranked = sorted(clip_ids, key=rank)
    videos = {without_window(clip_id) for clip_id in ranked[:count]}
    train = [clip_id for clip_id in ranked if without_window(clip_id) not in videos]
    if not train:
        raise DataError(f"{count} clips to hold out of {len(ranked)} leave none to train on. Hold out fewer.")
    return sorted(train), sorted(ranked[:count])
