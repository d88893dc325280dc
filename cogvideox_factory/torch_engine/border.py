"""Arrays on the ground become tensors in this tower, and back, without a copy where memory can be shared.

numpy has no bfloat16 of its own; the ground uses `ml_dtypes.bfloat16`. Both sides hold the same 16 bits, so they are
handed over as int16 and reinterpreted.
"""

import warnings

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


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return all of `tensor`, which processes may divide among them (see `parallel`); then all must call this."""
    # Told by its method: importing DTensor to ask takes a second, which a command of one process need not pay.
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()
