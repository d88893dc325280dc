"""Every random number of the factory, as a pure function of where it is used.

A draw is keyed by (seed, purpose, coordinates), never by the order of calls. So the numbers are the same
for any number of ranks and workers, sequence-parallel peers agree without a broadcast, and resuming means
"start at step N".

Philox is counter-based: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

import hashlib
from operator import index

import numpy as np


def generator(seed: int, purpose: str, *coordinates: int | str) -> np.random.Generator:
    """Return the generator for `purpose` at `coordinates` (step, epoch, clip id, …)."""
    text = "\x1f".join([str(index(seed)), purpose, *(_spell(c) for c in coordinates)])
    key = hashlib.sha256(text.encode()).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(key[:16], dtype="<u8")))


def _spell(coordinate: int | str) -> str:
    # A numpy integer must give the draw of the equal int; a step 1 and a clip called "1" must differ.
    return f"str:{coordinate}" if isinstance(coordinate, str) else f"int:{index(coordinate)}"


def normal(seed: int, purpose: str, *coordinates: int | str, shape: tuple[int, ...]) -> np.ndarray:
    """Return standard normal float32 of `shape`."""
    return generator(seed, purpose, *coordinates).standard_normal(shape, dtype=np.float32)
