"""Gradient checkpointing of one block: keep its input and make the rest again in the backward pass.

- "none" keeps all that the backward pass needs (11 units a block with trained weights, 9 with frozen ones);
- "full" keeps 1 unit, the block's input, and runs the block's forward twice;
- "save_attention" keeps 2, the input and the attention output (with its log-sum-exp), so that attention, the dearest
  part of a long video, runs forward once.

A unit is one activation of the token stream. Two details. Attention is one operator whatever kernel runs
(`attention.SAVED_OPS`), so none is missed. And the second run stops short of the last projection of the feed-forward,
whose result nobody reads.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.torch_engine.attention import SAVED_OPS
from cogvideox_factory.torch_engine.feed_forward import output_unread
from cogvideox_factory.torch_engine.offload import Shelf
from cogvideox_factory.torch_engine.sequence_parallel import RING_OP

Checkpointing = Literal["none", "full", "save_attention"]

_KEPT = (*SAVED_OPS, RING_OP)
"""What "save_attention" runs once, on the device or a shelf."""

_Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def check_mode(mode: str) -> Checkpointing:
    """Return `mode`.

    Raises:
        FactoryError: no such mode.
    """
    modes = list(get_args(Checkpointing))
    if mode not in modes:
        raise FactoryError(f"checkpointing={mode!r}{nearest(mode, modes)}: give {', '.join(modes)}.")
    return mode  # pyright: ignore[reportReturnType]


def run(mode: Checkpointing, function: Callable[..., Tensor], *args: Any, shelf: Shelf | None = None) -> Tensor:
    """Return `function(*args)`, keeping for the backward pass what `mode` says.

    What autograd saves goes where the caller's hooks say; the attention output, which it never sees, to `shelf`.
    """
    if mode == "none" or not torch.is_grad_enabled():
        return function(*args)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}  # nothing random in a block
    if mode == "save_attention":
        options["context_fn"] = _save_attention if shelf is None else partial(_shelve_attention, shelf)
    elif not torch.compiler.is_compiling():
        options["context_fn"] = _full
    out = checkpoint(function, *args, **options)
    assert isinstance(out, Tensor)
    return out


def _full() -> _Contexts:
    return nullcontext(), output_unread()


def _save_attention() -> _Contexts:
    first, second = create_selective_checkpoint_contexts(list(_KEPT))
    return first, second if torch.compiler.is_compiling() else _both(second, output_unread())


def _shelve_attention(shelf: Shelf) -> _Contexts:
    kept: deque[Any] = deque()
    return _Shelve(shelf, kept), _both(_TakeBack(shelf, kept), output_unread())


class _Shelve(TorchDispatchMode):
    """Lay what the attention operator returns on a shelf."""

    def __init__(self, shelf: Shelf, kept: deque[Any]) -> None:
        super().__init__()
        self._shelf, self._kept = shelf, kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in _KEPT:
            self._kept.append([self._shelf.pack(part) for part in out])
        return out


class _TakeBack(_Shelve):
    """Return what lies on the shelf in place of running the operator, in the same order."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func not in _KEPT:
            return func(*args, **(kwargs or {}))
        return tuple(self._shelf.unpack(part) for part in self._kept.popleft())


@contextmanager
def _both(one: AbstractContextManager[Any], other: AbstractContextManager[Any]):
    with ExitStack() as stack:
        stack.enter_context(one)
        stack.enter_context(other)
        yield
