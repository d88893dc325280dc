"""Training at several shapes: every task, method and source; equal to the plain way where there is one shape."""

import json
import shutil
from collections import Counter
from contextlib import contextmanager

import numpy as np
import pytest

from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import loop, prepare, train
from cogvideox_factory.watchdog import Watchdog
from tests.clips import draw_clips
from tests.torch_engine.runs import assert_same, losses

VARIANT = {"t2v": "cogvideox1.5-5b", "i2v": "cogvideox1.5-5b-i2v"}
SHAPES = {"wide": (17, 64, 96), "tall": (9, 96, 64), "square": (9, 64, 64)}


@pytest.fixture(scope="module")
def roomy_model(tmp_path_factory, tiny_model):
    """Return `roomy_model(variant)`: a tiny model with positions up to 320 x 320 pixels."""
    made = {}

    def make(variant):
        if variant not in made:
            made[variant] = shutil.copytree(tiny_model(variant), tmp_path_factory.mktemp("roomy") / variant)
            file = made[variant] / "transformer" / "config.json"
            file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_height": 40, "sample_width": 40}))
        return made[variant]

    return make


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return draw_clips(tmp_path_factory.mktemp("clips"), [shape for shape in SHAPES.values() for _ in range(3)])


def settings(roomy_model, clips, *, task="t2v", method="lora", data=None, cache=None, **training):
    return check(
        {
            "task": task,
            "model": {"path": str(roomy_model(VARIANT[task]))},
            "data": {"root": str(clips), "fps": 8.0, "num_frames": 17, "height": 64, "width": 96} | (data or {}),
            "run": {"device": "cpu", "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8.0} if method == "lora" else {},
            "cache": {"dir": str(cache)} if cache else {},
            "train": {
                "method": method, "steps": 6, "log_every": 1, "save_every": 3, "learning_rate": 1e-3, "batch_size": 2,
                "checkpointing": "none",
            } | ({"image_noise": False} if task == "i2v" else {}) | training,
        },
        source="test",
    )  # fmt: skip


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_cached_and_raw_clips_of_many_shapes_train_alike(roomy_model, clips, tmp_path, task, method, capsys):
    config = {"task": task, "method": method, "data": {"buckets": "auto"}}
    prepare.run(settings(roomy_model, clips, cache=tmp_path / "cache", **config))
    cached = train.run(settings(roomy_model, clips, cache=tmp_path / "cache", dir=str(tmp_path / "a"), **config))
    said = capsys.readouterr().out
    assert all(key in said for key in ("3 of 17x64x96", "3 of 9x96x64", "3 of 9x64x64"))
    rows = [json.loads(line) for line in (cached / "metrics.jsonl").read_text().splitlines()]
    named = {name.removeprefix("loss/bucket/") for row in rows for name in row if name.startswith("loss/bucket/")}
    assert named == {json.loads(line)["bucket"] for line in (cached / "losses.jsonl").read_text().splitlines()}
    raw = train.run(settings(roomy_model, clips, dir=str(tmp_path / "b"), **config))
    assert len(losses(cached)) == 6
    np.testing.assert_allclose(losses(cached), losses(raw), rtol=2e-2)  # cached latents are bfloat16


def test_a_stopped_run_goes_on_exactly(roomy_model, clips, tmp_path):
    config = {"data": {"buckets": "auto"}, "method": "full"}
    whole = train.run(settings(roomy_model, clips, dir=str(tmp_path / "whole"), **config))
    train.run(settings(roomy_model, clips, dir=str(tmp_path / "parts"), **config | {"steps": 3}))
    parts = train.run(settings(roomy_model, clips, dir=str(tmp_path / "parts"), **config))
    assert_same(whole, parts)


def test_the_watchdog_is_patient_with_the_first_step_of_each_shape_where_blocks_are_compiled(
    roomy_model, clips, tmp_path, monkeypatch
):
    beats = []

    class Fake(Watchdog):
        paused = False

        @contextmanager
        def pause(self):
            self.paused = True
            yield

        def beat(self, *, typical=True):
            beats.append((self.paused, typical))
            self.paused = False

    monkeypatch.setattr(loop, "Watchdog", Fake)
    monkeypatch.setattr(train, "require_compiler", lambda device: None)
    monkeypatch.setattr(train, "compile_blocks", lambda *args, **options: 1)
    for compiles in ("none", "default"):
        options = {"data": {"buckets": "auto"}, "steps": 7, "save_every": 7, "compile": compiles}
        run = train.run(settings(roomy_model, clips, dir=str(tmp_path / compiles), **options))
        shapes = {
            row["step"]: row["bucket"] for row in map(json.loads, (run / "losses.jsonl").read_text().splitlines())
        }
        seen = [shapes[step] not in [shapes[s] for s in range(1, step)] for step in range(1, 8)]
        assert sum(seen) > 1
        assert beats == [(new and compiles == "default", not new or compiles == "none") for new in seen]
        beats.clear()


def test_with_one_shape_nothing_changes(roomy_model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    draw_clips(clips, [SHAPES["wide"]] * 5)
    plain = train.run(settings(roomy_model, clips, dir=str(tmp_path / "plain")))
    buckets = train.run(settings(roomy_model, clips, dir=str(tmp_path / "buckets"), data={"buckets": "auto"}))
    assert_same(plain, buckets)


def test_pictures_and_videos_train_together(roomy_model, clips, tmp_path, capsys):
    """Pictures have a bucket of one frame of their own, and every one is seen as often as a clip."""
    mixed = shutil.copytree(clips, tmp_path / "mixed")
    for index in range(4):
        picture = np.random.default_rng(index).integers(0, 256, (64, 96, 3), dtype=np.uint8)
        write_png(mixed / f"still-{index}.png", picture)
        (mixed / f"still-{index}.txt").write_text(f"noise {index}")
    config = {"method": "full", "data": {"buckets": "auto"}, "steps": 13, "batch_size": 1}
    index = prepare.run(settings(roomy_model, mixed, cache=tmp_path / "cache", **config))
    assert [clip.shapes["mean"][0] for clip in index.clips if clip.name.endswith(".png")] == [1] * 4
    cached = train.run(settings(roomy_model, mixed, cache=tmp_path / "cache", dir=str(tmp_path / "a"), **config))
    assert "4 of 1x64x96" in capsys.readouterr().out
    rows = [json.loads(line) for line in (cached / "losses.jsonl").read_text().splitlines()]
    seen = Counter(row["clip"] for row in rows)
    assert set(seen) == {clip.id for clip in index.clips}
    assert max(seen.values()) <= 2  # cheap shapes have larger batches, which the next epoch fills up
    stills = {clip.id for clip in index.clips if clip.name.endswith(".png")}
    assert {row["clip"] for row in rows if row["bucket"] == "1x64x96"} == stills
    raw = train.run(settings(roomy_model, mixed, dir=str(tmp_path / "b"), **config))
    np.testing.assert_allclose(losses(cached), losses(raw), rtol=2e-2)


def bucket_file(tmp_path, text):
    (tmp_path / "bucket.yaml").write_text(text)
    return str(tmp_path / "bucket.yaml")


def test_a_bucket_file_decides_shapes_and_batches(roomy_model, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    draw_clips(clips, [(17, 144, 256), (9, 256, 144), (9, 192, 192), (9, 256, 144)])
    file = bucket_file(tmp_path, "bucket_config: {144p: {9: [1.0, 2], 17: [1.0, 1]}}")
    train.run(settings(roomy_model, clips, dir=str(tmp_path / "run"), batch_size=1, data={"buckets": file}, steps=2))
    said = capsys.readouterr().out
    assert "1 of 17x144x256" in said
    assert "batch 1 (1 x 1 accumulated)" in said
    assert "2 of 9x256x144" in said
    assert "1 of 9x192x192" in said
    assert "1 clips are left over when the first epoch ends" in said  # the square one, in a batch of two


def test_a_changed_table_is_refused_and_only_what_moved_is_made_again(roomy_model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    draw_clips(clips, [(17, 144, 256), (9, 192, 192)])
    cache = tmp_path / "cache"
    file = bucket_file(tmp_path, "144p: {9: [1.0, 2], 17: [1.0, 1]}")
    config = settings(roomy_model, clips, batch_size=1, data={"buckets": file}, cache=cache, dir=str(tmp_path / "run"))
    index = prepare.run(config)
    assert sorted(clip.bucket for clip in index.clips) == ["17x144x256", "9x192x192"]
    before = {path.name for path in (cache / "clips").rglob("*.safetensors")}
    bucket_file(tmp_path, "144p: {9: [1.0, 1]}")
    with pytest.raises(UnfitError, match=r"video\.buckets"):
        train.run(config)
    index = prepare.run(config)
    assert sorted(clip.bucket for clip in index.clips) == ["9x144x256", "9x192x192"]
    after = {path.name for path in (cache / "clips").rglob("*.safetensors")}
    assert len(before) == 2
    assert len(after - before) == 1
    bucket_file(tmp_path, "144p: {9: [1.0, 2]}")  # another batch size makes no other latents
    train.run(config)
    bucket_file(tmp_path, "144p: {9: [1.0, 1]}")  # but it is another run
    with pytest.raises(UnfitError, match="data"):
        train.run(config)


@pytest.mark.parametrize(
    ("data", "training", "law"),
    [
        ({"max_buckets": 3}, {}, r"data\.max_buckets has no effect"),
        ({"buckets": "b.yaml"}, {}, r"train\.batch_size has"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(roomy_model, clips, data, training, law):
    with pytest.raises(FactoryError, match=law):
        settings(roomy_model, clips, data=data, **training)


def test_clips_that_fit_nowhere_are_counted_and_explained(roomy_model, tmp_path, capsys):
    clips = tmp_path / "clips"
    clips.mkdir()
    draw_clips(clips, [(17, 144, 256), (9, 64, 96)])
    file = bucket_file(tmp_path, "144p: {9: [1.0, 2]}")
    config = settings(roomy_model, clips, batch_size=1, data={"buckets": file}, cache=tmp_path / "cache")
    prepare.run(config)
    said = capsys.readouterr().out
    assert "1 trimmed, 1 no_bucket" in said
    assert "fill no resolution of the bucket file" in said
    with pytest.raises(DataError, match=r"bucket\.none"):
        prepare.run(
            settings(roomy_model, clips, batch_size=1, data={"buckets": file, "strict": True}, cache=tmp_path / "cache")
        )


def test_a_shape_the_model_cannot_take_is_named(roomy_model, tmp_path):
    clips = tmp_path / "clips"
    clips.mkdir()
    draw_clips(clips, [(17, 144, 256)])
    file = bucket_file(tmp_path, "144p: {11: [1.0, 2]}")
    with pytest.raises(FactoryError, match=r"bucket 11x144x256 \(1 clips\): num_frames=11 does not fit"):
        prepare.run(settings(roomy_model, clips, batch_size=1, data={"buckets": file}, cache=tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()
