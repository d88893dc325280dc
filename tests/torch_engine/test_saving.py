"""Saving while training goes on: the same bytes, all or nothing, nothing lost and nothing hidden."""

import hashlib
import json
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from cogvideox_factory.checkpoints import (
    checkpoint_folder,
    digest,
    list_checkpoints,
    newest_checkpoint,
    verify_checkpoint,
)
from cogvideox_factory.errors import StorageError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import checkpoint
from cogvideox_factory.torch_engine.checkpoint import (
    load_checkpoint,
    own_parts,
    save_checkpoint,
)
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.saving import Saver
from tests.faults.boundaries import KILL_BEFORE, Boundaries
from tests.faults.trial import Verdict, in_child
from tests.torch_engine.processes import run_in

ALONE = Ranks(layout=Layout())
CPU = torch.device("cpu")


def tensors(fill: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((40, 3), fill),
        "model.h": torch.full((5,), fill, dtype=torch.bfloat16),
        "optimizer.step.w": torch.tensor(fill),
    }


def make_saver(run: Path, *, in_background: bool = True, ranks: Ranks = ALONE, wait_seconds: float = 60) -> Saver:
    return Saver(run, keep=2, ranks=ranks, device=CPU, in_background=in_background, wait_seconds=wait_seconds)


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def stored(run: Path, step: int) -> float:
    """Load checkpoint `step` and return what all of its tensors are full of."""
    target = tensors(0.0)
    load_checkpoint(checkpoint_folder(run, step), target)
    (value,) = {float(tensor.flatten()[0]) for tensor in target.values()}
    assert all((tensor == value).all() for tensor in target.values())
    return value


