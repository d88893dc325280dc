"""Arrays on the ground become tensors in this engine, and back.

Every dtype crosses bit for bit; bfloat16 is `ml_dtypes.bfloat16` on the ground. Weights change in place: a
compiled graph keeps the memory it was compiled with, and would not see a parameter that was given another.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.tensors import StoredTensor

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def to_tensor(array: np.ndarray, dtype: Any = None) -> Tensor:
    """Return a copy of `array` as a tensor of the same shape, in `dtype` if one is given."""
    tensor = Tensor(np.ascontiguousarray(array).reshape(array.shape))  # ascontiguousarray turns a scalar into one row
    return tensor if dtype is None else tensor.astype(dtype)


def to_array(tensor: Tensor) -> np.ndarray:
    """Return a copy of `tensor` as an array of the same shape."""
    array = np.array(tensor.asnumpy())
    if tensor.dtype == ms.bfloat16:  # MindSpore brings a numpy type of its own, of the same 16 bits
        return array.view(np.int16).view(_BFLOAT16)
    return array


def to_tensors(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch of the ground with its arrays as tensors; what is no array (clip ids, captions) stays."""
    return {name: to_tensor(value) if isinstance(value, np.ndarray) else value for name, value in batch.items()}


def put(parameter: Parameter, array: np.ndarray) -> None:
    """Write `array` into `parameter` in place, in its dtype, so that compiled graphs see it."""
    assert tuple(array.shape) == tuple(parameter.shape), (parameter.name, array.shape, parameter.shape)
    tensor = to_tensor(array, parameter.dtype)
    if parameter.dtype == ms.bfloat16:  # which a CPU cannot assign, but copy
        parameter.copy_(tensor)
    else:
        ops.assign(parameter, tensor)


def load_parameters(
    cell: nn.Cell, arrays: Iterable[tuple[str, np.ndarray | StoredTensor]], *, source: str, strict: bool = True
) -> None:
    """Fill the parameters of `cell`, which have the names of the checkpoint, one array at a time.

    Raises:
        UnfitError: wrong shapes or names that are unknown or double; if strict, also names that are missing. The cell
            is then unusable.
    """
    own = dict(cell.parameters_and_names())
    missing, wrong = dict.fromkeys(own), []
    for name, array in arrays:
        if name not in own:
            wrong.append(f"{name} is not in this model")
        elif tuple(array.shape) != tuple(own[name].shape):
            wrong.append(f"{name} is {list(array.shape)}, expected {list(own[name].shape)}")
        elif name not in missing:
            wrong.append(f"{name} comes twice")
        else:
            put(own[name], array[:])
        missing.pop(name, None)
    if strict:
        wrong += [f"{name} is missing" for name in missing]
    if wrong:
        raise UnfitError(
            f"{source} does not fit the model of its config in {len(wrong)} places: {'; '.join(wrong[:5])}"
            f"{'; …' if len(wrong) > 5 else ''}. Weights and config.json must be of one model."
        )
