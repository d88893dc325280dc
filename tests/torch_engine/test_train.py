"""Whole training runs with the tiny model: exactness, resume, what the run folder holds, what is refused."""

import json
import re
import shutil
import signal
import sys
import threading
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from torch import Tensor

from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import (
    ExhaustedError,
    FactoryError,
    MissingError,
    NonFiniteError,
    StorageError,
    UnfitError,
)  # fmt: skip
from cogvideox_factory.recipe import check, read_recipe
from cogvideox_factory.run_folder import locked
from cogvideox_factory.stopping import StoppedError
from cogvideox_factory.torch_engine import checkpoint, loop, offload, prepare, saving, start, train
from cogvideox_factory.torch_engine.lora import lora_arrays
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline as OurPipeline
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.clips import draw_clips
from tests.torch_engine.host_reads import HostReads
from tests.torch_engine.runs import assert_same, weights_of

VARIANT = {"t2v": "cogvideox1.5-5b", "i2v": "cogvideox-5b-i2v"}
CALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Six drawn clips with captions beside them."""
    return draw_clips(tmp_path_factory.mktemp("clips"), [(9, 64, 96)] * 6)


def test_pictures_alone_are_learnt_as_clips_of_one_frame(tiny_model, tmp_path):
    """Cached and raw alike; a LoRA of them loads into the pipeline that makes videos."""
    rng = np.random.default_rng(0)
    for index in range(4):
        write_png(tmp_path / f"stills/{index}.png", rng.integers(0, 256, (64 + 16 * index, 96, 3), dtype=np.uint8))
        (tmp_path / f"stills/{index}.txt").write_text(f"noise {index}")
    given = {"data": {"num_frames": 1}, "train": {"steps": 4, "dir": str(tmp_path / "raw")}}
    prepare.run(settings(tiny_model, tmp_path / "stills", cache={"dir": str(tmp_path / "cache")}, **given))
    raw = train.run(settings(tiny_model, tmp_path / "stills", **given))
    given["train"] |= {"dir": str(tmp_path / "cached")}
    cached = train.run(settings(tiny_model, tmp_path / "stills", cache={"dir": str(tmp_path / "cache")}, **given))
    assert len(losses(raw)) == 4
    np.testing.assert_allclose(losses(cached), losses(raw), rtol=2e-2)  # cached latents are bfloat16
    assert max(abs(value).max() for name, value in weights_of(raw).items() if ".lora_B." in name) > 0


@pytest.fixture(scope="module")
def caches(tmp_path_factory, tiny_model, clips):
    """Return `caches(task)`: a prepared cache folder."""
    made = {}

    def make(task: str) -> Path:
        if task not in made:
            folder = tmp_path_factory.mktemp(f"cache-{task}")
            prepare.run(settings(tiny_model, clips, task=task, cache=cache_section(task, folder)))
            made[task] = folder
        return made[task]

    return make


def cache_section(task: str, folder: Path) -> dict:
    return {"dir": str(folder)} | ({"image_noise_variants": 2} if task == "i2v" else {})


def settings(tiny_model, clips, *, task="t2v", **sections):
    is_lora = sections.get("train", {}).get("method") != "full"
    values = {
        "task": task,
        "model": {"path": str(tiny_model(VARIANT[task]))},
        "data": {"root": str(clips), "fps": 8.0} | sections.pop("data", {}),
        "run": {"device": "cpu", "dtype": "float32"} | sections.pop("run", {}),
        "lora": ({"rank": 4, "alpha": 8.0} if is_lora else {}) | sections.pop("lora", {}),
        "train": {
            "steps": 6, "log_every": 1, "save_every": 3, "learning_rate": 1e-2, "batch_size": 2, "checkpointing": "none"
        } | sections.pop("train", {}),
        **sections,
    }  # fmt: skip
    return check(values, source="test")


def cached(tiny_model, clips, caches, tmp_path, *, task="t2v", train=None, **sections):
    cache = cache_section(task, caches(task))
    train = {"dir": str(tmp_path / "run")} | (train or {})
    return settings(tiny_model, clips, task=task, cache=cache, train=train, **sections)


def losses(run: Path) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_two_runs_are_bit_identical_and_so_is_a_resumed_one(
    tiny_model, clips, caches, tmp_path, monkeypatch, task, method
):
    runs = [tmp_path / name for name in ("first", "second", "stopped")]
    options = {
        "method": method,
        "ema_decay": 0.9,
        "gradient_accumulation": 2,
        "batch_size": 1,
        "num_workers": 1,
    }
    for run in runs[:2]:
        train.run(cached(tiny_model, clips, caches, tmp_path, task=task, train=options | {"dir": str(run)}))
    config = cached(tiny_model, clips, caches, tmp_path, task=task, train=options | {"dir": str(runs[2])})
    with monkeypatch.context() as patch:
        original = loop.Loop._step

        def dying(self, step, batches):
            if step == 5:
                raise RuntimeError("power cut")
            original(self, step, batches)

        patch.setattr(loop.Loop, "_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(config)
    assert [s for s, _ in losses(runs[2])] == [1, 2, 3, 4]
    train.run(config)
    assert_same(runs[0], runs[1])
    assert_same(runs[0], runs[2])
    assert losses(runs[0]) == losses(runs[1]) == losses(runs[2])
    assert len(losses(runs[0])) == 6


def test_a_finished_run_goes_on_when_asked_for_more_steps(tiny_model, clips, caches, tmp_path):
    short, long = tmp_path / "short", tmp_path / "long"
    train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(short)}))
    train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(short), "steps": 9}))
    train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(long), "steps": 9}))
    assert_same(short, long)
    assert losses(short) == losses(long)


def test_the_run_folder_reruns_as_it_is(tiny_model, clips, caches, tmp_path, capsys):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, run={"peak_tflops": 0.5}))
    config = read_recipe(run / "config.yaml")
    assert (config.data.num_frames, config.data.height, config.data.width) == (9, 64, 96)
    assert config.text.max_sequence_length == 16
    again = config.model_copy(update={"train": config.train.model_copy(update={"dir": str(tmp_path / "again")})})
    assert_same(run, train.run(again))
    assert {p.name for p in run.iterdir() if not p.name.startswith(".")} == {
        "config.yaml", "metrics.jsonl", "losses.jsonl", "tensorboard", "checkpoint-000003", "checkpoint-000006", "final"
    }  # fmt: skip
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert all(row[name] > 0 for name in ("tokens_per_second", "memory_gib", "host_memory_gib", "weight_norm"))
    assert row["mfu"] == pytest.approx(row["tflops_per_card"] / 0.5)
    assert capsys.readouterr().out.count("MFU against 0.5 TFLOP/s a card (run.peak_tflops)") == 2
    samples = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
    assert [row["step"] for row in samples] == [step for step in range(1, 7) for _ in range(2)]
    assert [loss for _, loss in losses(run)] == pytest.approx(
        [(a["loss"] + b["loss"]) / 2 for a, b in zip(samples[::2], samples[1::2], strict=True)]
    )


def test_a_lora_trained_at_rate_zero_changes_no_bit(tiny_model, clips, caches, tmp_path):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"learning_rate": 0.0, "weight_decay": 0.0}))
    pipe = OurPipeline.from_pretrained(tiny_model("cogvideox1.5-5b"), device="cpu")
    base = pipe("a red circle", **CALL)[0][0]
    pipe.load_lora_weights(run)
    assert np.array_equal(base, pipe("a red circle", **CALL)[0][0])


@pytest.mark.parametrize("alpha", [4.0, 16.0])
def test_a_lora_trained_here_gives_the_same_frames_in_diffusers(tiny_model, clips, caches, tmp_path, alpha):
    config = cached(
        tiny_model, clips, caches, tmp_path, lora={"rank": 4, "alpha": alpha}, train={"learning_rate": 5e-2}
    )
    run = train.run(config)
    folder = tiny_model("cogvideox1.5-5b")
    pipe = OurPipeline.from_pretrained(folder, device="cpu", tiling=False)
    call = CALL | {"guidance_scale": 6.0}
    base = pipe("a red circle", sampler="ddim", **call)[0][0]
    pipe.load_lora_weights(run, adapter_name="mine")
    pipe.set_adapters(["mine"], [1.0])
    video = pipe("a red circle", sampler="ddim", **call)[0][0]
    assert np.abs(video.astype(int) - base).max() > 2, "a LoRA that does nothing proves nothing"

    theirs = CogVideoXPipeline.from_pretrained(folder)
    theirs.load_lora_weights(str(run / "final"), weight_name="pytorch_lora_weights.safetensors", adapter_name="mine")
    theirs.set_adapters("mine", 1.0)
    theirs.set_progress_bar_config(disable=True)
    from diffusers import CogVideoXDDIMScheduler

    from cogvideox_factory import draws

    theirs.scheduler = CogVideoXDDIMScheduler.from_config(theirs.scheduler.config)
    latents = torch.from_numpy(draws.normal(42, "initial noise", shape=(1, 4, 16, 8, 12)))
    reference = theirs("a red circle", latents=latents, output_type="np", max_sequence_length=16, **call).frames[0]
    assert np.abs(np.rint(reference * 255) - video).max() <= 1


def test_a_fine_tuned_transformer_loads_in_diffusers_with_equal_weights(tiny_model, clips, caches, tmp_path):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"method": "full", "learning_rate": 1e-3}))
    theirs = CogVideoXTransformer3DModel.from_pretrained(run / "final" / "transformer")
    ours = CogVideoXTransformer.from_folder(run / "final" / "transformer", dtype=torch.float32, device="cpu")
    for name, value in ours.to_arrays().items():
        assert np.array_equal(value, theirs.state_dict()[name].numpy()), name


@pytest.mark.parametrize(
    ("master_weights", "optimizer"),
    [("float32", "adamw"), ("stochastic_bf16", "adamw"), ("stochastic_bf16", "adamw8bit")],
)
def test_full_fine_tuning_in_bfloat16_follows_float32(tiny_model, clips, caches, tmp_path, master_weights, optimizer):
    options = {"method": "full", "steps": 12, "save_every": 12}
    exact = train.run(cached(tiny_model, clips, caches, tmp_path, train=options | {"dir": str(tmp_path / "exact")}))
    half = train.run(
        cached(
            tiny_model, clips, caches, tmp_path, run={"dtype": "bfloat16"},
            train=options
            | {"dir": str(tmp_path / "half"), "master_weights": master_weights, "optimizer": optimizer},
        )
    )  # fmt: skip
    for (_, a), (_, b) in zip(losses(exact), losses(half), strict=True):
        assert b == pytest.approx(a, rel=0.1)
    assert losses(half)[-1][1] < losses(half)[0][1]


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "prodigy"), ("full", "came")])
def test_raw_clips_flips_dora_and_validation_resume_exactly(
    tiny_model, clips, tmp_path, monkeypatch, capsys, method, optimizer
):
    """Everything that draws numbers or keeps state at once, logged every third step, without a cache."""
    prompts = {"every": 2, "num_clips": 1, "prompts": ["a red circle"]}
    options = {"method": method, "ema_decay": 0.9, "gradient_accumulation": 2, "log_every": 3, "save_every": 4}
    options |= {"optimizer": optimizer, "learning_rate": 1.0 if optimizer == "prodigy" else 1e-3}

    def make(name: str):
        return settings(
            tiny_model, clips, data={"flip_probability": 0.5, "crop": "random", "height": 48}, validation=prompts,
            sampling={"steps": 2}, lora={"use_dora": True} if method == "lora" else {},
            train=options | {"dir": str(tmp_path / name), "checkpointing": "save_attention"},
        )  # fmt: skip

    whole = train.run(make("whole"))
    original = loop.Loop._step

    def dying(self, step, batches):
        if step == 6:
            raise RuntimeError("power cut")
        original(self, step, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(make("cut"))
    assert_same(whole, train.run(make("cut")))
    assert losses(whole) == losses(tmp_path / "cut")
    said = capsys.readouterr().out
    assert "and beside it the VAE, which encodes raw clips (a cache" in said
    assert "and decodes sample videos: 0.0" in said


@pytest.mark.parametrize(("method", "optimizer"), [("lora", "adamw8bit"), ("full", "adam")])
def test_float16_trains_with_a_loss_scale_and_resumes_exactly(
    tiny_model, clips, caches, tmp_path, monkeypatch, method, optimizer
):
    monkeypatch.setattr(start, "_require_accelerator", lambda name, device: None)
    options = {"method": method, "save_every": 2, "optimizer": optimizer, "optimizer_offload": optimizer == "adam"}
    make = lambda name, steps: cached(  # noqa: E731
        tiny_model, clips, caches, tmp_path, run={"dtype": "float16"},
        train=options | {"dir": str(tmp_path / name), "steps": steps},
    )  # fmt: skip
    whole = train.run(make("whole", 4))
    train.run(make("cut", 2))
    assert_same(whole, train.run(make("cut", 4)))
    row = json.loads((whole / "metrics.jsonl").read_text().splitlines()[-1])
    assert row["loss_scale"] >= 1
    assert row["skipped"] == 0


def test_float16_that_only_overflows_is_an_error(tiny_model, clips, caches, tmp_path, monkeypatch):
    def overflowed(tensors, ranks):
        return torch.tensor(1.0 if next(iter(tensors)).requires_grad else float("inf"))  # weights are well

    monkeypatch.setattr("cogvideox_factory.torch_engine.optim.total_norm", overflowed)
    config = cached(tiny_model, clips, caches, tmp_path, run={"dtype": "float16"}, train={"steps": 30, "log_every": 30})
    with pytest.raises(NonFiniteError, match="bfloat16"):
        train.run(config)
    assert not (tmp_path / "run" / "final").exists()


def test_a_cache_of_other_clips_is_refused(tiny_model, clips, caches, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    with pytest.raises(UnfitError, match=r"last prepared from other clips:\n  data\.root"):
        train.run(cached(tiny_model, elsewhere, caches, tmp_path))
    train.run(cached(tiny_model, clips, caches, tmp_path, data={"root": ""}))


def test_a_refused_run_leaves_nothing_and_a_refused_resume_changes_nothing(tiny_model, clips, caches, tmp_path):
    run = train.run(cached(tiny_model, clips, caches, tmp_path))
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    for change in ({"learning_rate": 0.5}, {"steps": 3}):
        with pytest.raises(FactoryError):
            train.run(cached(tiny_model, clips, caches, tmp_path, train=change))
    assert before == {p: p.read_bytes() for p in run.rglob("*") if p.is_file() and p.name != ".lock"}
    with pytest.raises(FactoryError, match="to_z"):
        train.run(
            cached(
                tiny_model, clips, caches, tmp_path, lora={"target_modules": ["to_z"]},
                train={"dir": str(tmp_path / "fresh")},
            )
        )  # fmt: skip
    assert not (tmp_path / "fresh").exists()


def test_a_named_checkpoint_sets_later_ones_aside(tiny_model, clips, caches, tmp_path):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"keep_checkpoints": 1, "save_every": 2}))
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-000006"]
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "b"), "save_every": 2}))
    with pytest.raises(FactoryError, match="is a run folder; name one of its checkpoints"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(run), "resume": str(run)}))
    named = {"dir": str(run), "resume": str(run / "checkpoint-000002"), "save_every": 2, "keep_checkpoints": 2}
    again = train.run(cached(tiny_model, clips, caches, tmp_path, train=named))
    assert_same(run, again)
    assert sorted(p.name for p in run.glob("*checkpoint-*")) == [
        "abandoned-checkpoint-000004", "abandoned-checkpoint-000006", "checkpoint-000004", "checkpoint-000006"
    ]  # fmt: skip


def test_a_second_process_is_kept_out(tiny_model, clips, caches, tmp_path):
    with locked(tmp_path / "run"), pytest.raises(FactoryError, match="another process is training there"):
        train.run(cached(tiny_model, clips, caches, tmp_path))


def test_a_full_disk_loses_a_checkpoint_but_not_the_run(tiny_model, clips, caches, tmp_path, monkeypatch, capsys):
    original, calls = checkpoint.save_tensors, []

    def full_once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise StorageError("the disk is full")
        original(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_tensors", full_once)
    run = train.run(cached(tiny_model, clips, caches, tmp_path))
    assert "NOT SAVED at step 3" in capsys.readouterr().out
    assert [p.name for p in run.glob("checkpoint-*")] == ["checkpoint-000006"]
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10, 10, 10))
    with pytest.raises(StorageError, match=r"checkpoint\(s\) of this run needs about"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "full")}))
    assert not (tmp_path / "full").exists()


def test_a_resume_asks_no_room_for_the_checkpoints_that_are_there(tiny_model, clips, caches, tmp_path, monkeypatch):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"keep_checkpoints": 2}))
    size = sum(path.stat().st_size for path in (run / "checkpoint-000006").iterdir())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10 * size, 8 * size, 2 * size))
    train.run(cached(tiny_model, clips, caches, tmp_path, train={"keep_checkpoints": 2, "steps": 9}))
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-000006", "checkpoint-000009"]
    with pytest.raises(StorageError, match="3 more checkpoint"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"keep_checkpoints": 4, "steps": 12}))


@pytest.mark.parametrize("mode", ["full", "save_attention"])
def test_checkpointing_changes_no_loss(tiny_model, clips, caches, tmp_path, mode):
    plain = train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "plain")}))
    other = train.run(
        cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / mode), "checkpointing": mode})
    )
    assert [x for _, x in losses(other)] == pytest.approx([x for _, x in losses(plain)], rel=1e-5)


@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_raw_clips_train_like_their_cache(tiny_model, clips, caches, tmp_path, task):
    """The cache rounds moments to bfloat16, so losses agree closely, not exactly; noise is off for i2v."""
    options = {"caption_dropout": 0.5} | ({"image_noise": False} if task == "i2v" else {})
    fed = train.run(
        cached(tiny_model, clips, caches, tmp_path, task=task, train=options | {"dir": str(tmp_path / "c")})
    )
    raw = train.run(settings(tiny_model, clips, task=task, train=options | {"dir": str(tmp_path / "r")}))
    assert [x for _, x in losses(raw)] == pytest.approx([x for _, x in losses(fed)], rel=2e-2)


def test_validation_uses_held_out_clips_and_makes_videos(tiny_model, clips, caches, tmp_path):
    config = cached(
        tiny_model, clips, caches, tmp_path,
        train={"learning_rate": 0.0}, sampling={"steps": 2},
        validation={"every": 3, "num_clips": 2, "prompts": ["a red circle", "a blue ring"]},
    )  # fmt: skip
    run = train.run(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [(row["step"], row["validation_loss"]) for row in rows if "validation_loss" in row]
    assert [step for step, _ in values] == [0, 3, 6]
    assert len({value for _, value in values}) == 1, "same clips, noise and timesteps, and rate 0"
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        f"step-{step:06}-{index:02}.mp4" for step in (0, 3, 6) for index in (0, 1)
    ]


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_step_never_waits_for_the_device(tiny_model, clips, caches, tmp_path, monkeypatch, method):
    """`count.sync.train_step` is 0 between log points, with everything on that a step can do."""
    original, found = loop.Loop._step, []

    def watched(self, step, batches):
        with HostReads() as reads:
            original(self, step, batches)
        found.append(reads.found)

    monkeypatch.setattr(loop.Loop, "_step", watched)
    options = {
        "method": method, "ema_decay": 0.9, "gradient_accumulation": 2, "checkpointing": "save_attention",
        "spike_factor": 100.0, "schedule": "cosine",
    }  # fmt: skip
    train.run(cached(tiny_model, clips, caches, tmp_path, task="i2v", train=options))
    assert found == [[]] * 6


@pytest.mark.parametrize(
    "read",
    [
        Tensor.item, Tensor.tolist, Tensor.cpu, Tensor.numpy, bool, float, int, torch.nonzero, torch.unique,
        lambda x: x[x > 0], lambda x: x if x > 0 else None,
    ],
)  # fmt: skip
def test_the_counter_counts(read):
    with HostReads() as reads:
        read(torch.ones(1))
    assert reads.found


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_a_step_never_waits_for_a_card(tiny_model, clips, caches, tmp_path, monkeypatch):
    """The driver's own word for it; the first two steps, in which kernels are chosen and moments made, aside."""
    original = loop.Loop._step

    def watched(self, step, batches):
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        try:
            original(self, step, batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop.Loop, "_step", watched)
    config = cached(tiny_model, clips, caches, tmp_path, train={"spike_factor": 100.0}, run={"device": "cuda"})
    assert len(losses(train.run(config))) == 6


