"""Shares of weights, without other processes: what each reads of a checkpoint makes the whole."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import numpy as np
from mindspore import Parameter

from cogvideox_factory.mindspore_engine import sharding
from cogvideox_factory.mindspore_engine.border import Rows, put_own, to_array, to_tensor
from cogvideox_factory.mindspore_engine.collectives import Group
from cogvideox_factory.mindspore_engine.ranks import Ranks
from cogvideox_factory.mindspore_engine.sharding import Division
from cogvideox_factory.ranks import Layout
from tests.golden.cases import normal

SHAPES = {"b": (7, 3), "a": (5,), "c": (1, 11, 2), "d": (2, 2)}


def division_of(size: int, rank: int, zero: int) -> Division:
    weights = [Parameter(to_tensor(normal(name, shape=shape)), name=name) for name, shape in SHAPES.items()]
    group = Group(members=tuple(range(size)), index=rank, world=size)
    return Division(weights, Ranks(layout=Layout(size=size, zero=zero), rank=rank, everyone=group))


class Read:
    """Rows of an array, and which were asked for."""

    def __init__(self, array: np.ndarray) -> None:
        self.array, self.num_rows = array, 0

    def __getitem__(self, rows: slice) -> np.ndarray:
        self.num_rows += len(self.array[rows])
        return self.array[rows]


@pytest.mark.parametrize("size", [2, 3, 40])
@pytest.mark.parametrize("bucket_size", [10, 10**6])
def test_shares_of_all_processes_make_the_weights_and_no_other_rows_are_read(size, bucket_size, monkeypatch):
    monkeypatch.setattr(sharding, "BUCKET_SIZE", bucket_size)
    shares, num_rows = [], 0
    for rank in range(size):
        reads = {name: Read(normal(name, shape=shape)) for name, shape in SHAPES.items()}
        division = division_of(size, rank, zero=2)
        shares.append([bucket.share_of(reads.__getitem__) for bucket in division.buckets])
        num_rows += sum(read.num_rows for read in reads.values())
    names = [[weight.name for weight in bucket.weights] for bucket in division.buckets]
    assert names == ([["a"], ["b"], ["c"], ["d"]] if bucket_size == 10 else [["a", "b", "c", "d"]])
    for index, bucket in enumerate(names):
        expected = np.concatenate([normal(name, shape=SHAPES[name]).reshape(-1) for name in bucket])
        found = np.concatenate([share[index] for share in shares])
        assert np.array_equal(found[: len(expected)], expected)
        assert not found[len(expected) :].any()
    cuts = (size - 1) * len(names)  # a row through which a cut goes is read twice, one that many go through more often
    assert num_rows <= sum(shape[0] for shape in SHAPES.values()) + cuts


def test_without_a_stage_every_weight_is_its_own():
    division = division_of(2, 1, zero=0)
    assert [weight.name for weight in division.weights] == list(SHAPES)
    assert not division.buckets


@pytest.mark.parametrize("size", [2, 3, 7, 9])
def test_rows_of_all_processes_make_the_weight(size):
    weight, held = normal("weight", shape=(7, 3)), []
    for rank in range(size):
        rows = Rows(total=7, group=Group(members=tuple(range(size)), index=rank, world=size))
        parameter = Parameter(to_tensor(np.ones((rows.held, 3), np.float32)), name="weight")
        put_own(parameter, weight, rows)
        held.append(to_array(parameter))
    assert np.array_equal(np.concatenate(held)[:7], weight)
    assert not np.concatenate(held)[7:].any()
