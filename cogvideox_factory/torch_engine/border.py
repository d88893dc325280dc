"""Arrays on the ground become tensors in this engine, and back, without a copy where memory can be shared.

numpy has no bfloat16 of its own; the ground uses `ml_dtypes.bfloat16`. Both sides hold the same 16 bits, so they are
handed over as int16 and reinterpreted.
"""

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import torch

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_tensor(
    array: np.ndarray, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Return `array` as a tensor of the same shape; it shares the array's memory on the CPU in the same dtype.

    Args:
        array: any layout; what is not C-contiguous is copied. Read-only arrays (a mapped file) are taken as they are:
            do not write to the tensor of one.
        device: where to; the CPU by default.
        dtype: converted to on the target device; the array's own by default.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)  # ascontiguousarray turns a scalar into one row
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        if array.dtype == _BFLOAT16:
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
    return tensor.to(device=device).to(dtype=dtype)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return `tensor` as an array of the same shape; it shares the memory of a contiguous CPU tensor."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(_BFLOAT16)
    return tensor.numpy()


# Processes may divide a tensor by its rows (see `sharding`). Whether they do is told by its methods: importing DTensor
# to ask takes a second, which a command of one process need not pay.


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`; all processes that divide it must call this."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the part of `tensor` that this process holds, in the same memory."""
    part = getattr(tensor, "to_local", None)
    return tensor if part is None else part()


def rows_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Return which rows of `tensor` this process holds, as (first, behind the last); a scalar counts as one row."""
    num_rows, first = (tensor.shape[0] if tensor.ndim else 1), 0
    for axis, placement in enumerate(getattr(tensor, "placements", ())):
        if placement.is_shard(0):  # cut as torch.chunk does: all of one size, but for the last ones
            mesh: Any = tensor.device_mesh  # type: ignore[attr-defined]
            size = -(-num_rows // mesh.size(axis))
            first = min(mesh.get_local_rank(axis) * size, num_rows)
            num_rows = min(size, num_rows - first)
    assert not tensor.ndim or local(tensor).shape[0] == num_rows, tensor.shape
    return first, first + num_rows


def put_rows(parameter: torch.Tensor, values: torch.Tensor) -> None:
    """Copy into `parameter`, in its dtype, what this process holds of it, from all `values`."""
    start, stop = rows_of(parameter)
    local(parameter.detach()).copy_(values[start:stop])
