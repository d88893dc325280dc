"""Safetensors files: named arrays and a header of strings, read one tensor at a time.

bfloat16 comes and goes as `ml_dtypes.bfloat16`, bit for bit. Files are read, not memory-mapped: a mapped
file that another process truncates kills this one with a bus error no handler can catch.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy, and through it safetensors, know "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from cogvideox_factory.errors import MissingError, StorageError, UnfitError

_READABLE = frozenset(
    ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8", "BOOL")
)


class TensorFile:
    """An open safetensors file."""

    def __init__(self, path: Path, handle: Any):
        self.path = path
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.names: list[str] = handle.offset_keys()
        """Tensor names in the order they lie in the file."""
        self._handle = handle

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
            UnfitError: a type nothing here computes with, such as float8; a file that changed meanwhile.
        """
        dtype = self._handle.get_slice(name).get_dtype()
        if dtype not in _READABLE:
            raise UnfitError(
                f"{self.path}: tensor {name!r} is of type {dtype}, which no CogVideoX model here is run in. "
                "Use the bfloat16 or float16 weights of that model."
            )
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Raises:
        MissingError: no such file.
        UnfitError: truncated, damaged, or something else altogether.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} does not exist.")
    try:
        opened = safe_open(path, framework="np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    with opened as handle:
        yield TensorFile(path, handle)


def _unreadable(path: Path, error: Exception) -> UnfitError:
    try:
        with path.open("rb") as file:
            return UnfitError(f"{path} cannot be read: {_what_it_is(file.read(64), path.stat().st_size)}")
    except OSError:
        return UnfitError(f"{path} cannot be read: {error}")


def _what_it_is(start: bytes, size: int) -> str:
    if size < 8:
        return f"it holds {size} bytes and no header. Download or export it again."
    if start.startswith(b"version https://git-lfs"):
        return "it is a git-lfs pointer, not the weights. Run `git lfs pull`, or `hf download` the model."
    header = int.from_bytes(start[:8], "little")
    if start[8:9] == b"{" and header > size - 8:
        return f"it is cut off ({size} bytes, the header alone says {header}). Download or export it again."
    if start[8:9] == b"{":
        return (
            f"it is damaged or cut off ({size} bytes do not match its header). Download or export it again."
        )
    return "it is no safetensors file. Download or export it again."


def save_tensors(
    path: Path, arrays: Mapping[str, np.ndarray], *, metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file in place; publish it through `publish_file` or `publish_folder`.

    The header says `format: pt` unless `metadata` says otherwise: readers refuse a file that does not name
    its format.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    ready = {name: np.asarray(array, order="C") for name, array in arrays.items()}
    try:
        save_file(ready, path, metadata={"format": "pt", **(metadata or {})})
    except SafetensorError as error:
        raise StorageError(f"could not write {path}: {error}. Make room or choose another folder.") from error
