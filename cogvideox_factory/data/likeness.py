"""Finding clips that look alike without being the same bytes: a perceptual hash and a comparison of all with all.

The hash is Zauner's DCT hash ("Implementation and Benchmarking of Perceptual Image Hash Functions", 2010, section
3.2.1): the signs of a picture's lowest frequencies about their median. It survives another size, another encoder and
mild changes of brightness; it does not survive mirroring, another crop of the picture or another part of the video.
"""

import numpy as np

SIDE = 32
"""Pixels a side of the grey picture that is hashed."""
MAX_BITS = 24
"""Bits of the 189 of three frames that may differ in clips called alike."""
MAX_COLOUR = 48.0
"""Levels of 255 by which the mean colour of any part of the picture may differ in clips called alike."""

_KEPT = 8
# A wave of amplitude a over the whole picture has the coefficient a * SIDE / 2. Below half a grey level it is noise:
# plain pictures hash to 0, not to their grain.
_FLOOR = 0.5 * SIDE / 2
# DCT-II, orthonormal, lowest frequencies only: [_KEPT, SIDE].
_DCT = np.sqrt(2 / SIDE) * np.cos(np.pi / SIDE * np.arange(_KEPT)[:, None] * (np.arange(SIDE) + 0.5))
_DCT[0] /= np.sqrt(2)


def perceptual_hash(grey: np.ndarray) -> np.ndarray:
    """Return one 63-bit hash a picture, uint64 [N], of grey pictures [N, SIDE, SIDE] in levels from 0 to 255."""
    assert grey.shape[1:] == (SIDE, SIDE), grey.shape
    low = (_DCT @ grey.astype(np.float64) @ _DCT.T).reshape(len(grey), -1)[:, 1:]  # [N, 63]; the mean is left out
    bits = low > np.median(low, axis=1, keepdims=True) + _FLOOR
    return bits.astype(np.uint64) @ (np.uint64(1) << np.arange(bits.shape[1], dtype=np.uint64))


def distances(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return in how many bits `one`, uint64 [K], differs from each of `others`, uint64 [N, K]: int64 [N]."""
    return np.bitwise_count(others ^ one).sum(axis=1, dtype=np.int64)


def near_groups(
    hashes: np.ndarray, colours: np.ndarray, *, max_bits: int = MAX_BITS, max_colour: float = MAX_COLOUR
) -> list[list[int]]:
    """Group what looks alike; return groups of two or more places, each led by the first of its members.

    A group is its leader and all later clips, not yet in a group, that are near the leader. Members are never compared
    with each other, so a slow drift through many clips cannot chain the first to the last. One vectorised comparison a
    clip; a group's members are compared with no one again.

    Args:
        hashes: uint64 [N, K], K hashed frames a clip.
        colours: mean colours of C parts of the pictures, [N, C] in levels from 0 to 255; plain pictures, and the same
            shape in another colour, differ in nothing else.
        max_bits: most bits of all K hashes together in which clips called alike differ.
        max_colour: most levels by which any of the C means differs.
    """
    groups = []
    is_free = np.ones(len(hashes), bool)
    first = np.ascontiguousarray(hashes[:, 0])  # alone it leaves few to compare in full
    for leader in range(len(hashes) - 1):
        if not is_free[leader]:
            continue
        near = leader + 1 + np.flatnonzero(np.bitwise_count(first[leader + 1 :] ^ first[leader]) <= max_bits)
        near = near[is_free[near]]
        near = near[distances(hashes[leader], hashes[near]) <= max_bits]
        near = near[np.abs(colours[near].astype(np.float32) - colours[leader]).max(axis=1) <= max_colour]
        if len(near):
            groups.append([leader, *near.tolist()])
            is_free[near] = False
    return groups