def test_sigterm_saves_and_the_same_command_goes_on(tiny_model, clips, caches, tmp_path, monkeypatch):
    whole = train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "whole")}))
    config = cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "cut")})
    original = loop.Loop._step

    def interrupted(self, step, batches):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        original(self, step, batches)

    assert threading.current_thread() is threading.main_thread()
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", interrupted)
        with pytest.raises(StoppedError, match="SIGTERM after step 2") as stopped:
            train.run(config)
    assert stopped.value.exit_code == 75
    assert (tmp_path / "cut" / "checkpoint-000002").is_dir()
    assert_same(whole, train.run(config))


@pytest.mark.parametrize("moment", ["_hear", "_log"])
def test_a_signal_after_all_have_agreed_to_go_on_is_heard_after_the_next_step(
    tiny_model, clips, caches, tmp_path, monkeypatch, moment
):
    """Nothing is saved at the step in hand, so to leave there would lose it."""
    config = cached(tiny_model, clips, caches, tmp_path)
    original = getattr(loop.Loop, moment)

    def interrupted(self, step, *args, **kwargs):
        found = original(self, step, *args, **kwargs)
        if step == 1:
            signal.raise_signal(signal.SIGTERM)
        return found

    monkeypatch.setattr(loop.Loop, moment, interrupted)
    with pytest.raises(StoppedError, match="SIGTERM after step 2"):
        train.run(config)
    assert (tmp_path / "run" / "checkpoint-000002").is_dir()