class Gate:
    """Holds every write back until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.open = threading.Event()
        original = checkpoint.save_tensors

        def held(*args, **kwargs):
            assert self.open.wait(60)
            original(*args, **kwargs)

        monkeypatch.setattr(checkpoint, "save_tensors", held)


def test_training_goes_on_while_a_checkpoint_of_its_step_is_written(tmp_path, monkeypatch, capsys):
    gate, saver, state = Gate(monkeypatch), make_saver(tmp_path), tensors(1.0)
    saver.save(1, state, {}, must=False)
    for tensor in state.values():
        tensor.fill_(9.0)
    assert saver.word is None
    saver.hear([saver.word])
    assert list_checkpoints(tmp_path) == []
    gate.open.set()
    saver.settle()
    assert stored(tmp_path, 1) == 1.0
    assert "checkpoint-000001 saved in" in capsys.readouterr().out
    assert not saver.is_busy


def test_a_written_checkpoint_is_committed_when_the_last_process_says_so(tmp_path):
    saver = make_saver(tmp_path)
    saver.save(1, tensors(1.0), {}, must=False)
    while (word := saver.word) is None:
        threading.Event().wait(0.01)
    saver.hear([word, None])
    assert list_checkpoints(tmp_path) == []
    saver.hear([word])
    assert list_checkpoints(tmp_path) == [1]


def test_the_next_save_waits_for_the_one_in_hand_and_the_old_ones_go_last(tmp_path, monkeypatch):
    saver = make_saver(tmp_path)
    for step in (1, 2):
        saver.save(step, tensors(step), {}, must=False)
    saver.settle()
    gate = Gate(monkeypatch)
    saver.save(3, tensors(3.0), {}, must=False)
    assert list_checkpoints(tmp_path) == [1, 2], "none goes before the next is complete"
    threading.Timer(0.1, gate.open.set).start()
    saver.save(4, tensors(4.0), {}, must=True)
    assert list_checkpoints(tmp_path) == [3, 4]
    assert (stored(tmp_path, 3), stored(tmp_path, 4)) == (3.0, 4.0)
    assert saver._buffers["model.w"].shape == (40, 3)


def test_what_is_on_the_host_already_is_copied_only_while_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideox_factory.torch_engine.saving.synchronize", lambda device: None)  # there is no card
    parts = own_parts(tensors(1.0))
    for in_background in (False, True):
        saver = Saver(
            tmp_path, keep=2, ranks=ALONE, device=torch.device("cuda"), in_background=in_background, wait_seconds=60
        )
        staged = saver._stage(parts)
        shared = [staged[name].tensor.data_ptr() == part.tensor.data_ptr() for name, part in parts.items()]
        assert shared == [not in_background] * len(parts)
        assert all(torch.equal(staged[name].tensor, part.tensor) for name, part in parts.items())


def test_background_and_plain_saves_are_the_same_bytes(tmp_path):
    for name, in_background in (("plain", False), ("behind", True)):
        saver = make_saver(tmp_path / name, in_background=in_background)
        for step in (1, 2):  # the second in buffers that were used before
            saver.save(step, tensors(step / 3), {"note": step}, must=False)
        saver.settle()
    for step in (1, 2):
        folders = [tmp_path / name / f"checkpoint-{step:06}" for name in ("plain", "behind")]
        assert hashes(folders[0]) == hashes(folders[1])


@pytest.mark.parametrize("in_background", [False, True])
def test_a_save_that_fails_is_said_at_the_next_step_and_the_old_one_stays(tmp_path, monkeypatch, capsys, in_background):
    saver = make_saver(tmp_path, in_background=in_background)
    saver.save(1, tensors(1.0), {}, must=True)

    def full(*args, **kwargs):
        raise StorageError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", full)
        saver.save(2, tensors(2.0), {}, must=False)
        saver.settle()
        assert "NOT SAVED at step 2, trying again at the next: the disk is full" in capsys.readouterr().out
        with pytest.raises(StorageError, match="the disk is full"):
            saver.save(3, tensors(3.0), {}, must=True)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"], "nothing half-written stays"
    saver.save(4, tensors(4.0), {}, must=True)
    assert list_checkpoints(tmp_path) == [1, 4]


def test_a_mistake_of_ours_in_the_thread_is_raised_where_it_is_seen(tmp_path, monkeypatch):
    def mistaken(*args, **kwargs):
        raise TypeError("ours")

    monkeypatch.setattr(checkpoint, "save_tensors", mistaken)
    saver = make_saver(tmp_path)
    saver.save(1, tensors(1.0), {}, must=False)
    with pytest.raises(TypeError, match="ours"):
        saver.settle()
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_hangs_ends_the_run(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = make_saver(tmp_path, wait_seconds=0.05)
    saver.save(1, tensors(1.0), {}, must=False)
    with pytest.raises(StorageError, match=r"process 0 still writes .*checkpoint-000001 after 0\.05 s; its disk hangs"):
        saver.settle()
    gate.open.set()


def test_a_run_that_is_given_up_leaves_nothing_of_the_save_in_hand(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    saver = make_saver(tmp_path)
    saver.save(1, tensors(1.0), {}, must=False)
    saver.close()
    assert list(tmp_path.iterdir()) == []
    gate.open.set()


def test_torch_reads_what_is_written_here(tmp_path):
    folder = save_checkpoint(tmp_path, 1, tensors(1 / 3), {}, keep=1)
    target = tensors(0.0) | {"optimizer.step.w": torch.zeros(1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(target, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert torch.equal(target["model.h"], tensors(1 / 3)["model.h"])
    assert torch.equal(target["optimizer.step.w"], torch.tensor([1 / 3]))


def test_checkpoints_of_before_this_writer_are_read(tmp_path):
    """Versions up to 2026-11-27 wrote by torch's DCP, and said less in state.json."""
    folder = tmp_path / "checkpoint-000001"
    state = tensors(1 / 3) | {"optimizer.step.w": torch.tensor([1 / 3])}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    old = {"format": 1, "step": 1, "tensors": sorted(state), "identity": {}, "scalars": {}, "versions": {}}
    (folder / "state.json").write_text(json.dumps(old))
    (folder / "MANIFEST.json").write_text(json.dumps({path.name: digest(path) for path in folder.iterdir()}))
    target = tensors(0.0)
    assert load_checkpoint(folder, target) == old
    for name, tensor in tensors(1 / 3).items():
        assert torch.equal(target[name], tensor), name


def _save_second(run: Path, boundaries: Boundaries) -> list[str]:
    boundaries.install()
    saver = make_saver(run)
    saver.save(2, tensors(2.0), {}, must=False)
    saver.settle(must=True)
    return boundaries.seen


def test_killed_at_any_point_of_a_background_save_the_old_one_stays(tmp_path):
    save_checkpoint(tmp_path / "start", 1, tensors(1.0), {}, keep=2)
    folder = shutil.copytree(tmp_path / "start", tmp_path / "counted")
    counted = in_child(_save_second, folder, Boundaries(folder))
    assert counted.exit_code == 0, counted.output
    assert len(counted.value) >= 12, counted.value
    for number in range(len(counted.value)):
        run = shutil.copytree(tmp_path / "start", tmp_path / f"killed-{number}")
        ended = in_child(_save_second, run, Boundaries(run, number, KILL_BEFORE))
        assert ended.broke == Verdict.CRASH, counted.value[number]
        assert ended.signal == 9
        assert stored(run, 1) == 1.0, counted.value[number]
        newest, problems = newest_checkpoint(run)
        assert not problems, counted.value[number]
        assert newest is not None
        assert stored(run, int(newest.name[-6:])) == float(newest.name[-6:])


