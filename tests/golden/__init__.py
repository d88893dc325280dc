"""What both engines are held to: inputs and weights by arithmetic, and what the PyTorch engine made of them, in files.

`python -m tests.golden`, where torch is installed, writes the files again. Of a large tensor a record is kept: its
norm, its largest entry and entries evenly spread over it.
"""

from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

FOLDER = Path(__file__).parent


def record(array: np.ndarray, count: int = 32) -> np.ndarray:
    """Return float32 [2 + count]: norm, largest entry, and `count` entries spread from the first to the last."""
    flat = np.asarray(array, np.float64).reshape(-1)
    places = np.linspace(0, flat.size - 1, count).round().astype(int)
    return np.concatenate([[np.linalg.norm(flat), np.abs(flat).max()], flat[places]]).astype(np.float32)


def golden(name: str) -> dict[str, np.ndarray]:
    """Return the records of one file."""
    return load_file(FOLDER / f"{name}.safetensors")


def difference(ours: np.ndarray, expected: np.ndarray, *, floor: float = 0.0) -> float:
    """Return by how much a record differs from the expected one, in parts of its largest entry or of `floor`.

    The norm may differ by as many parts of itself.
    """
    entries = np.abs(ours[1:] - expected[1:]).max() / max(expected[1], floor)
    norm = abs(ours[0] - expected[0]) / max(expected[0], floor)
    return float(max(entries, norm))


def error(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the `difference` of the record of `found`."""
    return difference(record(found, len(expected) - 2), expected)


def worst(found: dict[str, np.ndarray], expected: np.ndarray) -> float:
    """Return the largest `difference` of gradients by name, whose records `expected` has in the order of names.

    What is nearly zero beside the others (nothing depends on the bias of k's norm without rotation) has a floor.
    """
    assert len(found) == len(expected)
    floor = 1e-3 * expected[:, 1].max()
    names = sorted(found)
    return max(difference(record(found[name]), row, floor=floor) for name, row in zip(names, expected))