def test_a_damaged_checkpoint_is_set_aside_and_an_older_one_used(tiny_model, clips, caches, tmp_path, capsys):
    whole = train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "whole"), "steps": 8}))
    config = cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "hurt")})
    hurt = train.run(config)
    shard = next((hurt / "checkpoint-000006").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(hurt), "steps": 8}))
    assert "changed or damaged" in capsys.readouterr().out
    assert (hurt / "broken-checkpoint-000006").is_dir()
    assert_same(whole, hurt)


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_weights(
    tiny_model, clips, caches, tmp_path, monkeypatch
):
    train_options = {"log_every": 4, "save_every": 4, "steps": 8, "on_bad_step": "stop"}
    config = cached(tiny_model, clips, caches, tmp_path, train=train_options)
    original = loop.Objective.__call__
    calls = []

    def spoiled(self, batch):
        calls.append(1)
        return original(self, batch) * (float("nan") if len(calls) == 6 else 1.0)

    monkeypatch.setattr(loop.Objective, "__call__", spoiled)
    with pytest.raises(NonFiniteError, match=r"step 6: .*checkpoint-000004"):
        train.run(config)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"task": "i2v"}, FactoryError, "task=i2v, but"),
        ({"data": {"height": 60}}, FactoryError, "multiples of 16"),
        ({"data": {"num_frames": 10}}, FactoryError, "num_frames=10"),
        ({"data": {"width": 112}}, FactoryError, "up to 64x96"),
        ({"data": {"num_frames": 5}}, UnfitError, "video.num_frames"),
        ({"data": {"trigger_word": "sks"}}, UnfitError, "trigger_word"),
        ({"lora": {"target_modules": ["to_z"]}}, FactoryError, "to_z"),
        ({"train": {"activation_offload": True}}, FactoryError, "on the CPU all is there already"),
        ({"train": {"swapped_blocks": 1}}, FactoryError, "on the CPU all is there already"),
        (
            {"train": {"checkpointing": "full", "checkpointing_layers": 3}},
            FactoryError,
            "train.checkpointing_layers=3: this model has 2 layers. Use at most 2.",
        ),
        ({"train": {"resume": "nowhere"}}, UnfitError, "MANIFEST.json is missing"),
        (
            {"train": {"master_weights": "stochastic_bf16", "method": "full"}, "lora": {"rank": 64, "alpha": 64.0}},
            FactoryError,
            "full fine-tuning in bfloat16",
        ),
        ({"validation": {"every": 2, "num_clips": 6}}, FactoryError, "leave none to train on"),
        ({"train": {"tracker": "trackio"}}, MissingError, "cogvideox-factory[trackio]"),
        ({"model": {"path": "/nowhere/model"}}, FactoryError, "/nowhere/model"),
    ],
)
def test_refuses_before_anything_is_trained(tiny_model, clips, caches, tmp_path, monkeypatch, change, error, says):
    monkeypatch.setitem(sys.modules, "trackio", None)  # not installed
    values = cached(tiny_model, clips, caches, tmp_path).model_dump()
    for section, fields in change.items():
        values[section] = fields if isinstance(fields, str) else values[section] | fields
    config = check(values, source="test")
    with pytest.raises(error) as caught:
        train.run(config)
    assert says in str(caught.value)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_resume_with_other_settings_is_refused_by_name(tiny_model, clips, caches, tmp_path):
    train.run(cached(tiny_model, clips, caches, tmp_path))
    with pytest.raises(UnfitError, match=r"train\.learning_rate: the run has 0\.01, you ask for 0\.02"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"learning_rate": 2e-2, "steps": 9}))
    with pytest.raises(FactoryError, match="holds a run already"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"resume": "never"}))


