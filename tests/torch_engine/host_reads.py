"""Counts what makes a program wait for its device (`count.sync.train_step`), on a CPU, where nothing ever waits."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Operators whose result, or its size, the host must know.
_WAITING = {
    aten._local_scalar_dense.default, aten.is_nonzero.default, aten.nonzero.default, aten.masked_select.default,
    aten.equal.default, aten._unique2.default, aten.unique_consecutive.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
# Calls that copy to the host, which are nothing to dispatch where the tensor is there already.
_COPYING = {Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.__array__}


class HostReads:
    """Notes in `found`, while it is entered, every operation that reads a tensor's values on the host."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._modes = (_Calls(self.found), _Operators(self.found))

    def __enter__(self) -> "HostReads":
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)


class _Operators(TorchDispatchMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        masks = [leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, Tensor)] if func is aten.index.Tensor else []
        if func in _WAITING or any(mask.dtype == torch.bool for mask in masks):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


class _Calls(TorchFunctionMode):
    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in _COPYING:
            self.found.append(func.__name__)
        return func(*args, **(kwargs or {}))
