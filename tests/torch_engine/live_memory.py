"""Live memory of a computation, by its storages: what a device would hold, told from a run on fake tensors."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Within, counts the bytes of all storages that operations make, until they are freed or resized.

    Sharding frees gathered weights by resizing their storage, which no operation shows; so that is watched too.
    """

    def __init__(self, *, device_type: str | None = None) -> None:
        """Count those of one kind of device, or all."""
        super().__init__()
        self._device_type = device_type
        self.bytes = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __enter__(self):
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int):
            if storage._cdata in self._sizes:
                self._note(storage._cdata, size)
            return self._resize(storage, size)

        torch.UntypedStorage.resize_ = resize  # pyright: ignore[reportAttributeAccessIssue]
        return super().__enter__()

    def __exit__(self, *args: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):  # whose part comes by itself
                if self._device_type not in (None, tensor.device.type):
                    continue
                storage = tensor.untyped_storage()
                if storage._cdata not in self._sizes:
                    self._note(storage._cdata, storage.nbytes())
                    weakref.finalize(storage, self._drop, storage._cdata)
        return out

    def _note(self, key: int, size: int) -> None:
        self.bytes += size - self._sizes.get(key, 0)
        self._sizes[key] = size
        self.peak = max(self.peak, self.bytes)

    def _drop(self, key: int) -> None:
        self.bytes -= self._sizes.pop(key)
