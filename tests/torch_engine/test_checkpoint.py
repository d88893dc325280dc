import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cogvideox_factory.checkpoints import digest, list_checkpoints, newest_checkpoint, set_aside
from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.tensors import open_tensors
from cogvideox_factory.torch_engine.checkpoint import (
    load_checkpoint,
    save_checkpoint,
)


def tensors(fill: float) -> dict[str, torch.Tensor]:
    return {
        "model.w": torch.full((4, 3), fill),
        "model.h": torch.full((5,), fill, dtype=torch.bfloat16),
        "optimizer.step.w": torch.tensor(fill),
    }


def test_round_trip_is_exact_and_keeps_the_newest(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, tensors(step + 1 / 3), {"note": step}, keep=2)
    assert list_checkpoints(tmp_path) == [2, 3]
    target = tensors(0.0)
    state = load_checkpoint(newest_checkpoint(tmp_path)[0], target)
    assert (state["step"], state["note"]) == (3, 3)
    for name, value in tensors(3 + 1 / 3).items():
        assert torch.equal(target[name], value), name


def test_one_flipped_bit_anywhere_is_refused_and_the_one_before_is_found(tmp_path):
    first = save_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=5)
    second = save_checkpoint(tmp_path, 2, tensors(2.0), {}, keep=5)
    for file in sorted(second.iterdir()):
        good = file.read_bytes()
        for place in range(0, len(good), max(1, len(good) // 7)):
            file.write_bytes(good[:place] + bytes([good[place] ^ 4]) + good[place + 1 :])
            with pytest.raises(UnfitError):
                load_checkpoint(second, tensors(0.0))
            found, problems = newest_checkpoint(tmp_path)
            assert found == first
            assert len(problems) == 1
        file.write_bytes(good[:-1])
        with pytest.raises(UnfitError):
            load_checkpoint(second, tensors(0.0))
        file.write_bytes(good)
    assert newest_checkpoint(tmp_path)[0] == second
    assert set_aside(second).name == "broken-checkpoint-000002"
    assert list_checkpoints(tmp_path) == [1]


def test_an_old_checkpoint_that_cannot_go_does_not_spoil_the_new_one(tmp_path, monkeypatch, capsys):
    rename = os.replace

    def stuck(source, target):
        if Path(source).name == "checkpoint-000001":
            raise OSError(errno.EBUSY, "Device or resource busy", str(source))
        rename(source, target)

    monkeypatch.setattr("os.replace", stuck)
    for step in (1, 2, 3):
        assert save_checkpoint(tmp_path, step, tensors(1.0), {}, keep=1) == newest_checkpoint(tmp_path)[0]
    assert list_checkpoints(tmp_path) == [1, 3], "the others go nevertheless"
    assert "checkpoint-000003 is saved, but an older one stays: " in capsys.readouterr().out


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_what_is_written_is_read_once_and_what_is_loaded_twice(tmp_path):
    size = 4 * 300_000
    folder, written = bytes_read(lambda: save_checkpoint(tmp_path, 1, {"a": torch.ones(300_000)}, {}, keep=1))
    _, loaded = bytes_read(lambda: load_checkpoint(folder, {"a": torch.zeros(300_000)}))
    _, again = bytes_read(lambda: load_checkpoint(folder, {"a": torch.zeros(300_000)}, verified=True))
    for count, times in ((written, 1), (loaded, 2), (again, 1)):
        assert times * size <= count <= times * size + 20_000


def bytes_read(function):
    """Return what `function` returns and how many bytes this process read for it."""
    before = int(Path("/proc/self/io").read_text().split()[1])
    result = function()
    return result, int(Path("/proc/self/io").read_text().split()[1]) - before


def test_a_shard_is_hashed_once_for_the_manifest(tmp_path, monkeypatch):
    hashed = []
    monkeypatch.setattr("cogvideox_factory.tensors.hashlib.sha256", lambda *data: pytest.fail("hashed for the header"))
    monkeypatch.setattr(
        "cogvideox_factory.torch_engine.checkpoint.digest", lambda path: hashed.append(path.name) or digest(path)
    )
    folder = save_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=1)
    assert hashed == ["shard-00001.safetensors", "state.json"]
    with open_tensors(folder / hashed[0]) as file:
        assert file.digest is None


def test_refuses_another_runs_state(tmp_path):
    folder = save_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=1)
    with pytest.raises(UnfitError, match=r"names differ.*model\.x"):
        load_checkpoint(folder, tensors(0.0) | {"model.x": torch.zeros(1)})
    with pytest.raises(UnfitError, match=r"model\.w has shape \(4, 3\), this run needs \(4, 4\)"):
        load_checkpoint(folder, tensors(0.0) | {"model.w": torch.zeros(4, 4)})
    with pytest.raises(UnfitError, match=r"state\.json is missing"):
        load_checkpoint(tmp_path / "nothing", tensors(0.0))


def test_never_overwrites_and_ignores_foreign_folders(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-000009").mkdir()  # no manifest: unfinished
    save_checkpoint(tmp_path, 1, tensors(1.0), {}, keep=1)
    with pytest.raises(StorageError, match="never overwritten"):
        save_checkpoint(tmp_path, 1, tensors(2.0), {}, keep=1)
    save_checkpoint(tmp_path, 2, tensors(2.0), {}, keep=1)
    assert list_checkpoints(tmp_path) == [2]
    assert (tmp_path / "checkpoint-best").is_dir()
    assert (tmp_path / "checkpoint-000009").is_dir()


_KILLED_IN_SAVE = """
import os, signal, sys, torch
from pathlib import Path
from cogvideox_factory.torch_engine import checkpoint
count = 0
def dying(path):
    os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint(Path(sys.argv[1]), 1, {"a": torch.ones(9)}, {}, keep=1)
checkpoint.digest = dying
checkpoint.save_checkpoint(Path(sys.argv[1]), 2, {"a": torch.zeros(9)}, {}, keep=1)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_old_one(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", _KILLED_IN_SAVE, str(tmp_path)], capture_output=True, timeout=120, check=False
    )
    assert done.returncode == -signal.SIGKILL
    assert list_checkpoints(tmp_path) == [1]
    target = {"a": torch.zeros(9)}
    load_checkpoint(newest_checkpoint(tmp_path)[0], target)
    assert torch.equal(target["a"], torch.ones(9))
    assert any(name.startswith(".tmp-") for name in os.listdir(tmp_path))
    assert json.loads((tmp_path / "checkpoint-000001" / "state.json").read_text())["step"] == 1
