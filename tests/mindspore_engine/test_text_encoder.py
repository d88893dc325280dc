"""T5 against the golden files of the other engine, which runs transformers' own; tokens, files, errors."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json
import shutil

import mindspore as ms
import numpy as np

from cogvideox_factory.errors import FactoryError, MissingError, UnfitError
from cogvideox_factory.mindspore_engine.border import to_array
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.tensors import save_tensors
from cogvideox_factory.weights import load_folder
from tests.golden import cases, error, golden
from tests.mindspore_engine import parity


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    return TextEncoder.from_folder(cases.model_folder("cogvideox-2b"))


@pytest.fixture
def folder(tmp_path):
    """A model folder a test may damage: only the two parts a text encoder reads."""
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(cases.model_folder("cogvideox-2b") / part, tmp_path / part)
    return tmp_path


@pytest.mark.parametrize("length", cases.TEXT_LENGTHS)
@pytest.mark.parametrize("mode", ["PyNative", "O0"])
def test_embeddings_are_those_of_transformers(mode, length):
    parity.hold(parity.texts(length, parity.MODES[mode]))


def test_so_they_are_in_a_graph_of_level_1():
    parity.hold(parity.texts(20, parity.MODES["O1"]))


def test_float16_is_near_and_weights_are_kept_so():
    encoder = TextEncoder.from_folder(cases.model_folder("cogvideox-2b"), dtype=ms.float16)
    embeds = encoder.encode(cases.CAPTIONS, 20)
    assert embeds.dtype == encoder.dtype == ms.float16
    assert {p.dtype for p in encoder.model.get_parameters()} == {ms.float16}
    assert error(to_array(embeds), golden("text_encoder")["20"]) <= 5e-3


def test_large_activations_do_not_overflow_float16(folder):
    """The published T5's last products pass 65,504; here the last weight of each half is a thousand times as large."""
    path = folder / "text_encoder/model.safetensors"
    arrays = load_folder(folder / "text_encoder", "model")
    large = {name: a * np.float32(2000 if name.endswith("wo.weight") else 1) for name, a in arrays.items()}
    large |= {name: a * np.float32(20) for name, a in arrays.items() if "wi_" in name}
    save_tensors(path, large)
    exact = to_array(TextEncoder.from_folder(folder).encode(["a red circle"], 16))
    half = to_array(TextEncoder.from_folder(folder, dtype=ms.float16).encode(["a red circle"], 16))
    assert np.isfinite(half).all()
    assert np.abs(half - exact).max() <= 2e-2 * np.abs(exact).max()


def test_tokens_are_counted_with_the_end_and_the_rest_is_reported(encoder):
    caption = "a red circle moves left"
    assert encoder.count_tokens(caption) == 6
    assert encoder.count_tokens("") == 1
    assert encoder.truncated_tokens(caption, 6) == 0
    assert encoder.truncated_tokens(caption, 4) == 2


def test_the_embedding_may_come_under_both_names(folder, encoder):
    arrays = load_folder(folder / "text_encoder", "model")
    tied = {**arrays, "encoder.embed_tokens.weight": arrays["shared.weight"]}
    save_tensors(folder / "text_encoder/model.safetensors", tied)
    again = TextEncoder.from_folder(folder)
    assert np.array_equal(to_array(again.encode(["a"], 8)), to_array(encoder.encode(["a"], 8)))


def test_what_cannot_be_encoded_is_said(encoder):
    with pytest.raises(FactoryError, match="brackets"):
        encoder.encode("a red circle", 16)
    with pytest.raises(FactoryError, match="max_sequence_length=0"):
        encoder.encode(["a red circle"], 0)


@pytest.mark.parametrize(
    ("key", "value", "kind", "message"),
    [
        ("model_type", "bert", UnfitError, "is 't5'"),
        ("feed_forward_proj", "relu", UnfitError, "gated-gelu"),
        ("d_ff", 48, UnfitError, r"expected \[48, 32\]"),
        ("d_model", None, UnfitError, "no T5"),
    ],
)
def test_a_config_of_another_model_is_refused(folder, key, value, kind, message):
    path = folder / "text_encoder/config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, key: value}))
    with pytest.raises(kind, match=message):
        TextEncoder.from_folder(folder)


def test_missing_parts_are_named(folder):
    (folder / "text_encoder/model.safetensors").unlink()
    with pytest.raises(MissingError, match=r"holds no \*.safetensors"):
        TextEncoder.from_folder(folder)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(MissingError, match="tokenizer is missing"):
        TextEncoder.from_folder(folder)
