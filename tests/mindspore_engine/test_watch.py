"""Sample videos of a run: what `generate` makes of it, and never the end of it."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json

import numpy as np

from cogvideox_factory.cli.generate import settings_of_run
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.mindspore_engine import generate, train, watch
from tests.golden import runs

PROMPTS = [runs.PROMPT, "a caption 1"]
SHORT = {
    "steps": 2, "schedule": "constant", "warmup_steps": 0, "learning_rate": 1e-2, "batch_size": 1, "ema_decay": 0.5,
}  # fmt: skip


def recipe(case, folder, name="run", **more):
    sections = {
        "train": SHORT | {"dir": str(folder / name)} | more.pop("train", {}),
        "validation": {"every": 1, "num_clips": 1} | more.pop("validation", {}),
        "sampling": {"steps": 2, "tiling": False},
    }
    return runs.recipe(case, folder, engine="mindspore", **sections, **more)


def test_sample_videos_are_what_generate_makes_of_the_averages(tmp_path, monkeypatch):
    images = []
    for index in range(2):
        picture = np.random.default_rng(index).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        images.append(str(write_png(tmp_path / f"{index}.png", picture)))
    monkeypatch.setattr(watch, "export_to_video", runs.keep_frames)
    looks = {"every": 2, "prompts": PROMPTS, "images": images}
    folder = train.run(recipe("i2v full", tmp_path, validation=looks))
    samples = {path.stem: np.load(path).astype(int) for path in (folder / "samples").iterdir()}
    assert sorted(samples) == [f"step-{step:06}-{index:02}" for step in (0, 2) for index in (0, 1)]
    assert np.abs(samples["step-000000-00"] - samples["step-000002-00"]).max() > 2, "what was learned does not show"
    ask = settings_of_run(folder)
    given = {"prompt": PROMPTS, "image": images, "format": "npy", "out": str(tmp_path / "videos")}
    ask = ask.model_copy(update={"generate": ask.generate.model_copy(update=given)})
    for index, path in enumerate(generate.run(ask)):
        assert np.array_equal(np.load(path), samples[f"step-000002-{index:02}"])


def test_three_failures_end_the_watching_and_none_the_run(tmp_path, monkeypatch, capsys):
    more = {"train": {"steps": 4}, "validation": {"prompts": PROMPTS[:1]}}
    plain = train.run(recipe("t2v lora", tmp_path, "plain", train={"steps": 4}))
    calls = []

    def failing(video, path, *, fps):
        calls.append(path.name)
        raise StorageError("no room for it")

    monkeypatch.setattr(watch, "export_to_video", failing)
    monkeypatch.setattr(watch.SampleVideos, "_video", lambda *given: None)
    folder = train.run(recipe("t2v lora", tmp_path, **more))
    assert calls == [f"step-{step:06}-00.mp4" for step in range(3)]
    said = capsys.readouterr().out
    assert said.count("VALIDATION FAILED") == 3
    assert said.count("after 3 failures there is no more validation") == 1
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "validation_loss" in row] == [0, 1, 2]
    file = "final/pytorch_lora_weights.safetensors"
    assert (folder / file).read_bytes() == (plain / file).read_bytes()


def test_a_prompt_without_its_image_is_refused_before_anything_loads(tmp_path):
    with pytest.raises(FactoryError, match=r"2 validation\.prompts need as many validation\.images, not 0"):
        train.run(recipe("i2v full", tmp_path, validation={"prompts": PROMPTS}))
    assert not (tmp_path / "run").exists()
