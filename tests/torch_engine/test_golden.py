"""This engine against its own golden files: what the other one is held to is what this one does."""

import numpy as np
import pytest
import torch

from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine import generate, prepare, train
from tests.golden import __main__ as writer
from tests.golden import cases, difference, error, golden, runs


def test_ten_steps_of_training_are_what_this_engine_does():
    expected, found = golden("training"), writer.trainings()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if not key.endswith("weights"):
            np.testing.assert_allclose(found[key], values, rtol=2e-5, atol=2e-5, err_msg=key)
            continue
        allowed = cases.trained_tolerances(key.partition("/")[0], len(values))
        for row, (ours, theirs, most) in enumerate(zip(found[key], values, allowed, strict=True)):
            assert difference(ours, theirs) <= most, (key, row)


def test_ten_steps_of_denoising_are_what_this_engine_does():
    expected, found = golden("denoising"), writer.denoised()
    assert found.keys() == expected.keys()
    for case, steps in expected.items():
        assert len(steps) == cases.NUM_DENOISING_STEPS
        assert max(difference(ours, theirs) for ours, theirs in zip(found[case], steps, strict=True)) <= 5e-5, case


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


@pytest.mark.parametrize("case", runs.EXPORTED)
def test_diffusers_loads_what_the_other_engine_trained_and_predicts_the_same(case):
    """Both are exports of its runs, made without torch."""
    from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel

    expected, folder = golden("by_mindspore")[f"exported {case}"], runs.EXPORTED[case]
    if case.endswith("full"):
        model = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    else:
        pipe = CogVideoXPipeline.from_pretrained(cases.model_folder(cases.TASKS["t2v"]))
        model = pipe.transformer
        assert error(_predicted(model), expected) > 1e-2, "without the LoRA it predicts something else"
        pipe.load_lora_weights(str(folder), weight_name="pytorch_lora_weights.safetensors")
    assert error(_predicted(model), expected) <= 1e-4


def _predicted(model) -> np.ndarray:
    given = cases.step_for(TransformerConfig.from_dict(dict(model.config), source="diffusers"))
    with torch.inference_mode():
        (v,) = model(
            torch.from_numpy(given.latents), torch.from_numpy(given.prompt_embeds), torch.from_numpy(given.timesteps),
            return_dict=False,
        )  # fmt: skip
    return v.numpy()
