"""Embeddings on disk: found again to the bit, never for another prompt or maker, and made again when damaged."""

import shutil

import ml_dtypes
import numpy as np
import pytest

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.prompt_cache import PromptCache

MADE_WITH = {"dtype": "bfloat16", "length": 3}


@pytest.fixture
def model(tmp_path):
    for name in ("text_encoder", "tokenizer"):
        (tmp_path / "model" / name).mkdir(parents=True)
        (tmp_path / "model" / name / "config.json").write_text(name)
    return tmp_path / "model"


def embeds(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((3, 8)).astype(ml_dtypes.bfloat16)


def test_what_is_kept_is_found_to_the_bit_by_others(tmp_path, model):
    prompts = ["a fox", "", "a\nfox", "Ünï \ud800", "a" * 5000]
    for seed, prompt in enumerate(prompts):
        PromptCache(tmp_path / "kept", model, MADE_WITH).keep(prompt, embeds(seed))
    other = PromptCache(tmp_path / "kept", model, MADE_WITH)
    for seed, prompt in enumerate(prompts):
        found = other.find(prompt)
        assert found is not None
        assert found.dtype == ml_dtypes.bfloat16
        assert np.array_equal(found.view(np.int16), embeds(seed).view(np.int16))
    assert other.find("a fox ") is None


def test_whatever_decides_the_numbers_makes_another_entry(tmp_path, model):
    PromptCache(tmp_path / "kept", model, MADE_WITH).keep("x", embeds(0))
    for made_with in (
        {"dtype": "float32", "length": 3},
        {"dtype": "bfloat16", "length": 4},
        MADE_WITH | {"torch": "9"},
    ):
        assert PromptCache(tmp_path / "kept", model, made_with).find("x") is None
    copy = shutil.copytree(model, tmp_path / "copy")
    assert PromptCache(tmp_path / "kept", copy, MADE_WITH).find("x") is not None, "the bytes count, not their place"
    for name in ("text_encoder", "tokenizer"):
        changed = shutil.copytree(model, tmp_path / f"changed {name}")
        (changed / name / "config.json").write_text("another")
        assert PromptCache(tmp_path / "kept", changed, MADE_WITH).find("x") is None
    with pytest.raises(UnfitError, match="text_encoder holds none of the files"):
        PromptCache(tmp_path / "kept", tmp_path / "nowhere", MADE_WITH)


@pytest.mark.parametrize("how", ["flipped", "cut", "empty", "another's"])
def test_a_damaged_entry_is_told_and_counts_as_none(tmp_path, model, capsys, how):
    cache = PromptCache(tmp_path / "kept", model, MADE_WITH)
    cache.keep("x", embeds(0))
    (path,) = (tmp_path / "kept").rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[-3] ^= 1
    elif how == "cut":
        del data[-1:]
    elif how == "empty":
        data.clear()
    else:
        cache.keep("y", embeds(1))
        (other,) = (file for file in (tmp_path / "kept").rglob("*.safetensors") if file != path)
        data = bytearray(other.read_bytes())
    path.write_bytes(bytes(data))
    assert cache.find("x") is None
    assert f"{path} is damaged; it is made again" in capsys.readouterr().out
    cache.keep("x", embeds(0))
    assert cache.find("x") is not None
