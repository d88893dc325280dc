"""This engine against its own golden files: what the other one is held to is what this one does."""

import numpy as np
import pytest

from cogvideox_factory.torch_engine import generate, prepare, train
from tests.golden import __main__ as writer
from tests.golden import difference, golden, runs


def test_ten_steps_of_training_are_what_this_engine_does():
    """Weights more loosely: where nothing depends on one, its gradient is rounding, and AdamW makes steps of that."""
    expected, found = golden("training"), writer.trainings()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if key.endswith("weights"):
            assert max(difference(ours, theirs) for ours, theirs in zip(found[key], values, strict=True)) <= 1e-3, key
        else:
            np.testing.assert_allclose(found[key], values, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("transformer", writer.transformers),
        ("vae", writer.vaes),
        ("text_encoder", writer.texts),
        ("lora", writer.loras),
    ],
)
def test_golden_files_are_what_this_engine_computes(name, make):
    """To the rounding of another order of sums: other machines have other kernels."""
    expected, found = golden(name), make()
    assert found.keys() == expected.keys()
    for key, records in expected.items():
        rows = zip(found[key].reshape(-1, records.shape[-1]), records.reshape(-1, records.shape[-1]))
        floor = 1e-3 * float(records.reshape(-1, records.shape[-1])[:, 1].max())
        assert max(difference(ours, theirs, floor=floor) for ours, theirs in rows) <= 5e-5, key


def test_fifty_steps_are_what_this_engine_does(tmp_path):
    """The curves the other engine is held to, the quick one of them."""
    found = runs.losses(train.run(runs.recipe("t2v lora", tmp_path)))
    np.testing.assert_allclose(found, golden("losses")["t2v lora"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("case", runs.BUCKETED)
def test_runs_of_several_shapes_are_what_this_engine_does(case, tmp_path):
    found = runs.losses(train.run(runs.bucketed(case, tmp_path)))
    np.testing.assert_allclose(found, golden("buckets")[case], rtol=0, atol=2e-5)


def test_entries_of_a_cache_are_what_this_engine_makes(tmp_path):
    prepare.run(runs.to_encode("i2v full", tmp_path))
    found, expected = runs.entries_of(tmp_path / "encoded"), golden("encoded")
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert (np.abs(found[name] - values) <= 2.0**-7 * np.maximum(np.abs(values), 1e-3)).all(), name


@pytest.mark.parametrize("case", runs.VIDEOS)
def test_frames_are_what_this_engine_makes(case, tmp_path):
    (path,) = generate.run(runs.video_request(case, tmp_path))
    assert np.abs(runs.seen(path).astype(int) - golden("videos")[case].astype(int)).max() <= 1


def test_a_lora_of_the_other_engine_makes_the_frames_it_made_there(tmp_path):
    expected = golden("by_mindspore")["video"].astype(int)
    ask = runs.video_request("t2v ddim lora", tmp_path, generate={"lora": [str(runs.LORAS["mindspore"])]})
    assert np.abs(runs.seen(generate.run(ask)[0]).astype(int) - expected).max() <= 2
    without = runs.video_request(
        "t2v ddim lora", tmp_path, generate={"lora": [], "lora_weight": [], "out": str(tmp_path / "without.npy")}
    )
    assert np.abs(runs.seen(generate.run(without)[0]).astype(int) - expected).max() > 10
