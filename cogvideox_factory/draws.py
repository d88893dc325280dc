"""Every random number of the factory, as a pure function of where it is used.

A draw is keyed by (seed, purpose, coordinates), never by the order of calls. So the numbers are the same
for any number of ranks and workers, sequence-parallel peers agree without a broadcast, and resuming means
"start at step N".

Philox is counter-based: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
from operator import index
from typing import Any

import numpy as np


class _Key(np.random.bit_generator.ISeedSequence):
    """The key of a Philox, given as a seed: beside one given as a key, numpy would gather entropy for nothing."""

    def __init__(self, key: bytes) -> None:
        self._words = np.frombuffer(key, dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        assert (n_words, np.dtype(dtype)) == (2, self._words.dtype)
        return self._words


def generator(seed: int, purpose: str, *coordinates: int | str) -> np.random.Generator:
    """Return the generator for `purpose` at `coordinates` (step, epoch, clip id, …)."""
    text = "\x1f".join([str(index(seed)), purpose, *(_spell(c) for c in coordinates)])
    key = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(_Key(key[:16])))  # pyright: ignore[reportArgumentType]


def _spell(coordinate: int | str) -> str:
    # A numpy integer must give the draw of the equal int; a step 1 and a clip called "1" must differ.
    return f"str:{coordinate}" if isinstance(coordinate, str) else f"int:{index(coordinate)}"


def normal(seed: int, purpose: str, *coordinates: int | str, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 of `shape`."""
    return generator(seed, purpose, *coordinates).standard_normal(shape, dtype=np.float32)
