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


def error(found: np.ndarray, expected: np.ndarray, *, floor: float = 0.0) -> float:
    """Return by how much the record of `found` differs from `expected`, in parts of the largest entry or of `floor`.

    The norm may differ by as many parts of itself.
    """
    ours = record(found, len(expected) - 2)
    entries = np.abs(ours[1:] - expected[1:]).max() / max(expected[1], floor)
    norm = abs(ours[0] - expected[0]) / max(expected[0], floor)
    return float(max(entries, norm))
