"""Telling who wants to know when each block of a model has its turn, forward and backward.

What is moved between the device and the host (`offload`, `swap`) is moved one block ahead of its use, so that the copy
goes on while the block before it works. `Lane` is where such copies run.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Enter = Callable[[int, bool], None]
"""Called with the number of a block and whether its backward pass is next (or its forward pass)."""


def watch(blocks: Sequence[nn.Module], enter: Enter, *, forward_only: bool = False) -> None:
    """Call `enter` right before each forward and, unless `forward_only`, backward pass of each of `blocks`.

    The second run of a checkpointed block is part of its backward pass and is not announced again.
    """
    for index, block in enumerate(blocks):
        block.register_forward_pre_hook(_before(enter, index))
        if forward_only:
            continue
        block.register_forward_hook(_after(enter, index))


def _before(enter: Enter, index: int):
    return lambda module, args: enter(index, False)


def _after(enter: Enter, index: int):
    def backward(grad: Tensor) -> None:
        enter(index, True)

    def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(backward)

    return hook


class Lane:
    """A stream beside the one that computes, for copies; on a CPU copies are done when they are asked for."""

    def __init__(self, device: torch.device) -> None:
        self.stream = None if device.type == "cpu" else torch.Stream(device=device)

    def copying(self):
        """Return a context in which copies run beside computation, but after all that was asked for before."""
        if self.stream is None:
            return nullcontext()
        self.stream.wait_stream(torch.accelerator.current_stream())
        return self.stream

    def mark(self) -> torch.Event | None:
        """Return a mark behind the copies asked for so far, for `wait`."""
        return None if self.stream is None else self.stream.record_event()

    @staticmethod
    def wait(mark: torch.Event | None) -> None:
        """Let computation go on only behind `mark`; the host does not wait."""
        if mark is not None:
            torch.accelerator.current_stream().wait_event(mark)


def plain_parts(tensor: Tensor) -> list[Tensor]:
    """Return the tensors that `tensor` is made of, if it wraps some (low-bit weights), or itself."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [part for name in names for part in plain_parts(getattr(tensor, name))]


def host_like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return unset host memory for a copy of `tensor` (in `dtype`), page-locked where there is a card."""
    return torch.empty_like(tensor, dtype=dtype, device="cpu", pin_memory=torch.accelerator.is_available())
