"""Models that take turns on a device too small for all of them: weights wait in host memory until somebody calls.

Whoever is called first makes the others leave, so nobody has to say whose turn it is. Frozen weights never travel back;
a turn costs one copy to the device. Of a model whose blocks come one by one (`swap`), the rest comes as a whole.

| mode | on the device |
|---|---|
| model | the model whose turn it is |
| block | of that, the block at work, the next one, and what is outside the blocks |
| group | the same with groups of neighbouring blocks |
"""

from collections.abc import Sequence

import torch
from torch import nn

from cogvideox_factory.torch_engine.passage import Lane
from cogvideox_factory.torch_engine.swap import Swap, Visitor

MODES = ("model", "block", "group")


class Turns:
    """The models that share `device`, of which one at a time has weights there."""

    def __init__(self, device: torch.device, mode: str, *, group: int = 1) -> None:
        """`group` blocks come at a time in the mode of that name."""
        assert mode in MODES, mode
        self._device, self._mode, self._group = device, mode, group if mode == "group" else 1
        self._lane = Lane(device)
        self._guests: list[_Guest] = []

    def add(self, model: nn.Module, blocks: Sequence[nn.Module] = ()) -> None:
        """Let the weights of `model`, all frozen, come when it is called, or a part of it that is no block.

        They move to host memory now. `blocks` are the bulk of it, in the order they run in.
        """
        inside = {module for block in blocks for module in block.modules()}
        rest = [module for module in model.modules() if module not in inside and _owns_weights(module)]
        pieces, swap = [Visitor(nn.ModuleList(rest), self._device, self._lane)], None
        if self._mode == "model":
            pieces += [Visitor(block, self._device, self._lane) for block in blocks]
        elif blocks:
            count = -(-len(blocks) // self._group)
            swap = Swap(blocks, count, device=self._device, group=self._group, forward_only=True)
        guest = _Guest(pieces, swap)
        self._guests.append(guest)
        for door in dict.fromkeys([model, *rest]):
            door.register_forward_pre_hook(lambda module, args: self._call(guest))

    def _call(self, guest: "_Guest") -> None:
        for other in self._guests:
            if other is not guest:
                other.leave()
        guest.arrive()


class _Guest:
    """One of the models: what comes at once, and what comes block by block."""

    def __init__(self, pieces: list[Visitor], swap: Swap | None) -> None:
        self._pieces, self._swap = pieces, swap

    def arrive(self) -> None:
        for piece in self._pieces:
            piece.arrive()
        for piece in self._pieces:
            piece.wait()

    def leave(self) -> None:
        for piece in self._pieces:
            piece.leave()
        if self._swap is not None:
            self._swap.leave()


def _owns_weights(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
