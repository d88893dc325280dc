"""Safetensors files: named arrays and a header of strings, read one tensor at a time.

bfloat16 comes and goes as `ml_dtypes.bfloat16`, bit for bit. Files are read, not memory-mapped: a mapped
file that another process truncates kills this one with a bus error no handler can catch. What is written
here carries its own SHA-256 in the header, unless a manifest has it, because a flipped bit of a weight is
still a weight.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import RawIOBase
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (makes numpy, and through it safetensors, know "bfloat16")
import numpy as np
from safetensors import SafetensorError, safe_open

from cogvideox_factory.errors import MissingError, StorageError, UnfitError

_NAMES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64",
    "int32": "I32", "int16": "I16", "int8": "I8", "uint64": "U64",
    "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_DTYPES = {theirs: np.dtype(ours) for ours, theirs in _NAMES.items()}


_DIGEST = "cogvideox_factory.sha256"
_BLANK = "0" * 64
_BLOCK = 2**22
_MAX_HEADER = 16_000_000
"""Bytes: some hundred thousand tensors."""


class TensorFile:
    """An open safetensors file."""

    def __init__(self, path: Path, handle: Any):
        self.path = path
        self.metadata: dict[str, str] = handle.metadata() or {}
        self.digest = self.metadata.pop(_DIGEST, None)
        """What its bytes were when it was written, if it was written here."""
        self.names: list[str] = handle.offset_keys()
        """Tensor names in the order they lie in the file."""
        self._handle = handle

    def read(self, name: str) -> np.ndarray:
        """Read one tensor.

        Raises:
            UnfitError: a type nothing here computes with, such as float8; a file that changed meanwhile.
        """
        dtype = self._handle.get_slice(name).get_dtype()
        if dtype not in _NAMES.values():
            raise UnfitError(
                f"{self.path}: tensor {name!r} is of type {dtype}, which no CogVideoX model here is run in. "
                "Use the bfloat16 or float16 weights of that model."
            )
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise _unreadable(self.path, error) from error

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Read rows `start` to `stop` of one tensor, and no other bytes of it.

        Raises:
            UnfitError: as `read`.
        """
        # A slice of safetensors' own reads the whole tensor where the file is not mapped.
        data, entries = self._layout
        entry = entries.get(name)
        if entry is None or entry["dtype"] not in _DTYPES:
            return self.read(name)[start:stop]  # tells what is wrong
        array = np.empty((stop - start, *entry["shape"][1:]), _DTYPES[entry["dtype"]])
        if not array.size:
            return array
        first = data + entry["data_offsets"][0] + start * (array.nbytes // len(array))
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(first)
                whole = _read_into(file, array)
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if not whole:
            raise UnfitError(f"{self.path} was changed while it was read. Download or export it again.")
        return array

    @cached_property
    def _layout(self) -> tuple[int, dict[str, Any]]:
        """Where the data begins, and the header, which opening the file has checked."""
        with self.path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return 8 + size, json.loads(file.read(size))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return tuple(self._handle.get_slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """Return the type of a tensor without reading it.

        Raises:
            UnfitError: as `read`.
        """
        kind = self._handle.get_slice(name).get_dtype()
        return _DTYPES[kind] if kind in _DTYPES else self.read(name).dtype  # which tells what is wrong


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredTensor:
    """A tensor of an open file, read when it is asked for: `stored[a:b]` reads those rows, `stored[:]` all."""

    file: TensorFile
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of all of it."""
        return self.file.shape(self.name)

    def __getitem__(self, rows: slice) -> np.ndarray:
        if not self.shape:
            return self.file.read(self.name)
        start, stop, _ = rows.indices(self.shape[0])
        return self.file.read_rows(self.name, start, max(start, stop))


@dataclass(frozen=True, kw_only=True, slots=True)
class Deferred:
    """An array that is made when it is written, for files that are larger than memory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Its size in bytes."""
        return prod(self.shape) * self.dtype.itemsize


@contextmanager
def open_tensors(path: Path, *, verify: bool = True) -> Iterator[TensorFile]:
    """Open a safetensors file.

    Args:
        path: of the file.
        verify: read all of it first, if it carries a digest; off where someone else has.

    Raises:
        MissingError: no such file.
        UnfitError: truncated, damaged, or something else altogether; other bytes than the digest it carries.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingError(f"{path} does not exist.")
    _check_header(path)
    try:
        opened = safe_open(path, framework="np", backend="pread")
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    with opened as handle:
        file = TensorFile(path, handle)
        if verify and file.digest is not None and file.digest != _digest(path):
            raise UnfitError(
                f"{path} was changed or damaged after it was written: its bytes do not have the digest in its header. "
                "Copy or export it again."
            )
        yield file


def _check_header(path: Path) -> None:
    """Refuse a header that only an attack has: parsed, it would take many times its size."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
    if _MAX_HEADER < size <= path.stat().st_size:
        raise UnfitError(
            f"{path} has a header of {size:,} bytes; that of a model has less than {_MAX_HEADER:,}. Do not use it."
        )


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file with the digest in its header blanked."""
    with path.open("rb") as file:
        size = file.read(8)
        header = file.read(int.from_bytes(size, "little"))
        at = _place_of_digest(header)
        total = hashlib.sha256(size + header[:at] + _BLANK.encode() + header[at + len(_BLANK) :])
        while block := file.read(_BLOCK):
            total.update(block)
    return total.hexdigest()


def _place_of_digest(header: bytes) -> int:
    """Return where the digest begins; quotes inside other values are escaped, so its key is found only once."""
    key = f'"{_DIGEST}":"'.encode()
    return header.find(key) + len(key)


def _read_into(file: RawIOBase, array: np.ndarray) -> bool:
    """Fill `array` from where `file` is, or return False; one call reads at most 2 GiB."""
    view = array.reshape(-1).view(np.uint8).data
    while view and (count := file.readinto(view)):
        view = view[count:]
    return not view


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
        return f"it is damaged or cut off ({size} bytes do not match its header). Download or export it again."
    return "it is no safetensors file. Download or export it again."


def narrowed(array: np.ndarray, dtype: np.dtype, *, what: str) -> np.ndarray:
    """Return `array` in `dtype`, itself if it is in it already.

    Raises:
        UnfitError: a number that float16 cannot hold; `what` says where.
    """
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):  # told below
        result = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(result).all() and np.isfinite(array).all():
        raise UnfitError(f"{what} has numbers beyond 65504, which float16 cannot hold. Use --dtype bfloat16.")
    return result


def save_tensors(
    path: Path,
    arrays: Mapping[str, np.ndarray | Deferred],
    *,
    metadata: Mapping[str, str] | None = None,
    seal: bool = True,
) -> None:
    """Write a safetensors file in place; publish it through `publish_file` or `publish_folder`.

    The header says `format: pt` unless `metadata` says otherwise: readers refuse a file that does not name
    its format. The same arguments give the same bytes (the safetensors library itself shuffles the
    metadata).

    Args:
        path: of the file.
        arrays: by name.
        metadata: strings for the header.
        seal: write the digest into the header; off for files that a manifest beside them has the digests of.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    # Wide types first, so that every tensor starts at a multiple of its item size.
    order = sorted(arrays, key=lambda name: (-arrays[name].dtype.itemsize, name))
    described = {"format": "pt", **(metadata or {})} | ({_DIGEST: _BLANK} if seal else {})
    header: dict[str, Any] = {"__metadata__": dict(sorted(described.items()))}
    start = 0
    for name in order:
        array = arrays[name]
        assert array.dtype.name in _NAMES, f"{name} is of type {array.dtype}"
        stop = start + array.nbytes
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": array.shape,
            "data_offsets": (start, stop),
        }
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    total = hashlib.sha256() if seal else None
    try:
        with Path(path).open("wb") as file:
            for part in [len(text).to_bytes(8, "little") + text, *(arrays[name] for name in order)]:
                part = part.make() if isinstance(part, Deferred) else part
                data = part if isinstance(part, bytes) else _little_endian_bytes(part)
                if total:
                    total.update(data)
                file.write(data)
            if total:
                file.seek(8 + _place_of_digest(text))
                file.write(total.hexdigest().encode())
    except OSError as error:
        raise StorageError(
            f"could not write {path}: {error.strerror or error}. Make room or choose another folder."
        ) from error


def _little_endian_bytes(array: np.ndarray) -> memoryview:
    native = array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
    assert sys.byteorder == "little"
    return np.ascontiguousarray(native).reshape(-1).view(np.uint8).data
