"""Runs of several shapes: the other engine's, a graph a shape, and resumed between them."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json

import numpy as np
from mindspore.common.api import ms_compile_cache

from cogvideox_factory.checkpoints import checkpoint_folder
from cogvideox_factory.mindspore_engine import train
from tests.golden import golden, runs

APART = 1e-4
"""Of two engines."""


def shapes_of(folder):
    """Return the shape of each step."""
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return list({row["step"]: row["bucket"] for row in rows}.values())


def num_graphs():
    """Return how many training passes MindSpore itself has compiled so far."""
    return sum("learner.micro." in phase for phase in ms_compile_cache)


def assert_near(folder, case):
    found = runs.losses(folder)
    assert np.abs(found - golden("buckets")[case][: len(found)]).max() <= APART


def test_losses_of_raw_clips_are_those_of_the_other_engine(tmp_path):
    """They are encoded on the way, first frames with noise."""
    folder = train.run(runs.bucketed("i2v full", tmp_path, engine="mindspore"))
    assert len(set(shapes_of(folder))) == 3
    assert_near(folder, "i2v full")


def test_so_they_are_from_a_cache_and_a_run_goes_on_between_shapes_to_the_bit(tmp_path):
    whole = train.run(runs.bucketed("t2v lora", tmp_path, engine="mindspore", train={"save_every": 5}))
    assert_near(whole, "t2v lora")
    assert len(set(shapes_of(whole)[5:])) > 1
    more = {"dir": str(tmp_path / "parted"), "resume": str(checkpoint_folder(whole, 5))}
    parted = train.run(runs.bucketed("t2v lora", tmp_path, engine="mindspore", train=more))
    assert runs.losses(parted).tolist() == runs.losses(whole)[5:].tolist()
    file = "final/pytorch_lora_weights.safetensors"
    assert (parted / file).read_bytes() == (whole / file).read_bytes()


def test_a_shape_that_comes_again_compiles_nothing(tmp_path):
    before = num_graphs()
    more = {"engine": "mindspore", "mindspore": {"mode": 0}}
    folder = train.run(runs.bucketed("t2v lora", tmp_path, train={"steps": 6}, **more))
    assert num_graphs() - before == len(set(shapes_of(folder))) == 3
    assert_near(folder, "t2v lora")
