"""Arrays on the ground become tensors in this engine, and back.

Every dtype crosses bit for bit; bfloat16 is `ml_dtypes.bfloat16` on the ground. Weights change in place: a
compiled graph keeps the memory it was compiled with, and would not see a parameter that was given another.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.mindspore_engine.collectives import Group, all_gather
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
    put_tensor(parameter, to_tensor(array))


def put_tensor(parameter: Parameter, tensor: Tensor) -> None:
    """Write a `tensor` of its shape into `parameter` in place, in its dtype."""
    if parameter.dtype == ms.bfloat16:  # which a CPU cannot assign, but copy
        parameter.copy_(tensor.astype(parameter.dtype))
    else:
        ops.assign(parameter, tensor.astype(parameter.dtype))


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """How the rows of a weight are divided: equally many each, where the last processes have zeros for want of rows."""

    total: int
    """Rows of the whole weight."""
    group: Group
    """The processes that divide it."""

    @property
    def held(self) -> int:
        """Rows of a process, zeros among them."""
        return -(-self.total // self.group.size)

    @property
    def own(self) -> slice:
        """Those of the whole weight that this process holds."""
        start = min(self.group.index * self.held, self.total)
        return slice(start, min(start + self.held, self.total))


def rows_of(parameter: Parameter) -> Rows | None:
    """Return how a weight is divided, None if this process holds all of it."""
    return getattr(parameter, "rows", None)


def whole_shape(parameter: Parameter) -> tuple[int, ...]:
    """Return the shape of a weight, all rows of it."""
    rows, shape = rows_of(parameter), tuple(parameter.shape)
    return shape if rows is None else (rows.total, *shape[1:])


def put_own(parameter: Parameter, array: np.ndarray | StoredTensor, rows: Rows | None) -> None:
    """Write what this process holds of a whole `array` into `parameter`, in place; no other rows are read."""
    if rows is None:
        put(parameter, array[:])
        return
    own = array[rows.own]
    put(parameter, np.pad(own, [(0, rows.held - len(own))] + [(0, 0)] * (own.ndim - 1)))


def whole_array(parameter: Parameter, rows: Rows | None) -> np.ndarray:
    """Return a copy of all rows of `parameter`; the processes that divide it call this at the same point."""
    return to_array(parameter) if rows is None else to_array(all_gather(parameter, rows.group))[: rows.total]


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
        elif tuple(array.shape) != whole_shape(own[name]):
            wrong.append(f"{name} is {list(array.shape)}, expected {list(whole_shape(own[name]))}")
        elif name not in missing:
            wrong.append(f"{name} comes twice")
        else:
            put_own(own[name], array, rows_of(own[name]))
        missing.pop(name, None)
    if strict:
        wrong += [f"{name} is missing" for name in missing]
    if wrong:
        raise UnfitError(
            f"{source} does not fit the model of its config in {len(wrong)} places: {'; '.join(wrong[:5])}"
            f"{'; …' if len(wrong) > 5 else ''}. Weights and config.json must be of one model."
        )