def test_a_resume_over_another_base_of_the_same_shape_is_refused(tiny_model, clips, caches, tmp_path):
    base = shutil.copytree(tiny_model(VARIANT["t2v"]) / "transformer", tmp_path / "base")
    config = cached(tiny_model, clips, caches, tmp_path, train={"steps": 2})
    config = config.model_copy(update={"model": config.model.model_copy(update={"transformer": str(base)})})
    train.run(config)
    file = base / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UnfitError, match="weights: the run has"):
        train.run(config)


def test_a_resume_may_change_what_it_names_and_the_checkpoint_says_so(tiny_model, clips, caches, tmp_path, capsys):
    run = train.run(cached(tiny_model, clips, caches, tmp_path))
    change = {"learning_rate": 2e-2, "steps": 7, "save_every": 5, "allow_change": ["train.learning_rate"]}
    train.run(cached(tiny_model, clips, caches, tmp_path, train=change))
    said = capsys.readouterr().out
    assert "CHANGED FROM STEP 6 ON, as train.allow_change says: train.learning_rate 0.01 -> 0.02" in said
    assert "no number depends on it: train.steps 6 -> 7, train.save_every 3 -> 5" in said
    train.run(cached(tiny_model, clips, caches, tmp_path, train=change | {"steps": 8}))
    assert "CHANGED" not in capsys.readouterr().out, "it is the run's own rate by now"
    state = json.loads((run / "checkpoint-000008" / "state.json").read_text())
    assert state["changes"] == [{"after_step": 6, "setting": "train.learning_rate", "from": 0.01, "to": 0.02}]
    with pytest.raises(UnfitError, match=r"train\.batch_size: the run has 2, you ask for 1[^:]*\n.*allow-change"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train=change | {"steps": 9, "batch_size": 1}))
    with pytest.raises(FactoryError, match=r"allow_change=lora\.rank: another lora\.rank is another model"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train=change | {"allow_change": ["lora.rank"]}))


