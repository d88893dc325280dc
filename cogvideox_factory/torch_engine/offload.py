"""Activation offload: what a block keeps for its backward pass waits in host memory.

The copies out run beside the next block's forward pass, the copies back beside the backward pass of the block after.
The last block is left alone: its backward pass comes at once. Whatever the checkpointing mode keeps is moved, with
three exceptions: weights, tensors that all blocks share (rotary tables), and tensors too small to be worth a copy.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from cogvideox_factory.torch_engine.passage import Lane, host_like, plain_parts, watch

if TYPE_CHECKING:
    from cogvideox_factory.torch_engine.block import Block

SMALLEST = 1 << 20
"""Bytes below which a tensor stays where it is."""


@dataclass(eq=False, slots=True)
class Parcel:
    """One tensor on its way out, away, or back."""

    away: Tensor
    """The copy on the host."""
    here: Tensor | None
    """The tensor on the device, while it is there."""
    mark: torch.Event | None
    """Behind the last copy, whichever way it went."""


class Shelf:
    """What one block keeps: `pack` and `unpack` for autograd, and the moves between them."""

    def __init__(self, device: torch.device, lane: Lane, smallest: int) -> None:
        self._device, self._lane, self._smallest = device, lane, smallest
        self._parcels: dict[tuple, Parcel] = {}
        self._fixed: set[int] = set()

    def keeping(self, block: nn.Module, shared: Iterable[Tensor]) -> AbstractContextManager[Any]:
        """Return a context in which what autograd saves comes here, but for weights of `block` and `shared` tensors."""
        tensors = (*block.parameters(), *block.buffers(), *shared)
        self._fixed = {_place(part) for tensor in tensors for part in plain_parts(tensor)}
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, tensor: Tensor) -> Tensor | Parcel:
        """Start the copy of `tensor` to the host; one that stays is returned."""
        if not self._takes(tensor):
            return tensor
        key = _place(tensor), tensor.storage_offset(), tensor.shape, tensor.dtype
        if key not in self._parcels:  # kept by several nodes, copied once
            here, away = tensor.detach(), host_like(tensor)
            with self._lane.copying():
                away.copy_(here, non_blocking=True)
            self._parcels[key] = Parcel(away, here, self._lane.mark())
        return self._parcels[key]

    def unpack(self, kept: Tensor | Parcel) -> Tensor:
        """Return the tensor that `pack` took, on its device."""
        if isinstance(kept, Tensor):
            return kept
        here = self._fetch(kept)
        self._lane.wait(kept.mark)
        return here

    def let_go(self) -> None:
        """Free the device's memory of what is on the host by now."""
        for parcel in self._parcels.values():
            self._lane.wait(parcel.mark)
            parcel.here = None

    def fetch(self) -> None:
        """Start to bring everything back."""
        for parcel in self._parcels.values():
            self._fetch(parcel)

    def clear(self) -> None:
        """Forget everything; autograd keeps what it still needs."""
        self._parcels = {}

    def _fetch(self, parcel: Parcel) -> Tensor:
        if parcel.here is None:
            # Memory of the computing stream, so that it may be freed without a word to the other.
            parcel.here = torch.empty_like(parcel.away, device=self._device)
            with self._lane.copying():
                parcel.here.copy_(parcel.away, non_blocking=True)
            parcel.mark = self._lane.mark()
        return parcel.here

    def _takes(self, tensor: Tensor) -> bool:
        if tensor.nbytes < self._smallest or isinstance(tensor, nn.Parameter) or not tensor.is_contiguous():
            return False
        return _place(tensor) not in self._fixed


class Offload:
    """The shelves of all of `blocks` but the last, filled and emptied as the blocks have their turns."""

    def __init__(self, blocks: "Sequence[Block]", *, device: torch.device, smallest: int | None = None) -> None:
        lane, smallest = Lane(device), SMALLEST if smallest is None else smallest
        self.shelves = [Shelf(device, lane, smallest) for _ in blocks[:-1]]
        for block, shelf in zip(blocks[:-1], self.shelves, strict=True):
            block.shelf = shelf
        watch(blocks, self._enter)

    def _enter(self, index: int, backward: bool) -> None:
        before = self.shelves[index - 2 : index - 1] if index > 1 else []
        if not backward:
            for shelf in self.shelves[index : index + 1]:
                shelf.clear()
            for shelf in before:  # a block's time has passed: what it kept has been copied
                shelf.let_go()
            return
        for shelf in self.shelves[index + 1 : index + 2]:
            shelf.clear()
        for shelf in self.shelves[max(index - 1, 0) : index]:
            shelf.fetch()


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
