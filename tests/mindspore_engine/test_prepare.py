"""A cache by either engine is the same cache."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import numpy as np

from cogvideox_factory.cli import main
from cogvideox_factory.data.cache_index import verify_cache
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.mindspore_engine import prepare, train
from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE
from cogvideox_factory.recipe import write_recipe
from tests.golden import golden, runs


@pytest.mark.parametrize("mode", [0, 1])
def test_entries_have_the_names_and_numbers_of_the_other_engine(mode, tmp_path):
    """Names say what went in and with which settings; numbers differ by one rounding to bfloat16 at most."""
    index = prepare.run(runs.to_encode("i2v full", tmp_path, engine="mindspore", mindspore={"mode": mode}))
    assert len(index.clips) == 4
    found, expected = runs.entries_of(tmp_path / "encoded"), golden("encoded")
    assert found.keys() == expected.keys()
    assert any("image_mean" in name for name in expected)
    for name, values in expected.items():
        unit = 2.0**-7 * np.maximum(np.abs(values), 1e-3)  # bfloat16 has 8 bits
        assert (np.abs(found[name] - values) <= unit).all(), name
    assert verify_cache(tmp_path / "encoded") == []


def test_a_finished_cache_is_not_encoded_again_and_a_strangers_is_refused(tmp_path, monkeypatch):
    config = runs.to_encode("t2v lora", tmp_path, engine="mindspore")
    prepare.run(config)
    monkeypatch.setattr(CogVideoXVAE, "encode", lambda *given: pytest.fail("encoded again"))
    prepare.run(config)
    other = config.model_copy(update={"data": config.data.model_copy(update={"height": 48})})
    with pytest.raises(UnfitError, match=r"height"):
        train.run(other)


def test_an_amp_level_is_for_training(tmp_path, capsys):
    config = runs.to_encode("t2v lora", tmp_path, engine="mindspore")
    write_recipe(tmp_path / "recipe.yaml", config)
    assert main(["prepare", str(tmp_path / "recipe.yaml"), "--mindspore.amp-level", "O0"]) == 2
    assert "mindspore.amp_level=O0 has no effect here" in capsys.readouterr().err
