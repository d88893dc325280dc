"""The original's shell scripts drive this engine unchanged: prepare, four trainings, two inferences."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from PIL import Image

from cogvideox_factory.recipe import read_recipe
from tests.clips import draw_lists, real_lists
from tests.golden.cases import model_folder

SCRIPTS = Path(__file__).parents[2] / "scripts"
SIZE = {"H": "64", "W": "96", "F": "9", "MAX_SEQUENCE_LENGTH": "16"}


def script(name: str, *words: str, **variables: object) -> str:
    """Run a script of `scripts/` in PyNative mode and return what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"PYTHON": sys.executable, "ENGINE": "mindspore", "MINDSPORE_MODE": "1"}
    environment |= SIZE | {"MASTER_PORT": port} | {key: str(value) for key, value in variables.items()}
    done = subprocess.run(
        ["bash", str(SCRIPTS / name), *words], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(("task", "short", "num"), [("text", "t2v", 2), ("image", "i2v", 1)])
def test_prepare_train_and_infer_by_the_scripts(task, short, num, tmp_path):
    """Two processes divide what the scripts divide without being asked: tokens, and the weights.

    Of real clips where COGVIDEOX_REAL_CLIPS names some.
    """
    model = model_folder("cogvideox1.5-5b" if short == "t2v" else "cogvideox1.5-5b-i2v")
    clips = real_lists() or draw_lists(tmp_path / "clips", [(9, 64, 96)] * 2, seed=3, prompts="prompt.txt")
    common = {
        "MODEL_NAME_OR_PATH": model,
        "DATA_ROOT": tmp_path / "prepared",
        "NUM_NPUS": num,
        "LOG_DIR": tmp_path / "log",
    }
    script(
        "prepare_dataset.sh", **common | {"DATA_ROOT": clips}, OUTPUT_DIR=tmp_path / "prepared", DTYPE="fp32",
        SAVE_IMAGE_LATENTS=int(short == "i2v"),
    )  # fmt: skip
    runs = {}
    for kind in ("lora", "sft"):
        told = script(
            f"train_{task}_to_video_{kind}.sh", "--lr_warmup_steps", "1", **common, MIXED_PRECISION="no",
            OUTPUT_ROOT_DIR=tmp_path / kind, MAX_TRAIN_STEPS=2, OPTIMIZERS="adamw", LEARNING_RATES="1e-4",
        )  # fmt: skip
        assert "--engine mindspore" in told
        (runs[kind],) = (path.parent for path in tmp_path.glob(f"{kind}/**/config.yaml"))
        config = read_recipe(runs[kind] / "config.yaml")
        assert (config.engine, config.task, config.mindspore.mode, config.train.steps) == ("mindspore", short, 1, 2)
        divided = (num, 3) if kind == "sft" and num > 1 else (1, 0)
        assert (config.parallel.sequence, config.parallel.zero) == divided
        assert len(list(runs[kind].glob("logs/attempt-1/rank-*.json"))) == (num if num > 1 else 0)
        assert list((runs[kind] / "final").rglob("*.safetensors"))
    ask: dict[str, object] = {"LORA_PATH": runs["lora"]} if short == "t2v" else {"TRANSFORMER_PATH": runs["sft"]}
    if short == "i2v":
        Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(tmp_path / "first.png")
        ask["IMAGE_PATH"] = tmp_path / "first.png"
    script(
        f"run_infer_{task}_to_video.sh", "--sampling.steps", "2", "--run.dtype", "float32", PROMPT="a red circle",
        OUTPUT_DIR=tmp_path / "out", **common, **ask,
    )  # fmt: skip
    assert (tmp_path / "out" / "output.mp4").stat().st_size > 0
