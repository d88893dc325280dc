"""What processes tell one another, and send one another, whole runs and groups of them."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import numpy as np

from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.collectives import (
    AllToAll,
    GatherRows,
    GatherShards,
    Group,
    ReduceScatter,
    all_gather,
    all_reduce,
)
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.ranks import Ranks, join, make_ranks, num_processes
from cogvideox_factory.ranks import AgreedError, Layout
from tests.golden import cases
from tests.mindspore_engine.processes import run_in

pytestmark = pytest.mark.timeout(700)  # all that runs in many processes runs for the first test
SIZE = 4
MODES = {"pynative": Mode(), "graph": Mode(graph=True)}


def refusal(function) -> tuple[str, str, int, bool]:
    """Return which error `function()` raises, what it says, its exit code, and whether another process tells it."""
    try:
        function()
    except FactoryError as error:
        return type(error).__name__, str(error), error.exit_code, error.echoed
    raise AssertionError("nothing was refused")


def talk(ranks: Ranks) -> dict[str, object]:
    rank = ranks.rank

    def fails_in(guilty: int, error: Exception):
        if rank == guilty:
            raise error
        return rank

    return {
        "place": (rank, ranks.data_rank, ranks.leads, ranks.leads_video),
        "gathered": ranks.gather({"rank": rank, "text": "ü" * 100 * rank, "nothing": None}),
        "agreed": ranks.agree(f"from {rank}" if rank >= 2 else None),
        "nothing": ranks.agree(None),
        "mean": to_array(ranks.mean(to_tensor(np.float32([[rank, 1]])))).tolist(),
        "together": ranks.together(lambda: rank),
        "failed": refusal(lambda: ranks.together(lambda: fails_in(1, OSError("the disk is full")))),
        "led": ranks.from_lead(lambda: [rank, "told"]),
        "misled": refusal(lambda: ranks.from_lead(lambda: fails_in(0, UnfitError("a stranger")))),
        "agreement": ranks.require_agreement({"seed": 1}),
        "disagreement": refusal(lambda: ranks.require_agreement({"seed": rank // 2, "same": 1})),
    }


def drawn(rank: int, *shape: int) -> np.ndarray:
    return cases.normal("rank", rank, shape=shape)


def collectives(group: Group, rank: int, mode: Mode) -> dict[str, np.ndarray]:
    rows, heads = drawn(rank, 2, 3, 4, 5), drawn(rank, 2, 8, 2, 5)
    rows_to_heads, heads_to_rows = AllToAll(group, split=2, concat=1), AllToAll(group, split=1, concat=2)
    gather_rows, gather_shards, scatter = GatherRows(group), GatherShards(group), ReduceScatter(group)

    def run(rows, heads, weight_of_heads, weight_of_rows, weight_of_shards):
        there, back = rows_to_heads(rows), heads_to_rows(heads)
        whole, shards = gather_rows(rows), gather_shards(rows)
        loss = (there * weight_of_heads).sum() + (whole * weight_of_rows).sum() + (shards * weight_of_shards).sum()
        return loss, there, back, whole, shards, scatter(shards * weight_of_shards)

    weights = (drawn(9, 2, 3 * group.size, 4 // group.size, 5), drawn(8, 2, 3 * group.size, 4, 5),
               drawn(7, 2 * group.size, 3, 4, 5) * (1 + rank))  # fmt: skip
    function = mode.compiled(ms.value_and_grad(run, 0, has_aux=True))
    (_, *found), grad = function(*map(to_tensor, (rows, heads, *weights)))
    names = ("there", "back", "whole", "shards", "scattered", "grad")
    return dict(zip(names, map(to_array, (*found, grad)), strict=True))


def one_rank() -> dict[str, object]:
    found: dict[str, object] = {"talk": talk(join(Layout(size=SIZE, sequence=2)))}
    for size in (2, SIZE):
        ranks = make_ranks(Layout(size=SIZE, zero=3, replicas=SIZE // size))
        assert ranks.shards is not None
        for name, mode in MODES.items():
            found[f"{name} {size}"] = collectives(ranks.shards, ranks.rank, mode)
        x = to_tensor(np.float32([[ranks.rank]]))
        found[f"eager {size}"] = [to_array(f(x, ranks.shards)).tolist() for f in (all_reduce, all_gather)]
    found["layouts"] = refusal(lambda: make_ranks(Layout(size=SIZE, zero=1 + (ranks.rank == 3))))
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return run_in(SIZE, one_rank, folder=tmp_path_factory.mktemp("ranks"))


def test_what_one_has_all_have_and_what_fails_in_one_fails_in_all(results):
    for rank, result in enumerate(results):
        told = result["talk"]
        assert told["place"] == (rank, rank // 2, rank == 0, rank % 2 == 0)
        assert told["gathered"] == [{"rank": r, "text": "ü" * 100 * r, "nothing": None} for r in range(SIZE)]
        assert (told["agreed"], told["nothing"], told["together"]) == ("from 2", None, rank)
        assert told["mean"] == [[1.5, 1.0]]
        assert told["failed"] == (AgreedError.__name__, "the disk is full", 6, False)
        assert told["led"] == [0, "told"]
        assert told["misled"] == (UnfitError.__name__, "a stranger", 5, rank > 0)
        kind, text, _, echoed = told["disagreement"]
        assert (kind, echoed) == (FactoryError.__name__, rank > 0)
        assert "process 2 is not of the same run as process 0: seed is 1 there and 0 here." in text
        assert "process 3 is not of the same run as process 0: parallel.zero is 2 there and 1" in result["layouts"][1]


@pytest.mark.parametrize("size", [2, SIZE])
@pytest.mark.parametrize("mode", MODES)
def test_collectives_of_a_group_are_those_of_numpy(mode, size, results):
    for rank, result in enumerate(results):
        first = rank // size * size
        members, index, found = range(first, first + size), rank - first, result[f"{mode} {size}"]
        rows, heads = [drawn(r, 2, 3, 4, 5) for r in members], [drawn(r, 2, 8, 2, 5) for r in members]
        width = 4 // size
        own = slice(index * width, (index + 1) * width)
        assert np.array_equal(found["there"], np.concatenate([x[:, :, own] for x in rows], axis=1))
        taken = slice(index * (8 // size), (index + 1) * (8 // size))
        assert np.array_equal(found["back"], np.concatenate([x[:, taken] for x in heads], axis=2))
        assert np.array_equal(found["whole"], np.concatenate(rows, axis=1))
        assert np.array_equal(found["shards"], np.concatenate(rows))
        # What every process does with the shards adds up; with rows all do the same, and one's own count.
        weight, part = drawn(7, 2 * size, 3, 4, 5), slice(2 * index, 2 * index + 2)
        factors = sum(1 + r for r in members)
        np.testing.assert_allclose(found["scattered"], (rows[index] * weight[part]) * factors, rtol=1e-5, atol=1e-5)
        of_heads = np.concatenate(
            [x[:, 3 * index : 3 * index + 3] for x in [drawn(9, 2, 3 * size, width, 5)] * size], 2
        )
        of_rows = drawn(8, 2, 3 * size, 4, 5)[:, 3 * index : 3 * index + 3]
        expected = of_heads + of_rows + weight[part] * factors
        np.testing.assert_allclose(found["grad"], expected, rtol=1e-5, atol=1e-5)
        assert result[f"eager {size}"] == [[[float(sum(members))]], [[float(r)] for r in members]]


def test_torchrun_cannot_start_it(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(FactoryError, match=r"2 processes were started by torchrun.*msrun --worker_num 2"):
        num_processes()
    monkeypatch.setenv("MS_WORKER_NUM", "2")
    assert num_processes() == 2


def test_one_process_has_nobody_to_talk_to():
    ranks = Ranks(layout=Layout())
    with pytest.raises(DataError, match="here"):
        ranks.from_lead(lambda: (_ for _ in ()).throw(DataError("here")))
    assert (ranks.leads, ranks.data_rank, ranks.gather(3), ranks.agree(None)) == (True, 0, [3], None)
