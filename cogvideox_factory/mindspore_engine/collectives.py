"""What processes send one another: sums, rows put together, and an exchange of rows for heads.

Cells, so that they run in graphs and have gradients of their own. On Ascend each is one operator of the group's. A CPU
has sums and gathers of all processes only, so there a gather of all stands for the rest, and of a group: whatever the
group, all processes must come, at the same point and with the same shape.

Legend: B batch, R rows of one rank, P ranks of the group, L heads, K head size.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import mindspore as ms
from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine import device


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Some of the processes of a run, this one among them."""

    members: tuple[int, ...]
    """Their ranks in the run, in the order of the group."""
    index: int
    """Of this process in it."""
    world: int
    """Processes of the run."""

    @property
    def size(self) -> int:
        """P."""
        return len(self.members)

    @property
    def is_all(self) -> bool:
        """Whether it is the whole run."""
        return self.size == self.world


class _Collective(nn.Cell):
    """What the cells below share: the operators of the group, or of all processes."""

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.size, self.index = group.size, group.index
        self.has_own = device.is_ascend()
        name = device.communicator(group.members, world=group.world)
        self.whole = group.is_all or self.has_own
        """Whether operators reach the group alone."""
        self.members = tuple(range(group.size)) if self.whole else group.members
        """Of what operators gather, the parts that are the group's."""
        self.gather = ops.AllGather(**name)
        self.reduce = ops.AllReduce(**name)

    def parts(self, x: Tensor) -> Sequence[Tensor]:
        """Return `x` of each process of the group."""
        rows, gathered = x.shape[0], self.gather(x)
        return [gathered[member * rows : (member + 1) * rows] for member in self.members]


class AllReduce(_Collective):
    """The sum over the group, the same bits in each of its processes."""

    def construct(self, x: Tensor) -> Tensor:
        """Return the sum of all `x`, of one axis at least."""
        if self.whole:
            return self.reduce(x)
        return _sum(self.parts(x))


class AllGather(_Collective):
    """What all processes of the group have, one behind the other along an axis."""

    def __init__(self, group: Group, axis: int = 0) -> None:
        super().__init__(group)
        self.axis = axis

    def construct(self, x: Tensor) -> Tensor:
        """Return `x` of all, in the order of the group."""
        if self.whole and self.axis == 0:
            return self.gather(x)
        return ops.concat(self.parts(x), axis=self.axis)


class ReduceScatter(_Collective):
    """The sum over the group, of which each process takes its share of the rows."""

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self.scatter = device.reduce_scatter(group.members, world=group.world) if self.has_own else None

    def construct(self, x: Tensor) -> Tensor:
        """Return [R, ...] of `x` [P * R, ...]."""
        if self.scatter is not None:
            return self.scatter(x)
        rows = x.shape[0] // self.size
        start, stop = self.index * rows, (self.index + 1) * rows
        if self.whole:
            return self.reduce(x)[start:stop]
        return _sum([part[start:stop] for part in self.parts(x)])


class GatherShards(nn.Cell):
    """Shards of a weight put together along axis 0; each process' gradient of the whole goes back into the shards.

    They travel in `dtype`, that of the arithmetic, and gradients in float32.
    """

    def __init__(self, group: Group, dtype: Any = ms.float32) -> None:
        super().__init__(auto_prefix=False)
        self.together, self.back = AllGather(group), ReduceScatter(group)
        self.dtype = dtype

    def construct(self, x: Tensor) -> Tensor:
        """Return [P * R, ...] of each process' `x` [R, ...]."""
        return self.together(x.astype(self.dtype))

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return the sum over the group of the gradients of this shard."""
        return (self.back(dout.astype(ms.float32)).astype(x.dtype),)


class GatherRows(nn.Cell):
    """Rows of a stream put together along axis 1, with which every process goes on in the same way.

    So the gradient of a process' own rows is all there is, and a parameter's is the sum over the group.
    """

    def __init__(self, group: Group) -> None:
        super().__init__(auto_prefix=False)
        self.together, self.index = AllGather(group, axis=1), group.index

    def construct(self, x: Tensor) -> Tensor:
        """Return [B, P * R, ...] of each process' `x` [B, R, ...]."""
        return self.together(x)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return this process' rows."""
        rows = x.shape[1]
        return (dout[:, self.index * rows : (self.index + 1) * rows],)


class AllToAll(_Collective):
    """Part i along one axis goes to process i; what comes is put together along the other. Axes are 1 and 2."""

    def __init__(self, group: Group, *, split: int, concat: int) -> None:
        super().__init__(group)
        assert {split, concat} == {1, 2}, (split, concat)
        self.split, self.concat = split, concat
        self.there = self.back = None
        if self.has_own:
            self.there = device.all_to_all(group.members, world=group.world, split=split, concat=concat)
            self.back = device.all_to_all(group.members, world=group.world, split=concat, concat=split)

    def construct(self, x: Tensor) -> Tensor:
        """Return [B, P * R, L / P, K] of `x` [B, R, L, K] (split 2, concat 1), or the reverse."""
        if self.there is not None:
            return self.there(x)
        return self.exchange(x, self.split, self.concat)

    def bprop(self, x: Tensor, out: Tensor, dout: Tensor) -> tuple[Tensor]:
        """Return the gradient, which takes the other way."""
        if self.back is not None:
            return (self.back(dout),)
        return (self.exchange(dout, self.concat, self.split),)

    def exchange(self, x: Tensor, split: int, concat: int) -> Tensor:
        """Do it by a gather: each process takes its part of what all have."""
        width = x.shape[split] // self.size
        start, stop = self.index * width, (self.index + 1) * width
        if split == 1:
            return ops.concat([part[:, start:stop] for part in self.parts(x)], axis=concat)
        return ops.concat([part[:, :, start:stop] for part in self.parts(x)], axis=concat)


def all_reduce(x: Tensor, group: Group) -> Tensor:
    """Return the sum of `x`, of any shape, over `group`; outside of graphs."""
    return _reducer(group)(x.reshape(-1)).reshape(x.shape)


def all_gather(x: Tensor, group: Group, axis: int = 0) -> Tensor:
    """Return `x` of all processes of `group` along `axis`; outside of graphs."""
    return _gatherer(group, axis)(x)


@cache
def _reducer(group: Group) -> AllReduce:
    return AllReduce(group)


@cache
def _gatherer(group: Group, axis: int) -> AllGather:
    return AllGather(group, axis)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    """Return the sum in the order of the group, so that it is the same in all of it."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
