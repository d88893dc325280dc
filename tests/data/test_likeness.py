import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.likeness import SIDE, distances, near_groups, perceptual_hash

GREY = np.full(3, 128.0)


def scene(seed: int) -> np.ndarray:
    """A smooth random picture, float [SIDE, SIDE] from 0 to 255."""
    coarse = np.random.default_rng(seed).random((5, 5)) * 255
    places = np.linspace(0, 4, SIDE)
    rows = np.stack([np.interp(places, range(5), column) for column in coarse.T], axis=1)
    return np.stack([np.interp(places, range(5), row) for row in rows])


def slow_groups(hashes, colours, max_bits, max_colour):
    """The same grouping, bit by bit: the oracle."""
    taken, groups = set(), []
    for i in range(len(hashes)):
        if i in taken:
            continue
        near = [
            j
            for j in range(i + 1, len(hashes))
            if j not in taken
            and sum(bin(int(a) ^ int(b)).count("1") for a, b in zip(hashes[i], hashes[j])) <= max_bits
            and max(abs(a - b) for a, b in zip(colours[i], colours[j])) <= max_colour
        ]
        if near:
            groups.append([i, *near])
            taken |= {i, *near}
    return groups


@given(st.data(), st.integers(0, 30), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_groups_equal_a_slow_oracle_and_share_no_member(data, count, max_bits):
    few_bits = st.integers(0, 2**6 - 1)
    hashes = np.array([[data.draw(few_bits), data.draw(few_bits)] for _ in range(count)], np.uint64).reshape(-1, 2)
    colours = np.array([[data.draw(st.integers(0, 60))] * 3 for _ in range(count)], float).reshape(-1, 3)
    groups = near_groups(hashes, colours, max_bits=max_bits, max_colour=32)
    assert groups == slow_groups(hashes, colours, max_bits, 32)
    members = [place for group in groups for place in group]
    assert len(members) == len(set(members))


@pytest.mark.parametrize("seed", range(20))
def test_a_picture_keeps_its_hash_through_mild_changes_and_another_has_its_own(seed):
    rng = np.random.default_rng(seed)
    picture = scene(seed)
    changed = [picture * 0.8, picture * 0.9 + 20, picture + rng.normal(0, 3, picture.shape)]
    own, *others = perceptual_hash(np.stack([picture, *changed, picture[:, ::-1], scene(seed + 100)]))
    bits = distances(np.array([own]), np.array(others)[:, None])
    assert bits[:3].max() <= 8  # the limit is 24 for three pictures
    assert bits[3:].min() >= 12


def test_plain_pictures_hash_to_nothing_rather_than_to_their_grain():
    grain = np.random.default_rng(0).normal(0, 0.5, (4, SIDE, SIDE))
    assert perceptual_hash(100 + grain).tolist() == [0] * 4


def test_plain_pictures_of_other_colours_are_not_alike():
    hashes = np.zeros((3, 3), np.uint64)
    assert near_groups(hashes, np.array([[200.0, 0, 0], [0, 0, 200.0], [200.0, 10, 0]])) == [[0, 2]]


def test_a_drift_does_not_chain_strangers():
    """Each is one bit from the next; only what is near the leader joins it."""
    hashes = np.array([[2**n - 1] for n in range(9)], np.uint64)
    assert near_groups(hashes, np.tile(GREY, (9, 1)), max_bits=2) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_many_copies_cost_one_comparison_each():
    """All alike: the first pass takes everybody."""
    (group,) = near_groups(np.zeros((20_000, 3), np.uint64), np.zeros((20_000, 3)))
    assert len(group) == 20_000
