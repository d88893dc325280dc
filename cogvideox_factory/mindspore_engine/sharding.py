"""Weights, gradients and optimizer state divided among processes.

| `zero` | weights | gradients | optimizer | communication of a step with n forward passes |
|---|---|---|---|---|
| 0 | whole | whole | whole | gradients summed once |
| 1 | whole | whole until the step | divided | 1 reduction, 1 gather of the new weights |
| 2 | whole | divided after each backward pass | divided | n reductions, 1 gather |
| 3 | Linears divided, gathered layer by layer, forward and backward | divided | divided | 2n gathers, n reductions |

Rajbhandari et al., ZeRO (arXiv 1910.02054). A Linear is divided by its rows (`Rows`). All else that is updated lies in
buckets: the values of many weights one behind the other, of which each process updates an equal share, so that a few
large messages do for hundreds of small weights. Every loss counts once, so what is reduced is the sum over processes.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from cogvideox_factory.mindspore_engine.border import put, put_own, rows_of, to_array, whole_array, whole_shape
from cogvideox_factory.mindspore_engine.collectives import AllGather, AllReduce, Group, ReduceScatter, all_gather
from cogvideox_factory.mindspore_engine.ranks import Ranks
from cogvideox_factory.tensors import StoredTensor

BUCKET_SIZE = 2**26
"""Numbers in a bucket, at most, unless one weight has more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shards:
    """Who divides the weights of Linears, and what those are computed with in."""

    group: Group
    dtype: Any


Read = Callable[[str], "np.ndarray | StoredTensor"]
"""Returns all of the weight of a name, or what reads rows of it."""


