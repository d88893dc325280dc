"""Loading and exporting a divided model: no process reads, or holds, more than its part."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.numpy import load_file

from cogvideox_factory import tensors, weights
from cogvideox_factory.errors import StorageError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import learner, lora, start
from cogvideox_factory.torch_engine.border import local, rows_of
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.processes import run_in

VARIANT = {"t2v": "cogvideox-2b", "i2v": "cogvideox1.5-5b-i2v"}
"""One with learned positions and a patch convolution, one with neither."""
CASES = [
    {"task": task, "method": method, "zero": zero}
    for task, method, zero in product(VARIANT, ("full", "lora", "drawn"), (0, 1, 2, 3))
]
SHARD_BYTES = 20_000


class Reads:
    """Counts what is read of weight files."""

    def __init__(self) -> None:
        self.total = self.largest = self.num_verified = 0
        original, digest = tensors._read_into, tensors._digest

        def counted(file, array):
            self.total += array.nbytes
            self.largest = max(self.largest, array.nbytes)
            return original(file, array)

        def counted_digest(path):
            self.num_verified += 1
            return digest(path)

        tensors._read_into, tensors._digest = counted, counted_digest


def plan_of(root: Path, *, task: str, method: str, **_) -> start.Plan:
    values: dict = {
        "task": task,
        "model": {"path": str(root / task)},
        "run": {"device": "cpu", "dtype": "float32"},
        "train": {"method": "lora" if method == "lora" else "full"},
    }
    if method == "drawn":
        values["model"]["transformer_config"] = str(root / task / "transformer" / "config.json")
    if method == "lora":
        values["lora"] = {"rank": 3, "alpha": 3.0, "use_dora": True}
    return start.make_plan(check(values, source="test"))


def load_each(root: Path) -> list[tuple[int, int, dict[str, tuple[int, np.ndarray]], int]]:
    """Load every case; return what this process has of each.

    (bytes read, largest read, {name: (first row, rows)}, files verified).
    """
    reads, found = Reads(), []
    for case in CASES:
        layout = Layout(size=torch.distributed.get_world_size(), zero=case["zero"])
        ranks = make_ranks(layout, num_heads=2, device_type="cpu")
        reads.total = reads.largest = reads.num_verified = 0
        model = learner.load_transformer(plan_of(root, **case), ranks)
        held = {name: (rows_of(t)[0], local(t.detach()).numpy()) for name, t in model.state_dict().items()}
        found.append((reads.total, reads.largest, held, reads.num_verified))
    return found


def export_each(root: Path, out: Path) -> None:
    """Export a divided model in small shards."""
    ranks = make_ranks(Layout(size=torch.distributed.get_world_size(), zero=3), num_heads=2, device_type="cpu")
    model = learner.load_transformer(plan_of(root, task="t2v", method="full"), ranks)
    learner.export(model, out, method="full", ranks=ranks, max_shard_bytes=SHARD_BYTES)
    written = weights.save_tensors
    if ranks.leads:

        def full(path, arrays, **options):
            if path.name.endswith("00002"):
                raise StorageError("the disk is full")
            written(path, arrays, **options)

        weights.save_tensors = full
    with pytest.raises(StorageError, match="the disk is full"):
        learner.export(model, out, method="full", ranks=ranks, max_shard_bytes=SHARD_BYTES)
    weights.save_tensors = written


def both(root: Path) -> list[tuple[int, int, dict[str, tuple[int, np.ndarray]], int]]:
    export_each(root, root / "run")
    return load_each(root)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory, tiny_model):
    """Everything that two processes do here, done once: (models, [per rank: per case])."""
    root = tmp_path_factory.mktemp("loading")
    for task, variant in VARIANT.items():
        (root / task).symlink_to(tiny_model(variant))
    return root, run_in(2, both, root, folder=root)


def file_of(root: Path, task: str) -> Path:
    return root / task / "transformer" / "diffusion_pytorch_model.safetensors"


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("number", range(len(CASES)), ids=["-".join(map(str, case.values())) for case in CASES])
def test_divided_weights_are_those_of_one_process(loaded, number):
    root, results = loaded
    case = CASES[number]
    if case["method"] == "drawn":
        alone = CogVideoXTransformer(plan_of(root, **case).model)
        alone.initialize(42)
    else:
        alone = CogVideoXTransformer(plan_of(root, **case).model)
        alone.load_arrays(load_file(file_of(root, case["task"])).items())
    if case["method"] == "lora":
        lora.add_lora(alone, rank=3, alpha=3, use_dora=True, seed=42)
    for name, tensor in alone.state_dict().items():
        pieces = [results[rank][number][2][name] for rank in range(2)]
        if case["zero"] == 0 or name.endswith("pos_embedding"):
            assert all(np.array_equal(rows, tensor.numpy()) for _, rows in pieces), name
        else:
            assert pieces[1][0] == len(pieces[0][1]), name
            assert np.array_equal(np.concatenate([rows for _, rows in pieces]), tensor.numpy()), name


def test_the_first_process_of_a_machine_alone_reads_all_to_verify(loaded):
    _, results = loaded
    for number, case in enumerate(CASES):
        assert [results[rank][number][3] for rank in range(2)] == [int(case["method"] != "drawn"), 0], case


@pytest.mark.parametrize("task", VARIANT)
def test_a_process_reads_its_own_rows_and_no_others(loaded, task):
    root, results = loaded
    arrays = load_file(file_of(root, task))
    whole = sum(array.nbytes for array in arrays.values())
    undivided = sum(array.nbytes for name, array in arrays.items() if name.endswith("pos_embedding"))
    for number, case in enumerate(CASES):
        if case["task"] != task:
            continue
        totals = [results[rank][number][0] for rank in range(2)]
        if case["method"] == "drawn":
            assert totals == [0, 0]
        elif case["zero"] == 0:
            assert totals == [whole, whole]
        else:
            assert sum(totals) == whole + undivided, "each row once, but for what is not divided"
            assert max(totals) < 0.6 * (whole - undivided) + undivided
            biggest = max(array.nbytes for name, array in arrays.items() if not name.endswith("pos_embedding"))
            assert max(results[rank][number][1] for rank in range(2)) <= max(biggest, undivided)


def test_a_divided_model_is_exported_in_shards_that_diffusers_loads(loaded):
    """And a later export that the disk has no room for, which both processes are told of, leaves it as it was."""
    root, _ = loaded
    folder = root / "run" / "final" / "transformer"
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 5
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    for path in shards:
        arrays = load_file(path)
        assert sum(array.nbytes for array in arrays.values()) <= SHARD_BYTES or len(arrays) == 1
        assert {index["weight_map"][name] for name in arrays} == {path.name}
    theirs = CogVideoXTransformer3DModel.from_pretrained(folder).state_dict()
    assert_equal({name: tensor.numpy() for name, tensor in theirs.items()}, load_file(file_of(root, "t2v")))


def test_an_export_holds_one_shard_at_a_time(tmp_path, tiny_model, monkeypatch):
    model = CogVideoXTransformer.from_folder(tiny_model("cogvideox-2b") / "transformer")
    alive = most = 0
    written = weights.save_tensors

    def counted():
        nonlocal alive, most
        for name, array in model.iterate_arrays():
            alive += array.nbytes
            most = max(most, alive)
            yield name, array

    def save(path, arrays, **options):
        nonlocal alive
        written(path, arrays, **options)
        alive -= sum(array.nbytes for array in arrays.values())

    monkeypatch.setattr(weights, "save_tensors", save)
    weights.save_folder(tmp_path, counted(), config=model.config.to_dict(), max_shard_bytes=SHARD_BYTES)
    largest = max(array.nbytes for array in model.to_arrays().values())
    assert alive == 0
    assert most <= max(SHARD_BYTES, largest) + largest, "a shard, and the tensor that no longer fitted"


def test_one_process_is_no_special_case(loaded):
    root, _ = loaded
    model = learner.load_transformer(plan_of(root, task="i2v", method="full"), Ranks(layout=Layout()))
    assert_equal(model.to_arrays(), load_file(file_of(root, "i2v")))
    assert all(parameter.requires_grad for parameter in model.parameters())
