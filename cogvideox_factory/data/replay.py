"""A batch on disk, as the loader made it, so that a step can be looked at again without the data set.

Arrays keep their bits; lists (clip ids, captions) lie in the header.
"""

import json
from pathlib import Path

import numpy as np

from cogvideox_factory.data.loader import Batch
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.json_object import parse_object
from cogvideox_factory.publish import publish_file
from cogvideox_factory.tensors import open_tensors, save_tensors


def write_batch(path: Path, batch: Batch) -> None:
    """Write `batch` as a safetensors file, complete or not at all.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    arrays = {key: value for key, value in batch.items() if isinstance(value, np.ndarray)}
    lists = {key: value for key, value in batch.items() if not isinstance(value, np.ndarray)}
    with publish_file(path) as temporary:
        save_tensors(temporary, arrays, metadata={"lists": json.dumps(lists)})


def read_batch(path: Path) -> Batch:
    """Return what `write_batch` wrote.

    Raises:
        MissingError: no such file.
        UnfitError: damaged, or no batch.
    """
    kept = "Batches that training kept lie in RUN/replay/."
    with open_tensors(path) as file:
        if "lists" not in file.metadata:
            raise UnfitError(f"{path} has no `lists` in its header. {kept}")
        lists = parse_object(file.metadata["lists"], source=f"{path}: `lists` in its header", way_out=kept)
        return {name: file.read(name) for name in file.names} | lists
