"""Block swap: frozen weights of some blocks live in host memory and visit the device for their block's turn.

A visit is one copy of the whole block, host to device, begun when the block before has its turn; frozen weights never
travel back. At most two swapped blocks are on the device at once. A block that is absent keeps its tensors, without
memory behind them, so whatever holds one (autograd, an adapter, a view) finds the values again when they are back.
Neighbours may travel together, as one block of several.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cogvideox_factory.torch_engine.passage import Lane, host_like, plain_parts, watch

_ALIGNMENT = 256
"""Bytes; what a device's own allocator gives every tensor."""


class Swap:
    """The swapped ones among `blocks`, spread evenly so that a copy has the time of the blocks between."""

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        num_swapped: int,
        *,
        device: torch.device,
        group: int = 1,
        forward_only: bool = False,
    ) -> None:
        """Move the frozen weights of `num_swapped` blocks, at most all, to the host; the rest of those, to `device`.

        Args:
            blocks: in the order of their turns.
            num_swapped: how many; with `group`, how many groups.
            device: where they visit.
            group: neighbours that come and go together.
            forward_only: there is no backward pass, so behind the last block the first one's turn comes again.
        """
        groups = [blocks[i : i + group] for i in range(0, len(blocks), group)]
        assert 1 <= num_swapped <= len(groups), (num_swapped, len(groups))
        self._lane, self._forward_only = Lane(device), forward_only
        self.visitors = {
            i: Visitor(nn.ModuleList(groups[i]), device, self._lane) for i in spread(num_swapped, len(groups))
        }
        watch(blocks, lambda block, backward: self._enter(block // group, backward), forward_only=forward_only)

    def leave(self) -> None:
        """Free all that is on the device."""
        for visitor in self.visitors.values():
            visitor.leave()

    @property
    def parameters(self) -> set[nn.Parameter]:
        """The weights that come and go."""
        return {parameter for visitor in self.visitors.values() for parameter in visitor.parameters}

    def _enter(self, index: int, backward: bool) -> None:
        coming, passed = [i for i in self.visitors if i > index], [i for i in self.visitors if i < index]
        if backward:
            coming, passed = passed[::-1], coming[::-1]
        if self._forward_only:
            coming += passed
        # At the end of the way it turns: what was passed last is needed first.
        stays = coming[:1] or ([index] if index in self.visitors else passed[-1:])
        for i, visitor in self.visitors.items():
            if i not in (index, *stays):
                visitor.leave()
        if index in self.visitors:
            self.visitors[index].arrive()
            self.visitors[index].wait()
        if coming:
            self.visitors[coming[0]].arrive()


class Visitor:
    """The frozen tensors of one block, in one piece of memory on either side."""

    def __init__(self, block: nn.Module, device: torch.device, lane: Lane) -> None:
        """Move them to the host; nothing is on the device afterwards, and `block` at most once meanwhile."""
        places, size = [], 0
        for tensor in _frozen(block):
            places.append(size)
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._lane, self._size = lane, size
        self._mark: torch.Event | None = None
        self._here = torch.empty(size, dtype=torch.uint8, device=device)
        self._away = host_like(self._here)
        slots = []
        for tensor, place in zip(_frozen(block), places, strict=True):
            _slot(self._away, tensor, place).copy_(tensor.data)
            slots.append(_slot(self._here, tensor, place))
        self._storage.resize_(0)
        block.to(device)  # whatever kind of device it is, tensors are then of its kind
        for tensor, slot in zip(_frozen(block), slots, strict=True):
            tensor.data = slot
        self.parameters = [p for p in block.parameters() if not p.requires_grad]

    @property
    def is_here(self) -> bool:
        """Whether its memory on the device is there."""
        return self._storage.size() > 0

    def arrive(self) -> None:
        """Start the copy to the device, if it is not there."""
        if not self.is_here:
            with self._lane.copying():
                self._storage.resize_(self._size)
                self._here.copy_(self._away, non_blocking=True)
            self._mark = self._lane.mark()

    def wait(self) -> None:
        """Let computation go on only when the copy is done."""
        self._lane.wait(self._mark)

    def leave(self) -> None:
        """Free its memory on the device."""
        self._storage.resize_(0)

    @property
    def _storage(self) -> torch.UntypedStorage:
        return self._here.untyped_storage()


def spread(count: int, length: int) -> list[int]:
    """Return `count` of range(length), as evenly as they go."""
    return [(2 * i + 1) * length // (2 * count) for i in range(count)]


def _frozen(block: nn.Module) -> list[Tensor]:
    parameters = [p for p in block.parameters() if not p.requires_grad]
    return [part for p in (*parameters, *block.buffers()) for part in plain_parts(p)]


def _slot(memory: Tensor, tensor: Tensor, place: int) -> Tensor:
    """Return the part of `memory` from byte `place` as a tensor like `tensor`, contiguous."""
    return memory[place : place + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