# --- several processes ------------------------------------------------------------------------------------------------

LAYOUTS = [{"zero": 0}, {"zero": 3}, {"zero": 1, "replicas": 2}]


def divided(ranks: Ranks, fill: float) -> dict[str, torch.Tensor]:
    """Tensors that are divided as weights are, with rows that do not divide and one that some ranks have no row of."""
    assert ranks.mesh is not None
    placements = (Replicate(), Shard(0))
    whole = {"a": torch.arange(35.0).view(7, 5), "b": torch.arange(6.0).view(1, 6), "c": torch.arange(9.0)}
    return {
        name: distribute_tensor(tensor + fill, ranks.mesh, placements) for name, tensor in whole.items()
    } | {"counter": torch.tensor(fill)}  # fmt: skip


def save_in_every_layout(folder: Path) -> list[list[int]]:
    """Save twice in each layout; return how many bytes this process wrote in each."""
    for layout in LAYOUTS:
        ranks = make_ranks(Layout(size=torch.distributed.get_world_size(), **layout), num_heads=2, device_type="cpu")
        name = "-".join(map(str, layout.values()))
        for mode in (False, True):
            saver = make_saver(folder / f"{name}-{mode}", in_background=mode, ranks=ranks)
            saver.save(1, divided(ranks, 0.5), {}, must=False)
            saver.settle()
        state = divided(ranks, 0.0)
        load_checkpoint(folder / f"{name}-True" / "checkpoint-000001", state, ranks=ranks)
        for key, tensor in divided(ranks, 0.5).items():
            assert torch.equal(whole_of(state[key]), whole_of(tensor)), key
    parts = own_parts(divided(ranks, 0.5), ranks)
    return [[part.start, len(part.tensor)] for part in parts.values()]


def whole_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def fail_in_one(folder: Path) -> None:
    """Save, then fail to write in the last process, then save again."""
    ranks = make_ranks(Layout(size=torch.distributed.get_world_size(), zero=3), num_heads=2, device_type="cpu")
    saver = make_saver(folder, ranks=ranks)
    saver.save(1, divided(ranks, 1.0), {}, must=True)
    original = checkpoint.save_tensors
    if not ranks.leads:

        def full(*args, **kwargs):
            raise StorageError("the disk is full")

        checkpoint.save_tensors = full
    saver.save(2, divided(ranks, 2.0), {}, must=False)
    saver.settle()
    assert list_checkpoints(folder) == [1]
    with pytest.raises(StorageError, match="the disk is full") as caught:
        saver.save(3, divided(ranks, 3.0), {}, must=True)
    assert caught.value.echoed == (not ranks.leads)
    checkpoint.save_tensors = original
    saver.save(4, divided(ranks, 4.0), {}, must=True)


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Everything that two processes do here, done once."""
    folder = tmp_path_factory.mktemp("saved")
    return folder, run_in(2, both, folder, folder=folder)


def both(folder: Path) -> list[list[int]]:
    parts = save_in_every_layout(folder / "layouts")
    fail_in_one(folder / "failing")
    return parts


def test_every_layout_writes_every_row_once_and_the_same_in_the_background(processes):
    folder, _ = processes
    for layout in LAYOUTS:
        name = "-".join(map(str, layout.values()))
        plain, behind = (folder / "layouts" / f"{name}-{mode}" / "checkpoint-000001" for mode in (False, True))
        assert hashes(plain) == hashes(behind)
        verify_checkpoint(plain)
        alone = {"a": torch.zeros(7, 5), "b": torch.zeros(1, 6), "c": torch.zeros(9), "counter": torch.zeros(())}
        load_checkpoint(plain, alone)
        assert torch.equal(alone["a"], torch.arange(35.0).view(7, 5) + 0.5)
        assert torch.equal(alone["c"], torch.arange(9.0) + 0.5)
        size = sum(path.stat().st_size for path in plain.glob("*.safetensors"))
        assert size < 4 * (35 + 6 + 9 + 1) + 2 * 600, "twice the headers, once the data"


def test_copies_share_the_writing(processes):
    _, parts = processes
    assert parts[0] != parts[1]
    assert all(parts), "with two whole copies each process writes some tensors"


def test_one_process_that_cannot_write_leaves_all_without_and_the_next_save_is_whole(processes):
    folder, _ = processes
    assert list_checkpoints(folder / "failing") == [1, 4]
    assert sorted(path.name for path in (folder / "failing").iterdir()) == ["checkpoint-000001", "checkpoint-000004"]
    verify_checkpoint(folder / "failing" / "checkpoint-000004")