def test_a_checkpoint_says_all_that_it_is_of(tiny_model, clips, caches, tmp_path):
    run = train.run(cached(tiny_model, clips, caches, tmp_path, train={"steps": 4}))
    state = json.loads((run / "checkpoint-000003" / "state.json").read_text())
    assert (state["format"], state["step"], state["seed"]) == (1, 3, 42)
    assert state["position"]["epoch"] == 1.0
    assert len(state["position"]["next_clips"]) == 2
    assert state["settings"]["train"]["learning_rate"] == 1e-2
    assert state["versions"].keys() == {"cogvideox_factory", "torch", "python"}
    assert (state["layout"]["size"], state["layout"]["device"]) == (1, "cpu")
    assert state["changes"] == []


def test_a_sampler_that_draws_other_clips_than_come_next_is_refused(tiny_model, clips, caches, tmp_path, monkeypatch):
    train.run(cached(tiny_model, clips, caches, tmp_path))
    original = loop.Sampler.batch
    monkeypatch.setattr(loop.Sampler, "batch", lambda self, step: original(self, step + 1))
    with pytest.raises(UnfitError, match=r"step 7 is of the clips .* Go on with the version it was saved by"):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"steps": 8}))


def test_saving_in_the_background_changes_no_byte(tiny_model, clips, caches, tmp_path):
    options = {"ema_decay": 0.9, "save_every": 2, "steps": 5}
    plain, behind = tmp_path / "plain", tmp_path / "behind"
    train.run(cached(tiny_model, clips, caches, tmp_path, train=options | {"dir": str(plain)}))
    train.run(
        cached(tiny_model, clips, caches, tmp_path, train=options | {"dir": str(behind), "async_checkpoint": True})
    )
    assert_same(plain, behind)
    for step in (2, 4, 5):
        name = f"checkpoint-{step:06}/shard-00001.safetensors"
        assert (plain / name).read_bytes() == (behind / name).read_bytes()


