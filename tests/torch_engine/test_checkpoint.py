import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.torch_engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    set_aside,
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
