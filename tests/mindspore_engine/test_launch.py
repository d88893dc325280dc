"""`cogvideox launch` with this engine, by msrun itself: a process is killed on its way."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json
import os
import signal
import subprocess
import sys
import time

from cogvideox_factory.checkpoints import list_checkpoints
from cogvideox_factory.mindspore_engine import train
from cogvideox_factory.recipe import write_recipe
from tests.ending import ask_to_end
from tests.golden import runs

STEPS = 6
LIMIT_SECONDS = 240


def settings(root, name, **more):
    training = {"steps": STEPS, "save_every": 1, "schedule": "constant", "warmup_steps": 0, "dir": str(root / name)}
    return runs.recipe("t2v lora", root, engine="mindspore", train=training, **more)


def test_a_run_that_loses_a_process_ends_as_if_it_had_not(tmp_path):
    write_recipe(tmp_path / "launched.yaml", settings(tmp_path, "launched", parallel={"zero": 2}))
    run, words = tmp_path / "launched", ["train", str(tmp_path / "launched.yaml")]
    launch = subprocess.Popen(
        [sys.executable, "-m", "cogvideox_factory", "launch", "--nproc", "2", "--", *words],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        end = time.monotonic() + LIMIT_SECONDS
        while not list_checkpoints(run) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(json.loads((run / "logs/attempt-1/rank-1.json").read_text())["pid"], signal.SIGKILL)
        told = launch.communicate(timeout=LIMIT_SECONDS)[0]
    finally:
        ask_to_end(launch)
    assert launch.returncode == 0, told
    assert "rank 1 was ended by SIGKILL" in told
    assert "restart 1 of 3, from the checkpoint of step" in told
    alone = train.run(settings(tmp_path, "alone"))
    assert runs.losses(run) == pytest.approx(runs.losses(alone), rel=1e-5)