def test_a_loss_that_is_not_finite_does_not_cost_the_checkpoint_that_is_being_written(
    tiny_model, clips, caches, tmp_path, monkeypatch
):
    original, calls = loop.Objective.__call__, []
    written, is_over = checkpoint.save_tensors, threading.Event()

    def spoiled(self, batch):
        calls.append(1)
        return original(self, batch) * (float("nan") if len(calls) == 4 else 1.0)

    def slow(*args, **kwargs):
        assert is_over.wait(60)
        written(*args, **kwargs)

    def hear(self, words, *, must=False):
        if self.is_busy:
            is_over.set()
        heard(self, words, must=must)

    heard = saving.Saver.hear
    monkeypatch.setattr(loop.Objective, "__call__", spoiled)
    monkeypatch.setattr(checkpoint, "save_tensors", slow)
    monkeypatch.setattr(saving.Saver, "hear", hear)
    with pytest.raises(NonFiniteError):
        train.run(cached(tiny_model, clips, caches, tmp_path, train={"async_checkpoint": True, "on_bad_step": "stop"}))
    assert (tmp_path / "run" / "checkpoint-000003" / "MANIFEST.json").is_file()


def test_a_run_out_of_time_saves_leaves_and_goes_on_by_the_same_command(tiny_model, clips, caches, tmp_path):
    whole = train.run(cached(tiny_model, clips, caches, tmp_path, train={"dir": str(tmp_path / "whole"), "steps": 4}))
    options = {"dir": str(tmp_path / "cut"), "steps": 4}
    for step in (1, 2):  # a limit that has passed already leaves each start one step
        with pytest.raises(StoppedError, match=f"stopped by train.time_limit_minutes after step {step};"):
            train.run(cached(tiny_model, clips, caches, tmp_path, train=options | {"time_limit_minutes": 1e-6}))
        assert (tmp_path / "cut" / f"checkpoint-{step:06}").is_dir()
    assert_same(whole, train.run(cached(tiny_model, clips, caches, tmp_path, train=options)))


