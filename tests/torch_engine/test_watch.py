"""Validation and sample videos: the same on any layout of processes, and never the end of a run."""

import json
import os
from contextlib import nullcontext

import numpy as np
import pytest
import torch

from cogvideox_factory.data.loader import CacheSource
from cogvideox_factory.errors import StorageError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import prepare, train, watch
from cogvideox_factory.torch_engine.ranks import Ranks
from tests.clips import draw_clips
from tests.torch_engine.processes import run_in
from tests.torch_engine.runs import assert_same, weights_of

PROMPTS = ["a red circle", "a blue ring", "a green square"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """Return a folder with six clips and their cache."""
    root = tmp_path_factory.mktemp("watched")
    draw_clips(root / "clips", [(9, 32, 48)] * 6)
    prepare.run(settings(tiny_model, root, root))
    return root


def settings(tiny_model, folder, run, *, prompts=(), parallel=None, **training):
    return check(
        {
            "model": {"path": str(tiny_model("cogvideox1.5-5b"))},
            "data": {"root": str(folder / "clips"), "fps": 8.0, "height": 32, "width": 48},
            "cache": {"dir": str(folder / "cache")},
            "run": {"device": "cpu", "dtype": "float32"},
            "train": {
                "method": "full", "dir": str(run), "steps": 1, "log_every": 1, "batch_size": 2, "learning_rate": 1e-3,
                "checkpointing": "none",
            } | training,
            "validation": {"every": 1, "num_clips": 2, "prompts": list(prompts)},
            "sampling": {"steps": 2},
            "parallel": parallel or {},
        },
        source="test",
    )  # fmt: skip


def rows(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def videos(run):
    return {path.stem: np.load(path) for path in sorted((run / "samples").glob("*.npy"))}


def train_and_keep_frames(*configs):
    """Train with each config, and write sample videos as arrays: H.264 would hide or add a difference."""

    def keep(video, path, *, fps):
        path.parent.mkdir(exist_ok=True)
        np.save(path.with_suffix(".npy"), video)
        return path

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "export_to_video", keep)
        for config in configs:
            train.run(config)


def test_videos_and_losses_of_divided_models_are_those_of_one_process(tiny_model, folder, tmp_path):
    """ZeRO 3 with the tokens of a video over both; and ZeRO 3 with prompts over both, three of them, so one waits."""
    train_and_keep_frames(settings(tiny_model, folder, tmp_path / "one", prompts=PROMPTS))
    layouts = {"tokens": {"zero": 3, "sequence": 2}, "prompts": {"zero": 3}}
    configs = [
        settings(tiny_model, folder, tmp_path / name, prompts=PROMPTS, parallel=layout)
        for name, layout in layouts.items()
    ]
    run_in(2, train_and_keep_frames, *configs, folder=tmp_path)
    one = videos(tmp_path / "one")
    assert list(one) == [f"step-{step:06}-{index:02}" for step in (0, 1) for index in range(3)]
    assert np.abs(one["step-000000-00"].astype(int) - one["step-000000-01"]).max() > 1, "prompts that all look alike"
    for name in layouts:
        many = videos(tmp_path / name)
        assert many.keys() == one.keys()
        for key, video in one.items():
            assert np.abs(many[key].astype(int) - video).max() <= 1, (name, key)
        for ours, theirs in zip(rows(tmp_path / name), rows(tmp_path / "one"), strict=True):
            for key in theirs:
                if "loss" in key:
                    assert ours[key] == pytest.approx(theirs[key], rel=1e-5), (name, key)


@pytest.mark.parametrize("size", [1, 3, 8, 16])
def test_processes_divide_the_passes_of_a_held_out_loss_and_come_to_the_model_equally_often(size):
    """Two clips at four timesteps: eight passes, each of which counts once, however many processes there are."""

    class Source:
        def sample(self, pick, draws):
            return {"timesteps": np.int64(0), "clip": np.float32(pick.clip_id), "epoch": np.int64(pick.epoch)}

    parts, calls = [], []
    for rank in range(size):
        own = Ranks(layout=Layout(size=size), rank=rank)
        seen = []

        def objective(batch, seen=seen):
            seen.append((batch["clip_ids"][0], int(batch["timesteps"])))
            return batch["clip"] * batch["timesteps"]

        parts.append(
            watch.held_out_loss(
                objective, Source(), ["1", "2"], None, encoder=None, device=torch.device("cpu"), ranks=own
            )  # pyright: ignore[reportArgumentType]
        )
        calls.append(len(seen))
    assert set(calls) == {-(-8 // size)}
    # Without a group `mean` is a process' own value, times as many as there are.
    assert sum(part["validation_loss_t375"] for part in parts) / size == pytest.approx(375 * 1.5)
    assert sum(part["validation_loss"] for part in parts) / size == pytest.approx(500 * 1.5)


def test_three_failures_end_the_watching_and_none_the_run(tiny_model, folder, tmp_path, monkeypatch, capsys):
    plain = train.run(settings(tiny_model, folder, tmp_path / "plain", steps=4, save_every=4))
    calls = []

    def failing(video, path, *, fps):
        calls.append(path.name)
        raise (
            StorageError("no room for it"), torch.OutOfMemoryError("no memory for it"),
            RuntimeError("[enforce fail at alloc_cpu.cpp:116] . DefaultCPUAllocator: can't allocate memory"),
        )[len(calls) - 1]  # fmt: skip

    monkeypatch.setattr(watch, "export_to_video", failing)
    run = train.run(settings(tiny_model, folder, tmp_path / "run", prompts=PROMPTS[:1], steps=4, save_every=4))
    assert calls == [f"step-{step:06}-00.mp4" for step in range(3)]
    said = capsys.readouterr().out
    assert said.count("VALIDATION FAILED") == 3
    assert said.count("after 3 failures there is no more validation") == 1
    assert [row["step"] for row in rows(run) if "validation_loss" in row] == [0, 1, 2]
    assert_same(plain, run)


@pytest.mark.parametrize("size", [1, 2])
def test_memory_that_runs_out_ends_a_run_only_where_others_wait(size, monkeypatch, capsys):
    """A CPU's error has no class of its own; what is no want of memory always ends the run."""
    ranks = Ranks(layout=Layout(size=size, sequence=size))
    parts = dict.fromkeys(("source", "draws", "samples", "objective", "encoder", "device", "run_folder"))
    looking = watch.Watch(every=1, clip_ids=[], ranks=ranks, **parts)  # pyright: ignore[reportArgumentType]
    for says, survives in (("can't allocate memory", size == 1), ("shapes do not match", False)):

        def measure(self, step, log, says=says):
            raise RuntimeError(says)

        monkeypatch.setattr(watch.Watch, "_measure", measure)
        with nullcontext() if survives else pytest.raises(RuntimeError, match=says):
            looking.look(1, None)  # pyright: ignore[reportArgumentType]
    assert capsys.readouterr().out.count("VALIDATION FAILED") == (size == 1)


def train_with_a_bad_disk(config):
    """Train in two processes, of which one cannot read held-out clips the first time."""
    original, failed = CacheSource.sample, []

    def sample(self, pick, draws):
        if pick.epoch < 0 and os.environ["RANK"] == "1" and not failed:
            failed.append(pick)
            raise OSError("Input/output error")
        return original(self, pick, draws)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheSource, "sample", sample)
        train.run(config)
    return len(failed)


def test_what_fails_in_one_process_is_left_by_all_alike(tiny_model, folder, tmp_path):
    plain = train.run(settings(tiny_model, folder, tmp_path / "plain"))
    config = settings(tiny_model, folder, tmp_path / "run", parallel={"zero": 3})
    assert run_in(2, train_with_a_bad_disk, config, folder=tmp_path) == [0, 1]
    assert [row["step"] for row in rows(tmp_path / "run") if "validation_loss" in row] == [1]
    for name, value in weights_of(plain).items():
        np.testing.assert_allclose(weights_of(tmp_path / "run")[name], value, rtol=1e-3, atol=1e-5)
