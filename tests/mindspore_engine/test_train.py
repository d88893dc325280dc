"""Runs: against the other engine's, resumed, compiled, from raw clips, and what is refused."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json
import math
from importlib.util import find_spec

import ml_dtypes
import numpy as np
from mindspore import ops
from safetensors.numpy import load_file

from cogvideox_factory.checkpoints import checkpoint_folder
from cogvideox_factory.cli import main
from cogvideox_factory.data.loader import CacheSource
from cogvideox_factory.errors import FactoryError, NonFiniteError, UnfitError
from cogvideox_factory.mindspore_engine import optim, train
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.tensors import open_tensors
from cogvideox_factory.weights import load_folder
from tests.golden import golden, runs

CURVES = 1e-4
"""Of two engines over fifty steps; seen are 3e-7 with LoRA and 3e-6 with all weights."""
SHORT = {"schedule": "constant", "warmup_steps": 0, "steps": 4}


def run(case, folder, name="run", **more):
    more["train"] = SHORT | {"dir": str(folder / name)} | more.get("train", {})
    return train.run(runs.recipe(case, folder, engine="mindspore", **more))


def assert_same_end(one, other, step=4):
    """Hold the last checkpoint and the export of two runs to every bit."""
    files = [f.relative_to(one) for f in (one / "final").rglob("*.safetensors")]
    files.append((checkpoint_folder(one, step) / "shard-00001.safetensors").relative_to(one))
    for file in files:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


@pytest.mark.parametrize("case", runs.RUNS)
def test_fifty_steps_are_those_of_the_other_engine(case, tmp_path, monkeypatch):
    """The same recipe, cache and seed; the curves themselves differ from step to step by a thousand times as much.

    Captions and images are dropped in some of them, and first frames are noised ones of the cache.
    """
    seen, sample = [], CacheSource.sample
    monkeypatch.setattr(CacheSource, "sample", lambda *given: seen.append(sample(*given)) or seen[-1])
    folder = train.run(runs.recipe(case, tmp_path, engine="mindspore"))
    assert 5 < sum(not drawn["caption_keep"] for drawn in seen) < 50
    assert case != "i2v full" or 2 < sum(not drawn["image_keep"] for drawn in seen) < 30
    found, expected = runs.losses(folder), golden("losses")[case]
    assert len(found) == len(expected) == runs.NUM_STEPS
    assert np.abs(np.diff(expected)).mean() > 100 * CURVES
    assert np.abs(found - expected).max() <= CURVES
    card = (folder / "final" / "README.md").read_text()
    assert {"t2v lora": "pipeline_tag: text-to-video", "i2v full": "pipeline_tag: image-to-video"}[case] in card
    if case == "t2v lora":
        ours = load_file(folder / "final" / "pytorch_lora_weights.safetensors")
        theirs = load_file(runs.LORAS["torch"])
        assert ours.keys() == theirs.keys()
        for name, array in theirs.items():
            assert np.abs(ours[name] - array).max() <= 1e-3 * np.abs(array).max(), name
    else:
        final = CogVideoXTransformer.from_folder(folder / "final" / "transformer")
        assert load_folder(folder / "final" / "transformer").keys() == dict(final.iterate_arrays()).keys()


@pytest.mark.parametrize("case", runs.RUNS)
def test_a_run_that_is_resumed_is_the_same_to_the_bit(case, tmp_path):
    more = {"save_every": 2, "ema_decay": 0.5, "keep_checkpoints": 9}
    whole = run(case, tmp_path, train=more)
    parted = run(case, tmp_path, "parted", train={"resume": str(checkpoint_folder(whole, 2))} | more)
    assert runs.losses(parted).tolist() == runs.losses(whole)[2:].tolist()
    assert_same_end(whole, parted)
    with pytest.raises(UnfitError, match=r"train\.learning_rate"):
        run(case, tmp_path, train={"steps": 6, "learning_rate": 0.5} | more)


@pytest.mark.parametrize(("amp_level", "mode"), [("O2", 1), ("O3", 0)])
def test_float16_learns_nearly_the_same_and_is_resumed_to_the_bit(amp_level, mode, tmp_path):
    more = {"run": {"device": "cpu", "dtype": "float16"}, "mindspore": {"amp_level": amp_level, "mode": mode}}
    options = {"steps": 2, "save_every": 1, "learning_rate": 1e-2}
    whole = run("t2v lora", tmp_path, train=options, **more)
    plain = runs.losses(run("t2v lora", tmp_path, "plain", train=options))
    np.testing.assert_allclose(runs.losses(whole), plain, rtol=5e-3)
    assert np.abs(np.diff(plain)).min() > 5e-3 * plain.max()
    rows = [json.loads(row) for row in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(row["loss_scale"] == 2**16 for row in rows)
    if mode == 1:
        resumed = options | {"resume": str(checkpoint_folder(whole, 1))}
        assert_same_end(whole, run("t2v lora", tmp_path, "parted", train=resumed, **more), step=2)


def test_an_overflow_is_no_bad_step_and_halves_the_scale(tmp_path, monkeypatch):
    monkeypatch.setattr(optim, "FIRST_LOSS_SCALE", 2.0**28)
    more = {"train": {"steps": 6, "gradient_accumulation": 1}, "run": {"device": "cpu", "dtype": "float16"}}
    folder = run("t2v lora", tmp_path, **more)
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert 0 < last["skipped"] < 6
    assert last["loss_scale"] == 2.0 ** (28 - last["skipped"])
    assert not (folder / "quarantine.jsonl").exists()


def test_weights_in_bfloat16_learn_nearly_the_same_and_are_resumed_to_the_bit(tmp_path):
    options = {"steps": 2, "gradient_accumulation": 1, "save_every": 1, "learning_rate": 1e-3}
    stochastic = options | {"master_weights": "stochastic_bf16", "ema_decay": 0.5}
    plain = run("i2v full", tmp_path, "plain", train=options)
    whole = run("i2v full", tmp_path, train=stochastic)
    np.testing.assert_allclose(runs.losses(whole), runs.losses(plain), rtol=1e-2)
    assert runs.losses(whole).tolist() != runs.losses(plain).tolist()
    resumed = stochastic | {"resume": str(checkpoint_folder(whole, 1))}
    assert_same_end(whole, run("i2v full", tmp_path, "parted", train=resumed), step=2)
    (final,) = (whole / "final" / "transformer").glob("*.safetensors")
    for file in (checkpoint_folder(whole, 2) / "shard-00001.safetensors", final):
        with open_tensors(file) as tensors:
            found = {tensors.dtype(name) for name in tensors.names if not name.startswith("ema.")}
        assert found == {np.dtype(ml_dtypes.bfloat16)}


def test_averages_are_what_is_exported(tmp_path):
    plain, averaged = run("t2v lora", tmp_path), run("t2v lora", tmp_path, "averaged", train={"ema_decay": 0.9})
    assert runs.losses(plain).tolist() == runs.losses(averaged).tolist()
    one, other = (load_file(f / "final" / "pytorch_lora_weights.safetensors") for f in (plain, averaged))
    assert all(0 < np.abs(one[n] - other[n]).max() < 0.1 for n in one if "lora_B" in n)


def test_a_graph_and_computing_again_change_rounding_only(tmp_path):
    plain = runs.losses(run("t2v lora", tmp_path, train={"steps": 3}))
    for name, more in {
        "again": {"train": {"steps": 3, "checkpointing": "full"}},
        "graph": {
            "train": {"steps": 3, "checkpointing": "save_attention"},
            "mindspore": {"mode": 0, "jit_level": "O1"},
        },
    }.items():
        np.testing.assert_allclose(runs.losses(run("t2v lora", tmp_path, name, **more)), plain, rtol=0, atol=1e-5)


def test_the_loss_on_held_out_clips_moves_only_with_the_weights(tmp_path):
    curves = {}
    for rate in (0.0, 1e-2):
        train_settings = {"learning_rate": rate, "batch_size": 1, "ema_decay": 0.5}
        more = {"train": train_settings, "validation": {"every": 2, "num_clips": 1}}
        rows = (run("t2v lora", tmp_path, f"{rate}", **more) / "metrics.jsonl").read_text().splitlines()
        found = [json.loads(row) for row in rows if "validation_loss" in row]
        assert [row["step"] for row in found] == [0, 2, 4]
        assert all(f"validation_loss_t{t}" in found[0] for t in (125, 375, 625, 875))
        curves[rate] = [row["validation_loss"] for row in found]
    assert len(set(curves[0.0])) == 1
    assert len(set(curves[1e-2])) == 3
    assert curves[0.0][0] == curves[1e-2][0]


def test_raw_clips_are_what_is_prepared(tmp_path):
    """Up to the rounding to bfloat16 of what a cache keeps."""
    from cogvideox_factory.mindspore_engine import prepare

    encoded = runs.to_encode("t2v lora", tmp_path, engine="mindspore")
    prepare.run(encoded)
    cached = runs.losses(run("t2v lora", tmp_path, "cached", train={"steps": 2}, cache={"dir": encoded.cache.dir}))
    raw = runs.losses(run("t2v lora", tmp_path, "raw", train={"steps": 2}, cache={"dir": None}))
    np.testing.assert_allclose(raw, cached, rtol=2e-2)
    assert not np.array_equal(raw, cached)


def test_a_step_that_is_not_finite_is_skipped_and_its_clips_are_named(tmp_path, monkeypatch):
    micro, calls = Learner.micro, []

    def broken(self, batch):
        calls.append(1)
        losses = micro(self, batch)
        if len(calls) != 3:  # the first of two in the second step
            return losses
        self.update.add([ops.full_like(p, math.nan) for p in self.update.trained])
        return losses * math.nan

    monkeypatch.setattr(Learner, "micro", broken)
    folder = run("t2v lora", tmp_path)
    rows = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reason"]) for row in rows] == [(2, "loss.nonfinite")] * 2
    assert json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["skipped"] == 1
    calls.clear()
    with pytest.raises(NonFiniteError, match=r"step 2.*on_bad_step=stop"):
        run("t2v lora", tmp_path, "stopped", train={"on_bad_step": "stop"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--train.optimizer", "came"], "train.optimizer=came: the MindSpore engine has not got this; use adamw"),
        (["--parallel.replicas", "2"], "parallel.replicas=2: the MindSpore engine has not got this"),
        (["--train.fp8", "rowwise"], "train.fp8=rowwise: the MindSpore engine has not got this; use none, or --engine"),
        (["--train.optimizer", "adamw8bit"], "train.optimizer=adamw8bit: the MindSpore engine has not got this"),
        (
            ["--train.method", "full", "--train.master-weights", "stochastic_bf16", "--parallel.zero", "1"],
            "train.master_weights=stochastic_bf16 with parallel.zero=1: the MindSpore engine rounds whole weights",
        ),
        (["--train.compile", "default"], "--mindspore.mode 0 compiles here"),
        (["--mindspore.jit-level", "O1"], "mindspore.jit_level has no effect with mindspore.mode=1"),
        (["--engine", "torch", "--mindspore.mode", "0"], "mindspore.mode has no effect with engine=torch"),
    ],
)
def test_what_it_has_not_got_is_refused_by_name_before_anything_loads(words, told, capsys):
    assert main(["train", "--engine", "mindspore", "--model.path", "/nowhere", *words]) == 2
    assert told in capsys.readouterr().err


def test_all_that_is_lacking_is_told_at_once(capsys):
    assert main(["train", "--engine", "mindspore", "--train.optimizer", "prodigy", "--parallel.guidance", "2"]) == 2
    told = capsys.readouterr().err
    assert "train.optimizer=prodigy" in told
    assert "parallel.guidance=2" in told


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed here")
def test_an_engine_that_is_not_installed_is_told_with_the_way_out(capsys):
    assert main(["train", "--model.path", "tiny-t2v", "--cache.dir", "x"]) == 4
    assert "engine=torch: torch is not installed here" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"run": {"dtype": "bfloat16"}}, "no bfloat16 arithmetic on a CPU"),
        ({"mindspore": {"amp_level": "O2"}}, r"amp_level=O2 computes in half precision.*float32"),
        ({"mindspore": {"mode": 0, "jit_level": "O2"}}, "a CPU has none"),
    ],
)
def test_a_precision_or_level_that_cannot_be_is_refused(more, told, tmp_path):
    with pytest.raises(FactoryError, match=told):
        run("t2v lora", tmp_path, **more)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"run": {"dtype": "float16"}}, r"run\.dtype=float16 cannot hold"),
        ({"mindspore": {"amp_level": "O0"}}, r"mindspore\.amp_level=O0 in float32; choose one"),
    ],
)
def test_weights_in_bfloat16_beside_another_precision_are_refused(more, told, tmp_path):
    with pytest.raises(FactoryError, match=told):
        run("i2v full", tmp_path, train={"master_weights": "stochastic_bf16"}, **more)
