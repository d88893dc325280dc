"""Prompts of `generate`: encoded once, and never again where a cache is kept."""

import re

import pytest

from cogvideox_factory.errors import MissingError
from cogvideox_factory.torch_engine import generate, loading
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from tests.torch_engine.test_generate import settings

SMALL = {"num_frames": 1, "sampling": {"steps": 1}}


@pytest.fixture
def encoders(monkeypatch):
    """What was encoded, one list for each time that a text encoder was loaded."""
    loaded = []

    class Counted(TextEncoder):
        def __init__(self, *args):
            super().__init__(*args)
            loaded.append([])

        def encode(self, captions, max_sequence_length):
            loaded[-1].extend(captions)
            return super().encode(captions, max_sequence_length)

    monkeypatch.setattr(loading, "TextEncoder", Counted)
    return loaded


def test_known_prompts_load_no_text_encoder_and_make_the_same_video(tiny_model, tmp_path, encoders, capsys):
    kept = tmp_path / "kept"

    def videos(name, *asked, **ask):
        ask |= {"out": str(tmp_path / name), "format": "npy", **SMALL}
        config = settings(tiny_model, tmp_path, prompt=list(asked), **ask)
        return [path.read_bytes() for path in generate.run(config)]

    plain = videos("plain", "a", "b", "a")
    assert encoders == [["", "a", "b"]], "equal prompts are encoded once"
    encoders.clear()
    assert videos("first", "a", "b", "a", prompt_cache=str(kept)) == plain
    assert encoders == [["", "a", "b"]]
    encoders.clear()
    assert videos("again", "b", "a", "b", prompt_cache=str(kept)) == [plain[1], plain[0], plain[1]]
    assert encoders == []
    assert f"3 of 3 prompt(s) were encoded before, in {kept}" in capsys.readouterr().out
    videos("more", "b", "c", prompt_cache=str(kept))
    assert encoders == [["c"]]
    encoders.clear()
    entry = max(kept.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
    entry.write_bytes(entry.read_bytes()[:-1])
    videos("mended", "b", "c", prompt_cache=str(kept))
    assert encoders == [["c"]], "the damaged one alone is made again"
    assert not list(kept.rglob(".tmp*"))


def test_where_embeddings_lie_is_no_part_of_what_a_video_is(tiny_model, tmp_path):
    paths = generate.run(settings(tiny_model, tmp_path, prompt=["a"], **SMALL))
    before = paths[0].stat().st_mtime_ns
    generate.run(settings(tiny_model, tmp_path, prompt=["a"], **SMALL, prompt_cache=str(tmp_path / "kept")))
    assert paths[0].stat().st_mtime_ns == before


def test_an_encoder_that_is_not_there_is_missed_only_where_it_is_needed(tiny_model, tmp_path, monkeypatch):
    def gone(*args, **kwargs):
        raise MissingError("no text encoder")

    ask = {"prompt_cache": str(tmp_path / "kept"), "overwrite": True}
    generate.run(settings(tiny_model, tmp_path, prompt=["a"], **SMALL, **ask))
    monkeypatch.setattr(TextEncoder, "from_folder", gone)
    generate.run(settings(tiny_model, tmp_path, prompt=["a"], **SMALL, **ask))
    with pytest.raises(MissingError):
        generate.run(settings(tiny_model, tmp_path, prompt=["b"], **SMALL, **ask))


def test_a_prompt_that_is_longer_than_the_model_reads_is_told(tiny_model, tmp_path, capsys):
    generate.run(settings(tiny_model, tmp_path, prompt=["a red circle moves on " * 20], **SMALL))
    told = r"1 of 2 prompts are longer than \d+ tokens and will be cut.*\n  \d+ tokens lost: a red circle"
    assert re.search(told, capsys.readouterr().out)
