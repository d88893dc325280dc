"""Videos: the frames of the other engine, in both modes, and what is refused."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import numpy as np

from cogvideox_factory.cli import main
from cogvideox_factory.cli.generate import starting_point
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.jobs import read_record
from cogvideox_factory.mindspore_engine import generate
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from tests.golden import golden, runs

FRAMES = 2
"""Of 255, between two engines; seen is 1."""


def frames_of(case, folder, **more):
    (path,) = generate.run(runs.video_request(case, folder, engine="mindspore", **more))
    return runs.seen(path).astype(int)


def apart(one, other):
    return int(np.abs(one - other.astype(int)).max())


@pytest.mark.parametrize("case", runs.VIDEOS)
def test_frames_are_those_of_the_other_engine(case, tmp_path):
    """In the first case with a LoRA that the other engine trained."""
    expected = golden("videos")[case]
    assert expected.std() > 10
    assert apart(frames_of(case, tmp_path), expected) <= FRAMES


def test_so_they_are_in_graphs_with_the_lora_merged(tmp_path):
    found = frames_of("t2v ddim lora", tmp_path, mindspore={"mode": 0}, generate={"merge_lora": True})
    assert apart(found, golden("videos")["t2v ddim lora"]) <= FRAMES


def test_the_lora_shows(tmp_path):
    """So the test above would tell one that is not used."""
    found = frames_of("t2v ddim lora", tmp_path, generate={"lora_weight": [0.0]})
    assert apart(found, golden("videos")["t2v ddim lora"]) > 5 * FRAMES


@pytest.mark.parametrize("amp_level", ["O2", "O3"])
def test_half_precision_is_near(amp_level, tmp_path):
    more = {"run": {"device": "cpu", "dtype": "float16"}, "mindspore": {"amp_level": amp_level}}
    assert 0 < apart(frames_of("t2v ddim lora", tmp_path, **more), golden("videos")["t2v ddim lora"]) <= 32


def test_prompts_of_a_file_have_several_videos_each_and_are_encoded_once(tmp_path, monkeypatch, capsys):
    long = " ".join(["a red circle"] * 8)
    (tmp_path / "prompts.txt").write_text(f"a\n\n{long}\n")
    encoded, encode = [], TextEncoder.encode

    def counted(self, captions, length):
        encoded.extend(captions)
        return encode(self, captions, length)

    monkeypatch.setattr(TextEncoder, "encode", counted)
    ask = {"prompt": [], "prompt_file": str(tmp_path / "prompts.txt"), "num_videos": 2, "num_frames": 1}
    ask |= {"format": "npy", "prompt_cache": str(tmp_path / "kept")}

    def videos(name, **more):
        out = tmp_path / name
        config = runs.request("cogvideox-2b", out, engine="mindspore", generate=ask | more, sampling={"steps": 1})
        return {path.name: path.read_bytes() for path in generate.run(config)}

    first = videos("first")
    assert [name[:6] for name in first] == ["000-a-", "001-a-", "002-a-", "003-a-"]
    assert len(set(first.values())) == 4
    assert encoded == ["", "a", long]
    assert "1 of 3 prompts are longer than 16 tokens and will be cut" in capsys.readouterr().out
    assert videos("again") == first
    assert encoded == ["", "a", long]


def test_a_video_that_is_there_is_not_made_again_and_says_how_it_was_made(tmp_path, monkeypatch):
    config = runs.video_request("t2v ddim lora", tmp_path, engine="mindspore")
    (path,) = generate.run(config)
    record = read_record(path)
    assert "mindspore" in record["versions"]
    like, _ = starting_point(["--like", str(path)])
    assert like.engine == "mindspore"
    again = like.model_copy(update={"generate": like.generate.model_copy(update={"out": str(tmp_path / "again.npy")})})
    assert generate.run(again)[0].read_bytes() == path.read_bytes()
    monkeypatch.setattr(generate, "_load", lambda *given: pytest.fail("the model was loaded"))
    assert generate.run(config) == [path]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--generate.base", "nf4"], "generate.base=nf4"),
        (["--generate.tea-cache", "0.1"], "generate.tea_cache=0.1"),
        (["--parallel.guidance", "2"], "parallel.guidance=2"),
    ],
)
def test_what_it_has_not_got_is_refused_by_name(words, told, capsys):
    assert main(["generate", "--engine", "mindspore", "--generate.prompt", "x", *words]) == 2
    assert told in capsys.readouterr().err


def test_an_image_for_a_text_model_is_refused(tmp_path):
    with pytest.raises(FactoryError, match=r"generate\.image has no effect with task=t2v"):
        frames_of("t2v ddim lora", tmp_path, generate={"image": ["x.png"]})
