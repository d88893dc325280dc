"""One cache entry: a safetensors file that says what it is and carries its own checksum.

The layout is safetensors' (an 8-byte header length, a JSON header, the arrays), so any safetensors reader
opens it. Reading goes through one `read` into memory we own, and arrays are views of it: no copy, and no
memory map, which would kill the process when a file is cut behind its back. bfloat16 comes as
`ml_dtypes.bfloat16`.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.publish import publish_file

_DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 1_000_000
_USUAL_HEADER = 2048
_CHECKSUM = "checksum"
_MEND = "Remove it and run prepare again: only what is missing is made."


@dataclass(frozen=True, kw_only=True, slots=True)
class Header:
    """What an entry says of itself."""

    shapes: dict[str, tuple[int, ...]]
    metadata: dict[str, str]
    offset: int
    """Byte at which the arrays start."""
    specs: dict[str, dict[str, Any]]

    @property
    def checksum(self) -> str:
        """SHA-256 over the metadata, the array layout and the arrays."""
        return self.metadata.get(_CHECKSUM, "")


def write_entry(path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> str:
    """Write `arrays` atomically with `metadata` and a checksum; return the checksum.

    Raises:
        StorageError: the disk is full or cannot be written.
    """
    specs: dict[str, dict[str, Any]] = {}
    position = 0
    data = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    for name, array in data.items():
        end = position + array.nbytes
        specs[name] = {
            "dtype": _NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    digest = _digest(specs, metadata)
    for array in data.values():
        digest.update(_bytes(array))
    checksum = digest.hexdigest()
    header = json.dumps({"__metadata__": {**metadata, _CHECKSUM: checksum}, **specs}, sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    with publish_file(path) as temporary, temporary.open("wb") as file:
        file.write(len(header).to_bytes(8, "little"))
        file.write(header)
        for array in data.values():
            file.write(_bytes(array))
    return checksum


def _digest(specs: Mapping[str, Any], metadata: Mapping[str, str]) -> Any:
    described = {key: value for key, value in metadata.items() if key != _CHECKSUM}
    return hashlib.sha256(json.dumps([described, specs], sort_keys=True).encode())


def _bytes(array: np.ndarray) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


def read_header(path: Path) -> Header:
    """Read and check an entry's header and the file's size.

    Raises:
        UnfitError: missing, cut, or no entry of ours.
    """
    with _opened(path, buffering=_USUAL_HEADER) as file:  # one read fetches most headers whole
        return _header(path, file)


@contextmanager
def _opened(path: Path, *, buffering: int = -1) -> Iterator[BinaryIO]:
    try:
        with open(path, "rb", buffering=buffering) as file:
            yield file
    except OSError as error:
        raise UnfitError(f"{path} cannot be read: {error.strerror}. {_MEND}") from error


def _header(path: Path, file: BinaryIO) -> Header:
    size = os.fstat(file.fileno()).st_size
    head = file.read(8)
    length = int.from_bytes(head, "little")
    if len(head) < 8 or length > min(_MAX_HEADER, size - 8):
        raise UnfitError(f"{path} is no cache entry or was cut off. {_MEND}")
    return _parse(path, file.read(length), size)


def _parse(path: Path, header: bytes, size: int) -> Header:
    offset = 8 + len(header)
    try:
        specs = json.loads(header)
        metadata = specs.pop("__metadata__")
        end = 0
        for spec in sorted(specs.values(), key=lambda spec: spec["data_offsets"]):
            if not all(isinstance(number, int) and number >= 0 for number in spec["shape"]):
                raise ValueError("a shape is no list of sizes")
            count = prod(spec["shape"]) * _DTYPES[spec["dtype"]].itemsize
            if spec["data_offsets"] != [end, end + count]:
                raise ValueError("arrays overlap or leave gaps")
            end += count
        shapes = {name: tuple(spec["shape"]) for name, spec in specs.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnfitError(f"{path} has a damaged header ({error}). {_MEND}") from error
    if offset + end != size:
        raise UnfitError(f"{path} has {size} bytes and should have {offset + end}. {_MEND}")
    return Header(shapes=shapes, metadata=metadata, offset=offset, specs=specs)


def read_entry(path: Path, *, verify: bool = False) -> tuple[dict[str, np.ndarray], Header]:
    """Return the arrays of an entry (views of one buffer) and its header.

    Args:
        path: the entry.
        verify: also compute the checksum (about 1.8 GB/s a core).

    Raises:
        UnfitError: missing, cut or damaged.
    """
    with _opened(path) as file:
        header = _header(path, file)
        file.seek(0)
        data = np.fromfile(file, dtype=np.uint8)
    arrays = {}
    for name, spec in header.specs.items():
        start, end = (header.offset + place for place in spec["data_offsets"])
        if end > len(data):
            raise UnfitError(f"{path} was cut off while it was read. {_MEND}")
        arrays[name] = data[start:end].view(_DTYPES[spec["dtype"]]).reshape(spec["shape"])
    if verify:
        digest = _digest(header.specs, header.metadata)
        digest.update(_bytes(data[header.offset :]))
        if digest.hexdigest() != header.checksum:
            raise UnfitError(f"{path} is damaged: its checksum differs. {_MEND}")
    return arrays, header
