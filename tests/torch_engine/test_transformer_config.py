"""A transformer described by a file, the older trainers' YAML or a config.json, with weights of its own."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.models import LARGER, TransformerConfig
from cogvideox_factory.tiny.world import random_scene, render

RECIPES = Path(__file__).parents[2] / "recipes" / "transformers"
SIZE = ["--text.max-sequence-length", "16", "--run.device", "cpu"]


@pytest.mark.parametrize(("file", "name"), [(f"cogvideox1.5_{n}B.yaml", f"{n}b") for n in (10, 20, 30)])
def test_the_larger_configs_are_the_older_trainers(file, name):
    """Theirs states the size of training where the published 1.5 model has a limit."""
    assert TransformerConfig.from_file(RECIPES / file) == replace(LARGER[name], sample_height=96, sample_width=170)


@pytest.fixture(scope="module")
def model(tiny_model) -> Path:
    return tiny_model("cogvideox1.5-5b")


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips")
    frames = render(random_scene(0, 0), num_frames=9, height=48, width=80, fps=16)
    for index in range(2):
        export_to_video(frames[:: 1 - 2 * index], folder / f"{index}.mp4", fps=16)
        (folder / f"{index}.txt").write_text(f"clip {index}")
    return folder


@pytest.fixture(scope="module")
def bare(model, tmp_path_factory) -> Path:
    """Weights of a smaller transformer without their config."""
    folder = tmp_path_factory.mktemp("bare")
    shutil.copy(model / "transformer/diffusion_pytorch_model.safetensors", folder)
    return folder


@pytest.fixture(scope="module")
def described(model, tmp_path_factory) -> Path:
    """Their config, as the older trainers write one."""
    values = json.loads((model / "transformer/config.json").read_text())
    lines = [f'    "{key}": {json.dumps(value)}' for key, value in values.items() if not key.startswith("_")]
    path = tmp_path_factory.mktemp("described") / "small.yaml"
    path.write_text("\n".join(["transformer:", *lines]).replace("true", "True").replace("false", "False"))
    return path


def train(model: Path, clips: Path, run: Path, *words: object) -> int:
    data = ["--data.root", clips, "--data.num-frames", "9", "--data.height", "48", "--data.width", "80"]
    asked = ["train", "--model.path", model, *data, *SIZE, "--train.dir", run, "--train.steps", "1", *words]
    return main([str(word) for word in asked])


def generate(model: Path, out: Path, *words: object) -> int:
    ask = ["--generate.prompt", "x", "--generate.height", "48", "--generate.width", "80", "--generate.num-frames", "9"]
    asked = ["generate", "--model.path", model, *ask, *SIZE, "--generate.out", out, "--sampling.steps", "1", *words]
    return main([str(word) for word in asked])


def test_weights_and_their_config_go_together_in_train_and_generate(model, clips, bare, described, tmp_path):
    words = ["--model.transformer-config", described, "--model.transformer", bare]
    assert train(model, clips, tmp_path / "run", *words) == 0, "a LoRA over named weights"
    assert generate(model, tmp_path / "named.npy", *words) == 0
    assert generate(model, tmp_path / "own.npy") == 0
    assert (tmp_path / "named.npy").read_bytes() == (tmp_path / "own.npy").read_bytes(), "they are the model's own"


def test_random_weights_train_and_the_result_needs_no_file(model, clips, described, tmp_path):
    words = ["--model.transformer-config", described, "--train.method", "full"]
    assert train(model, clips, tmp_path / "run", *words) == 0
    assert generate(model, tmp_path / "a.mp4", "--model.transformer", tmp_path / "run") == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["--model.transformer-config", "YAML"], 2, "alone means random weights"),
        (["--model.transformer-config", "OTHER", "--model.transformer", "FOLDER"], 5, "num_layers"),
        (["--model.transformer-config", "OTHER", "--model.transformer", "BARE"], 5, "transformer_blocks"),
        (["--model.transformer", "BARE"], 2, "no transformer there"),
        (["--model.transformer", "a.ckpt"], 2, "MindSpore checkpoint"),
        (["--model.transformer-config", "/nowhere.yaml", "--model.transformer", "BARE"], 2, "no such"),
    ],
)
def test_what_does_not_fit_is_refused(model, bare, described, tmp_path, capsys, words, code, says):
    other = tmp_path / "other.yaml"
    text = described.read_text()
    layers = json.loads((model / "transformer/config.json").read_text())["num_layers"]
    other.write_text(text.replace(f'"num_layers": {layers}', f'"num_layers": {layers + 1}'))
    places = {"YAML": described, "OTHER": other, "BARE": bare, "FOLDER": model / "transformer"}
    assert generate(model, tmp_path / "a.mp4", *(places.get(word, word) for word in words)) == code
    assert says in capsys.readouterr().err
