"""Large buffers that pass from layer to layer, and memory that is free the moment nobody needs it.

On a CPU, glibc returns blocks above 32 MB at once and the kernel hands them out again zeroed, page by page: in a VAE
decode that costs more than all of its norms. So buffers are kept and reused. On accelerators torch's caching
allocator does that job.
"""

from math import prod

from torch import Tensor


class Scratch:
    """Buffers of one call. What is taken is uninitialised; what is given back must not be used again."""

    def __init__(self, *, is_active: bool = True) -> None:
        """Begin empty; an inactive one (autograd keeps what it needs) takes nothing back."""
        self.is_active = is_active
        self._free: list[Tensor] = []
        self._lent: dict[int, Tensor] = {}

    def take(self, like: Tensor, *shape: int) -> Tensor:
        """Return a contiguous tensor of `shape` with the dtype and device of `like`."""
        if like.device.type != "cpu":
            return like.new_empty(shape)
        size = prod(shape)
        fitting = [flat for flat in self._free if flat.numel() >= size and flat.dtype == like.dtype]
        if fitting:
            flat = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not flat]
        else:
            self._free.clear()  # all too small: stages grow, and the small ones would only add to the peak
            flat = like.new_empty(size)
        self._lent[flat.data_ptr()] = flat
        return flat[:size].view(shape)

    def give(self, tensor: Tensor) -> None:
        """Take `tensor` back; one that was made elsewhere is emptied, though callers may still hold its name."""
        if not self.is_active or tensor.is_meta:
            return
        flat = self._lent.pop(tensor.data_ptr(), None)
        if flat is not None:
            self._free.append(flat)
        else:
            tensor.untyped_storage().resize_(0)