@pytest.mark.slow
def test_a_compiled_run_goes_the_same_way(tiny_model, clips, caches, tmp_path, monkeypatch, capsys):
    """With validation and sample videos in between, which are not compiled; by the quick half of the compiler."""
    monkeypatch.setattr(train, "compile_blocks", partial(train.compile_blocks, backend="aot_eager"))
    options = {"steps": 3, "ema_decay": 0.9}
    watched = {"every": 2, "num_clips": 1, "prompts": ["a red circle"]}
    runs = [
        train.run(
            cached(
                tiny_model, clips, caches, tmp_path, validation=watched, sampling={"steps": 2},
                train=options | {"dir": str(tmp_path / mode), "compile": mode},
            )
        )
        for mode in ("none", "default")
    ]  # fmt: skip
    plain, compiled = ([x for _, x in losses(run)] for run in runs)
    assert compiled == pytest.approx(plain, rel=1e-5)
    assert "compiling blocks (default): 2 graph(s) for 1 shape(s)" in capsys.readouterr().out


# --- memory -----------------------------------------------------------------------------------------------------------


def test_what_saves_memory_changes_no_bit_of_a_run(tiny_model, clips, caches, tmp_path, monkeypatch):
    """Swapped blocks, activations on the host and layers that recompute, as on a card, between two CPU buffers."""
    monkeypatch.setattr(start, "_require_accelerator", lambda name, device: None)
    monkeypatch.setattr(offload, "SMALLEST", 1024)
    options = {"steps": 3, "checkpointing": "full"}
    train.run(cached(tiny_model, clips, caches, tmp_path / "plain", train=options))
    sparing = {"swapped_blocks": 2, "activation_offload": True}
    train.run(cached(tiny_model, clips, caches, tmp_path / "sparing", train=options | sparing))
    assert_same(tmp_path / "plain" / "run", tmp_path / "sparing" / "run")


