"""Which clips make up step N: a pure function of the seed and the step.

Every epoch is a fresh shuffle of all clips; epochs follow one another in one endless stream. Walk along it and put
each clip into the line of its shape: whenever a line is as long as a batch of that shape, it leaves as the next step.
So all clips of a step have one shape, every clip is seen once an epoch, nothing is ever dropped (what is left in a line
at the end of an epoch waits for clips of the next: `waiting` counts it), the order does not depend on the number of
ranks or workers, and resuming means "start at step N". With one shape this is simply the stream cut into pieces.

Rank r of n takes the r-th n-th of every global batch, so all ranks have one shape and equally many clips in every
step; a global batch that n cannot share equally is refused.

The walk is never made: the k-th batch of a shape is clips k n to (k + 1) n of that shape's own stream, and it leaves
when its last clip comes by.

Several data sets are mixed by weights: a set of N clips with weight w has w N places in an epoch. Each set goes round
and round, every round all its clips once, and epoch e takes places floor(e w N) to floor((e + 1) w N) of its rounds.
So an epoch has w N places of the set to within one, after any number of epochs two clips of a set were seen equally
often to within one, and w = 1 is every clip once an epoch. Which clips a part of a round takes is a shuffle of its own,
keyed by set and round, so this too needs no walk.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from math import ceil, floor
from typing import NamedTuple

from cogvideox_factory.data.clip import without_window
from cogvideox_factory.draws import generator
from cogvideox_factory.errors import DataError, FactoryError

_KEPT_EPOCHS = 256


class Pick(NamedTuple):
    """One place in a batch. (clip, epoch) happens once in a run, so it keys the place's random numbers."""

    clip_id: str
    epoch: int
    """How often the clip was seen before: the epoch, but for sets with a weight other than 1."""


class _Epoch(NamedTuple):
    """One epoch's part of the stream."""

    orders: dict[str, list[Pick]]
    """Clips of each shape in the order they come by."""
    leaving: list[tuple[str, int]]
    """(shape, number of the batch in that shape's stream) of each batch that leaves in this epoch, in turn."""


class _Set(NamedTuple):
    """One data set."""

    name: str
    weight: Fraction
    clip_ids: list[str]

    def taken(self, epoch: int) -> tuple[int, int]:
        """Return (whole rounds, places of the next one) that lie behind when `epoch` begins."""
        return divmod(floor(epoch * self.weight * len(self.clip_ids)), len(self.clip_ids))


