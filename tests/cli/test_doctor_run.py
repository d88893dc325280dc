"""`cogvideox doctor RUN`: what checkpoints hold, and that damage is exit code 5."""

import json
import subprocess
import sys

import pytest
import torch

from cogvideox_factory.checkpoints import digest
from cogvideox_factory.cli import main
from cogvideox_factory.torch_engine.checkpoint import save_checkpoint

STATE = {
    "position": {"epoch": 1.5, "next_clips": ["a"]}, "seed": 7, "versions": {"torch": "2.13"}, "layout": {"zero": 3},
    "changes": [{"after_step": 1, "setting": "train.learning_rate", "from": 0.1, "to": 0.2}],
}  # fmt: skip


@pytest.fixture
def run(tmp_path):
    for step in (9, 10):
        save_checkpoint(tmp_path / "run", step, {"w": torch.full((3,), float(step))}, STATE, keep=5)
    return tmp_path / "run"


def doctor(*words):
    return main(["doctor", *(str(word) for word in words)])


def test_a_good_run_says_what_its_checkpoints_hold(run, tmp_path, capsys):
    assert doctor(run, "--json", tmp_path / "r.json") == 0
    said = capsys.readouterr().out
    for part in ("checkpoint-000010", "epoch 1.50", "zero 3", "torch 2.13", "train.learning_rate 0.1 -> 0.2"):
        assert part in said, part
    report = json.loads((tmp_path / "r.json").read_text())
    assert [(entry["step"], entry["problem"], entry["num_tensors"]) for entry in report] == [
        (9, None, 1),
        (10, None, 1),
    ]
    assert doctor(run / "checkpoint-000009") == 0


def test_a_damaged_and_an_unfinished_one_are_named_and_the_good_one_too(run, capsys):
    shard = next((run / "checkpoint-000010").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (run / "checkpoint-000011").mkdir()
    assert doctor(run) == 5
    said = capsys.readouterr()
    assert "2 of 3 checkpoints" in said.err
    assert f"newest good one is {run / 'checkpoint-000009'}" in said.err
    assert "changed or damaged" in said.out.replace("\n", " ")
    assert doctor(run / "checkpoint-000010") == 5
    assert "None is good" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change",
    [
        {"tensors": 3},
        {"position": {"epoch": "1.5"}},
        {"position": [1]},
        {"position": {"clip": 3}},
        {"changes": [{"setting": "a"}]},
        {"changes": 3},
        {"changes": ["a"]},
    ],
    ids=str,
)
def test_a_state_of_another_form_is_damage_and_no_crash(run, capsys, change):
    """Its hash agrees: somebody wrote it so."""
    folder = run / "checkpoint-000010"
    state, manifest = (json.loads((folder / name).read_text()) for name in ("state.json", "MANIFEST.json"))
    (folder / "state.json").write_text(json.dumps(state | change))
    (folder / "MANIFEST.json").write_text(json.dumps(manifest | {"state.json": digest(folder / "state.json")}))
    assert doctor(run) == 5
    said = capsys.readouterr()
    assert "has another form than training writes" in " ".join(said.out.split())
    assert "1 of 2 checkpoints" in said.err


def test_it_needs_no_framework(run):
    code = f"from cogvideox_factory.cli import main; main(['doctor', {str(run)!r}])"
    code = f"import sys; {code}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "False"
