"""`cogvideox export` of this engine's runs, where there is no torch; `test_golden` has diffusers load such files."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cogvideox_factory.cli import main
from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.mindspore_engine import train
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.lora import load_lora_into
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.weights import load_folder
from tests.golden import cases, runs

MORE = {"steps": 2, "save_every": 1, "schedule": "constant", "warmup_steps": 0, "learning_rate": 0.05, "ema_decay": 0.5}
FILE = "pytorch_lora_weights.safetensors"


def run_of(case: str, folder: Path) -> Path:
    return train.run(runs.recipe(case, folder, engine="mindspore", train=MORE))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory) -> Path:
    return run_of("t2v lora", tmp_path_factory.mktemp("lora"))


@pytest.fixture(scope="module")
def full_run(tmp_path_factory) -> Path:
    return run_of("i2v full", tmp_path_factory.mktemp("full"))


def export(*words, says: str = "", capsys=None) -> int:
    code = main(["export", *(str(word) for word in words)])
    if says:
        told = capsys.readouterr().err
        assert says in told, told
    return code


def predicted(case: str, *, lora: Path | None = None, folder: Path | None = None) -> np.ndarray:
    """Return what a tiny model predicts with a LoRA, or with a transformer in place of its own."""
    variant = cases.TASKS[case.split()[0]]
    model = CogVideoXTransformer.from_folder(folder or cases.model_folder(variant) / "transformer")
    if lora:
        load_lora_into(model, load_lora(lora))
    step = cases.step_for(model.config)
    given = (*map(to_tensor, (step.latents, step.prompt_embeds, step.timesteps)),)
    ofs = None if step.ofs is None else to_tensor(step.ofs)
    return to_array(model.forward(*given, positions=model.positions(**step.shape), ofs=ofs))


@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui", "merged"])
def test_a_lora_predicts_the_same_in_every_form(lora_run, tmp_path, form):
    assert export(lora_run, "--to", form, "--out", tmp_path / "out") == 0
    expected = predicted("t2v lora", lora=lora_run / "final" / FILE)
    assert np.abs(expected - predicted("t2v lora")).max() > 1e-2
    if form == "merged":
        found = predicted("t2v lora", folder=tmp_path / "out" / "transformer")
    else:
        (file,) = (tmp_path / "out").glob("*.safetensors")
        found = predicted("t2v lora", lora=file)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
    assert (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", ["diffusers", "comfyui"])
def test_all_weights_are_the_same_in_every_form(full_run, tmp_path, form):
    assert export(full_run, "--to", form, "--out", tmp_path / "out") == 0
    final = full_run / "final" / "transformer"
    if form == "diffusers":
        ours, theirs = load_folder(final), load_folder(tmp_path / "out" / "transformer")
        assert ours.keys() == theirs.keys()
        assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
        assert json.loads((final / "config.json").read_text()) == json.loads(
            (tmp_path / "out" / "transformer" / "config.json").read_text()
        )
    else:
        (file,) = (tmp_path / "out").glob("*.safetensors")
        assert file.stat().st_size > 100_000


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_last_checkpoint_holds_what_the_run_exported(lora_run, full_run, tmp_path, method):
    run = {"lora": lora_run, "full": full_run}[method]
    for step in (1, 2):
        assert export(run / f"checkpoint-00000{step}", "--to", "diffusers", "--out", tmp_path / str(step)) == 0
    inner = "" if method == "lora" else "transformer"
    read = (lambda folder: load_lora(folder / FILE).arrays) if method == "lora" else load_folder
    earlier, last = (read(tmp_path / step / inner) for step in "12")
    final = read(run / "final" / inner)
    assert last.keys() == earlier.keys() == final.keys()
    assert all(last[name].dtype == array.dtype and np.array_equal(last[name], array) for name, array in final.items())
    assert any(not np.array_equal(earlier[name], array) for name, array in final.items())
    assert export(run / "checkpoint-000002", "--to", "diffusers", "--weights", "raw", "--out", tmp_path / "raw") == 0
    assert any(not np.array_equal(array, final[name]) for name, array in read(tmp_path / "raw" / inner).items())


def test_a_damaged_checkpoint_or_another_base_is_refused(lora_run, full_run, tmp_path, capsys):
    folder = tmp_path / "run" / "checkpoint-000002"
    shutil.copytree(lora_run / "checkpoint-000002", folder)
    (file,) = folder.glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert export(folder, "--to", "peft", "--out", tmp_path / "x", says=file.name, capsys=capsys) == 5
    words = (full_run / "checkpoint-000002", "--to", "diffusers", "--base", cases.model_folder("cogvideox-5b"))
    assert export(*words, "--out", tmp_path / "y", says="the run was started with", capsys=capsys) == 5
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_a_checkpoint_of_the_other_engine_takes_torch_and_says_so(lora_run, tmp_path, capsys):
    folder = tmp_path / "checkpoint-000002"
    shutil.copytree(lora_run / "checkpoint-000002", folder)
    state = json.loads((folder / "state.json").read_text())
    state["settings"]["engine"] = "torch"
    (folder / "state.json").write_text(json.dumps(state))
    words = (folder, "--to", "peft", "--out", tmp_path / "x")
    assert export(*words, says="whose checkpoints take torch to read", capsys=capsys) == 4