class Sampler:
    """Draws global batches of clips.

    Args:
        clip_ids: the clips; their order does not matter.
        batch_size: clips a step over all ranks and accumulation steps together; of each shape, if a mapping.
        seed: of the shuffles.
        buckets: shape key of each clip; without it all have one.
        sets: name of each clip's data set; without it there is one.
        weights: how often an epoch sees each clip of a set, above 0; 1 where a set is not named.

    Raises:
        DataError: no clips.
        FactoryError: a batch size below 1, or a weight that is not above 0.
    """

    def __init__(
        self,
        clip_ids: Iterable[str],
        *,
        batch_size: int | Mapping[str, int],
        seed: int,
        buckets: Mapping[str, str] | None = None,
        sets: Mapping[str, str] | None = None,
        weights: Mapping[str, float] | None = None,
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
        self._sets = _make_sets(self.clip_ids, sets or {}, weights or {})
        self._set_counts = {s.name: Counter(self._buckets[clip_id] for clip_id in s.clip_ids) for s in self._sets}
        self.rates = {
            key: float(sum(s.weight * self._set_counts[s.name][key] for s in self._sets)) for key in self.counts
        }
        """Places of each shape an epoch, on average."""
        self._epochs: dict[int, _Epoch] = {}
        self._before: dict[int, dict[str, int]] = {}

    def __len__(self) -> int:
        return len(self.clip_ids)

    @property
    def places(self) -> float:
        """Places an epoch, on average: the clips, each as often as the weight of its set says."""
        return sum(self.rates.values())

    @property
    def set_counts(self) -> dict[str, tuple[int, float]]:
        """Of each data set: (clips, weight)."""
        return {s.name: (len(s.clip_ids), float(s.weight)) for s in self._sets}

    def order(self, epoch: int) -> list[str]:
        """Return the clips in the order of `epoch`."""
        return [pick.clip_id for pick in self.picks(epoch)]

    def picks(self, epoch: int) -> list[Pick]:
        """Return the places of `epoch` in turn."""
        places = sorted((round_, clip_id) for s in self._sets for round_, clip_id in self._places(s, epoch))
        order = generator(self.seed, "epoch order", epoch).permutation(len(places))
        return [Pick(places[place][1], places[place][0]) for place in order]

    def _places(self, part: _Set, epoch: int) -> Iterable[tuple[int, str]]:
        """Yield (round, clip) of each place that a set has in `epoch`."""
        (first, start), (last, stop) = part.taken(epoch), part.taken(epoch + 1)
        for number in range(first, last + 1):
            low, high = start if number == first else 0, stop if number == last else len(part.clip_ids)
            if low < high:
                whole = (low, high) == (0, len(part.clip_ids))
                for clip_id in part.clip_ids if whole else self._round(part, number)[low:high]:
                    yield number, clip_id

    def _round(self, part: _Set, number: int) -> list[str]:
        order = generator(self.seed, "set round", part.name, number).permutation(len(part.clip_ids))
        return [part.clip_ids[place] for place in order]

    def batch(self, step: int) -> list[Pick]:
        """Return the global batch of `step` (counted from 0)."""
        key, number = self._leaving(step)
        size = self.batch_sizes[key]
        start = number * size
        last = self._epoch_of(step)
        epoch = _last(lambda e: self._places_before(e)[key] <= start, last)
        picks: list[Pick] = []
        while len(picks) < size:
            place = start + len(picks) - self._places_before(epoch)[key]
            picks += self._epoch(epoch).orders[key][place : place + size - len(picks)]
            epoch += 1
        return picks

    def _places_before(self, epoch: int) -> dict[str, int]:
        """Return how many places of each shape lie before `epoch`."""
        if epoch not in self._before:
            before = dict.fromkeys(self.counts, 0)
            for part in self._sets:
                rounds, places = part.taken(epoch)
                begun = self._round(part, rounds)[:places] if places else []
                for key, count in self._set_counts[part.name].items():
                    before[key] += rounds * count
                for clip_id in begun:
                    before[self._buckets[clip_id]] += 1
            # Replaced, never changed, so that threads may read while another adds.
            kept = self._before if len(self._before) < _KEPT_EPOCHS else {}
            self._before = {**kept, epoch: before}
            return before
        return self._before[epoch]

    def steps_before(self, epoch: int) -> int:
        """Return how many steps have left when `epoch` begins."""
        before = self._places_before(epoch)
        return sum(before[key] // size for key, size in self.batch_sizes.items())

    def waiting(self, epoch: int) -> dict[str, int]:
        """Return how many clips of each shape wait in its line when `epoch` begins; none of them is lost."""
        before = self._places_before(epoch)
        return {key: before[key] % size for key, size in self.batch_sizes.items()}

    def bucket(self, step: int) -> str:
        """Return the shape of `step`."""
        return self._leaving(step)[0]

    def epochs(self, step: int) -> float:
        """Return how many times the data has been seen when `step` steps are done."""
        epoch = self._epoch_of(step)
        before = self._places_before(epoch)
        seen = sum(before[key] // size * size for key, size in self.batch_sizes.items())
        left = self._epoch(epoch).leaving[: step - self.steps_before(epoch)]
        return (seen + sum(self.batch_sizes[key] for key, _ in left)) / self.places

    def _leaving(self, step: int) -> tuple[str, int]:
        epoch = self._epoch_of(step)
        return self._epoch(epoch).leaving[step - self.steps_before(epoch)]

    def _epoch_of(self, step: int) -> int:
        """Return the epoch in which the batch of `step` leaves: the last that begins with no more steps behind it."""
        high = 1
        while self.steps_before(high) <= step:
            high *= 2
        return _last(lambda epoch: self.steps_before(epoch) <= step, high)

    def _epoch(self, epoch: int) -> _Epoch:
        epochs = self._epochs
        if epoch not in epochs:
            # Replaced, never changed, so that threads may read while another adds.
            reach = 2 + max(ceil(size / self.rates[key]) for key, size in self.batch_sizes.items())
            kept = {e: o for e, o in epochs.items() if abs(e - epoch) < reach}
            self._epochs = epochs = {**kept, epoch: self._make_epoch(epoch)}
        return epochs[epoch]

    def _make_epoch(self, epoch: int) -> _Epoch:
        orders: dict[str, list[Pick]] = {key: [] for key in self.counts}
        leaving = []
        before = self._places_before(epoch)
        for pick in self.picks(epoch):
            key = self._buckets[pick.clip_id]
            orders[key].append(pick)
            come = before[key] + len(orders[key])
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


def _make_sets(clip_ids: list[str], sets: Mapping[str, str], weights: Mapping[str, float]) -> list[_Set]:
    members: dict[str, list[str]] = {}
    for clip_id in clip_ids:
        members.setdefault(sets.get(clip_id, ""), []).append(clip_id)
    for name in members:
        weight = weights.get(name, 1)
        if not 0 < weight < float("inf"):
            raise FactoryError(f"weight={weight:g} of data set {name!r} must be above 0; leave the set out to skip it.")
    # Through its text a float is the number that was written: 0.1 is a tenth, and nothing drifts over many epochs.
    return [_Set(name, Fraction(str(weights.get(name, 1))), found) for name, found in sorted(members.items())]


def _last(holds: Callable[[int], bool], high: int) -> int:
    """Return the last number in [0, high] for which `holds`, which is true up to it, and at 0."""
    if holds(high):
        return high
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


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