def test_a_lora_over_a_base_of_few_bits_loads_over_the_plain_model(tiny_model, clips, caches, tmp_path, capsys):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    config = cached(tiny_model, clips, caches, tmp_path, train={"steps": 3}, lora={"base": "int8"})
    train.run(config)
    assert "training needs about" in capsys.readouterr().out
    pipe = OurPipeline.from_pretrained(tiny_model(VARIANT["t2v"]), device="cpu", text_encoder=False)
    pipe.load_lora_weights(tmp_path / "run", adapter_name="mine")
    assert any(np.abs(array).max() > 0 for name, array in lora_arrays(pipe.transformer, "mine").items() if "B" in name)


def test_out_of_memory_tells_where_and_what_would_help(tiny_model, clips, caches, tmp_path, monkeypatch):
    calls = 0
    forward = CogVideoXTransformer.forward

    def full(self, *args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.\nmore words")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(CogVideoXTransformer, "forward", full)
    with pytest.raises(ExhaustedError) as caught:
        train.run(cached(tiny_model, clips, caches, tmp_path))
    assert caught.value.exit_code == 4
    first, _, *savings, last = str(caught.value).splitlines()
    assert re.fullmatch(
        r"out of memory at step 2, with clips of 9x64x96: \d+\.\d\d GiB were in use at most, cpu has \d+\.\d\d GiB\.",
        first,
    )
    assert last == "torch says: Tried to allocate 2.00 GiB."
    assert any("--train.checkpointing full" in line for line in savings)
    assert any("--train.batch-size for 1 clip(s) a process, not 2" in line for line in savings)
    bytes_told = [float(re.search(r"about ([\d.]+) GiB less", line)[1]) for line in savings]
    assert bytes_told == sorted(bytes_told, reverse=True)


def test_other_errors_are_not_taken_for_it(tiny_model, clips, caches, tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("shapes differ")

    monkeypatch.setattr(CogVideoXTransformer, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes differ"):
        train.run(cached(tiny_model, clips, caches, tmp_path))