# --- which weight is updated where ------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Own:
    """One weight, of which this process updates what it holds: all of it, or its rows."""

    weight: Parameter

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the whole weights in it."""
        return {self.weight.name: whole_shape(self.weight)}

    def whole(self, values: Parameter) -> dict[str, np.ndarray]:
        """Return state of the weight, all rows of it; the processes that divide it call this at the same point."""
        return {self.weight.name: whole_array(values, rows_of(self.weight))}

    def fill(self, values: Parameter, read: Read) -> None:
        """Fill what this process holds of some state."""
        put_own(values, read(self.weight.name), rows_of(self.weight))


@dataclass(frozen=True, kw_only=True, slots=True)
class Bucket:
    """Weights that every process holds whole, and updates a share of: as one row of numbers, filled up with zeros."""

    weights: tuple[Parameter, ...]
    group: Group

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the weights in it."""
        return {weight.name: tuple(weight.shape) for weight in self.weights}

    @property
    def share(self) -> int:
        """Numbers that a process updates."""
        return -(-sum(weight.size for weight in self.weights) // self.group.size)

    def whole(self, values: Parameter) -> dict[str, np.ndarray]:
        """Return state of the weights by name; all processes call this at the same point."""
        flat, found, start = to_array(all_gather(values, self.group)), {}, 0
        for name, shape in self.shapes.items():
            found[name] = flat[start : start + prod(shape)].reshape(shape)
            start += prod(shape)
        return found

    def fill(self, values: Parameter, read: Read) -> None:
        """Fill this process' share of some state."""
        put(values, self.share_of(read))

    def share_of(self, read: Read) -> np.ndarray:
        """Return this process' share, float32 [share]; only rows that it needs are read."""
        first, share = self.group.index * self.share, np.zeros(self.share, np.float32)
        start = 0
        for name, shape in self.shapes.items():
            size = prod(shape)
            low, high = max(first, start), min(first + self.share, start + size)
            if low < high:
                width = size // shape[0]
                top, bottom = (low - start) // width, -(-(high - start) // width)
                numbers = read(name)[top:bottom].reshape(-1)
                share[low - first : high - first] = numbers[low - start - top * width :][: high - low]
            start += size
        return share


class Division:
    """Who updates what of the weights that are trained."""

    def __init__(self, weights: Sequence[Parameter], ranks: Ranks) -> None:
        self.ranks = ranks
        self.group = ranks.everyone if ranks.layout.zero else None
        """The processes that divide state; None: each has all."""
        self.is_divided = self.group is not None
        own = [w for w in weights if rows_of(w) is not None] if self.is_divided else list(weights)
        rest = sorted((w for w in weights if rows_of(w) is None), key=lambda w: w.name) if self.is_divided else []
        self.own = [Own(weight=weight) for weight in own]
        self.buckets = [Bucket(weights=part, group=self.group) for part in _parted(rest)] if self.group else []
        self.weights = own + [weight for bucket in self.buckets for weight in bucket.weights]
        """What is trained, in the order of `slots`."""

    @property
    def slots(self) -> list[Own | Bucket]:
        """What state goes with, in order."""
        return [*self.own, *self.buckets]

    def reduction(self) -> "Summed | Scattered | None":
        """Return what turns gradients of `weights` into those of `slots`, summed over processes; None: nothing does."""
        if self.ranks.everyone is None:
            return None
        if not self.is_divided:
            return Summed([tuple(part) for part in _parted(self.weights)], self.ranks.everyone)
        return Scattered(len(self.own), self.buckets)


def _parted(weights: Sequence[Parameter]) -> Iterator[tuple[Parameter, ...]]:
    """Yield neighbours of one dtype that have at most `BUCKET_SIZE` numbers, or one that has more."""
    part: list[Parameter] = []
    for weight in weights:
        full = sum(w.size for w in part) + weight.size > BUCKET_SIZE
        if part and (full or weight.dtype != part[0].dtype):
            yield tuple(part)
            part = []
        part.append(weight)
    if part:
        yield tuple(part)


# --- state as a checkpoint has it -------------------------------------------------------------------------------------


class State:
    """State of the weights that are trained, by kind ("model", "ema", …): whole outside, divided here."""

    def __init__(self, division: Division, kinds: Mapping[str, Sequence[Parameter]]) -> None:
        self._slots, self._kinds = division.slots, kinds
        self._places = {
            f"{kind}.{name}": (kind, index)
            for kind in kinds
            for index, slot in enumerate(self._slots)
            for name in slot.shapes
        }
        self.shapes: dict[str, tuple[int, ...]] = {
            f"{kind}.{name}": shape for kind in kinds for slot in self._slots for name, shape in slot.shapes.items()
        }
        """Of whole tensors, by name and in the order of names."""
        self.shapes = dict(sorted(self.shapes.items()))

    @property
    def num_bytes(self) -> int:
        """Of all together."""
        return sum(self.dtype(name).itemsize * prod(shape) for name, shape in self.shapes.items())

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor: that in which it is held."""
        kind, index = self._places[name]
        return np.dtype(ml_dtypes.bfloat16 if self._kinds[kind][index].dtype == ms.bfloat16 else np.float32)

    def arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, whole array) in the order of names; a bucket and a weight at most are gathered at a time.

        All processes iterate to the end at the same point, if weights are divided.
        """
        kept: dict[type, tuple[tuple[str, int], dict[str, np.ndarray]]] = {}  # rows lie between those of a bucket
        for name in self.shapes:
            kind, index = place = self._places[name]
            slot = self._slots[index]
            if type(slot) not in kept or kept[type(slot)][0] != place:
                kept[type(slot)] = place, slot.whole(self._kinds[kind][index])
            yield name, kept[type(slot)][1][name.removeprefix(f"{kind}.")]

    def fill(self, read: Read) -> None:
        """Take what this process holds of each tensor that `read` knows by name."""
        for kind, parts in self._kinds.items():
            for slot, values in zip(self._slots, parts, strict=True):
                slot.fill(values, lambda name, kind=kind: read(f"{kind}.{name}"))


# --- what compiles ----------------------------------------------------------------------------------------------------

_map = ops.HyperMap()
_flattened = ops.MultitypeFuncGraph("flattened")
_shaped = ops.MultitypeFuncGraph("shaped")


@_flattened.register("Tensor")
def _flatten(x: Tensor) -> Tensor:
    return x.reshape(-1).astype(ms.float32)


@_shaped.register("Tensor", "Tensor")
def _shape(like: Tensor, x: Tensor) -> Tensor:
    return x.reshape(like.shape)


class _Flat(nn.Cell):
    """Tensors as float32 rows of numbers, one for each part, filled up so that `num_shares` divide it."""

    def __init__(self, parts: Sequence[Sequence[Parameter]], num_shares: int) -> None:
        super().__init__(auto_prefix=False)
        bounds, sizes, start = [], [], 0
        for part in parts:
            own = [weight.size for weight in part]
            own.append(-sum(own) % num_shares)
            bounds.append((start, start + len(part)))
            sizes.append(tuple(own))
            start += len(part)
        self.bounds, self.sizes = tuple(bounds), tuple(sizes)
        """(first, behind the last) tensor of each part; their sizes, and that of the filling."""

    def construct(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return one float32 row a part."""
        flat, rows = _map(_flattened, tensors), ()
        for index in range(len(self.bounds)):
            first, last = self.bounds[index]
            filling = self.sizes[index][-1]
            pieces = flat[first:last]
            if filling:
                pieces = (*pieces, ops.zeros((filling,), ms.float32))
            rows = (*rows, ops.concat(pieces))
        return rows

    def split(self, rows: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the pieces of all rows, still flat."""
        pieces = ()
        for index in range(len(self.bounds)):
            sizes = self.sizes[index] if self.sizes[index][-1] else self.sizes[index][:-1]
            parts = ops.split(rows[index], sizes)
            pieces = (*pieces, *parts[: len(self.sizes[index]) - 1])
        return pieces


class Summed(nn.Cell):
    """The sum of gradients over all processes, some large messages for all."""

    def __init__(self, parts: Sequence[Sequence[Parameter]], group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.flat, self.reduce = _Flat(parts, 1), AllReduce(group)

    def construct(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return what all processes' `grads` add up to, float32."""
        rows = ()
        for row in self.flat(grads):
            rows = (*rows, self.reduce(row))
        return _map(_shaped, grads, self.flat.split(rows))


class Scattered(nn.Cell):
    """Gradients summed over all processes, of which each takes its share of every bucket; rows are summed already."""

    def __init__(self, num_own: int, buckets: Sequence[Bucket]) -> None:
        super().__init__(auto_prefix=False)
        self.num_own, self.flat = num_own, None
        if buckets:
            self.flat = _Flat([bucket.weights for bucket in buckets], buckets[0].group.size)
            self.reduce = ReduceScatter(buckets[0].group)

    def construct(self, grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return one gradient for each slot."""
        reduced = grads[: self.num_own]
        if self.flat is not None:
            for row in self.flat(grads[self.num_own :]):
                reduced = (*reduced, self.reduce(row))
        return reduced


class Spread(nn.Cell):
    """What processes have of buckets, put together and taken apart into the weights, flat, in their dtype."""

    def __init__(self, buckets: Sequence[Bucket]) -> None:
        super().__init__(auto_prefix=False)
        group = buckets[0].group
        self.flat, self.together = _Flat([bucket.weights for bucket in buckets], group.size), AllGather(group)
        self.dtypes: tuple[Any, ...] = tuple(bucket.weights[0].dtype for bucket in buckets)

    def construct(self, shares: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return a row of numbers for each weight from one for each bucket."""
        rows = ()
        for index in range(len(self.dtypes)):
            rows = (*rows, self.together(shares[index].astype(self.dtypes[index])))
        return self.flat.split(rows)
