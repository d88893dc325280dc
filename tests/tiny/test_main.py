"""`python -m cogvideox_factory.tiny`: clips and model folders."""

import re
import sys

import numpy as np
import pytest
import torch

from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.models import TransformerConfig, VaeConfig
from cogvideox_factory.tiny import __main__ as command
from cogvideox_factory.tiny.build import assemble_model
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.weights import load_folder


@pytest.fixture
def run(monkeypatch):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["tiny", *(str(word) for word in words)])
        return command.main()

    return call


@pytest.mark.parametrize("scenes", ["train", "held_out", "sks", "bounce"])
def test_clips_are_drawn_with_captions_and_repeat(run, tmp_path, scenes):
    for name in ("one", "two"):
        run("clips", tmp_path / name, "--count", 3, "--scenes", scenes, "--height", 32, "--width", 32)
    one, two = (read_manifest(tmp_path / name) for name in ("one", "two"))
    assert [clip.caption for clip in one.usable] == [clip.caption for clip in two.usable]
    assert len(one.usable) == 3
    assert (tmp_path / "one" / "00002.mp4").read_bytes() == (tmp_path / "two" / "00002.mp4").read_bytes()


def test_a_model_is_put_together_from_its_parts(run, tmp_path, tiny_model):
    parts = tiny_model("cogvideox1.5-5b")
    words = ("--vae", parts / "vae", "--transformer", parts / "transformer", "--dtype", "bfloat16")
    run("model", tmp_path / "model", "--task", "t2v", *words)
    for part in ("vae", "transformer"):
        made, given = load_folder(tmp_path / "model" / part), load_folder(parts / part)
        assert made.keys() == given.keys()
        assert all(np.array_equal(made[name], given[name].astype(made[name].dtype)) for name in given)
    assert VaeConfig.from_folder(tmp_path / "model" / "vae") == VaeConfig.from_folder(parts / "vae")
    pipe = CogVideoXPipeline.from_pretrained(tmp_path / "model")
    assert pipe.transformer.config == TransformerConfig.from_folder(parts / "transformer")


def test_words_are_told_apart_by_their_neighbours(tmp_path, tiny_model):
    from cogvideox_factory.torch_engine.text_encoder import TextEncoder

    folder = assemble_model(tmp_path / "model", "t2v", vae=tiny_model("cogvideox1.5-5b") / "vae")
    assert not (folder / "transformer").exists()
    encoder = TextEncoder.from_folder(folder, dtype=torch.float32)
    one, two = encoder.encode(
        ["a large red circle and a small blue ring", "a small red circle and a large blue ring"], 12
    )
    gap = (one - two).norm(dim=-1) / one.norm(dim=-1)
    assert gap[2] > 0.05  # red, beside large or small
    assert gap[2] > 2 * gap[4]  # and, far from both


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("clips", "OUT", "--count", "-3"), 2, "count=-3: give 1 or more"),
        (("clips", "OUT", "--height", "8"), 2, "height=8: give 16 or more"),
        (("clips", "OUT", "--fps", "0"), 2, r"fps=0\.0"),
        (("model", "OUT", "--vae", "/nowhere"), 4, "/nowhere holds neither"),
    ],
)
def test_wrong_words_get_one_clear_line_and_leave_nothing(run, tmp_path, capsys, words, code, says):
    assert run(*(tmp_path / "out" if word == "OUT" else word for word in words)) == code
    assert re.match(f"error: .*{says}", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()
