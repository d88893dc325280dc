"""Windows of long videos from the list to the weights: cached, raw, from text, from an image, stopped and resumed."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from cogvideox_factory.data.cache_check import audit_cache
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.loader import Draws
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.recipe import check
from cogvideox_factory.run_plan import open_source
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine import prepare, train
from cogvideox_factory.torch_engine.start import make_plan
from tests.clips import draw_clips
from tests.torch_engine.runs import losses, weights_of

VARIANT = {"t2v": "cogvideox1.5-5b", "i2v": "cogvideox-5b-i2v"}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two long videos, one of them with a cut at frame 12 and one wide, and a short one."""
    folder = draw_clips(tmp_path_factory.mktemp("clips"), [(30, 64, 96), (20, 64, 160), (9, 64, 96)])
    parts = ((random_scene(1, 10), "black", 12), (random_scene(1, 11), "white", 18))
    frames = [render(replace(s, background=b), num_frames=n, height=64, width=96, fps=8) for s, b, n in parts]
    export_to_video(np.concatenate(frames), folder / "0.mp4", fps=8)
    return folder


def settings(tiny_model, clips, *, task="t2v", data=None, cache=None, more=None, **training):
    return check(
        {
            "task": task,
            "model": {"path": str(tiny_model(VARIANT[task]))},
            "data": {"root": str(clips), "fps": 8.0, "num_frames": 9, "windows": "all"} | (data or {}),
            "run": {"device": "cpu", "dtype": "float32"},
            "lora": {"rank": 4, "alpha": 8.0},
            "cache": {"dir": str(cache)} if cache else {},
            "train": {
                "steps": 4, "log_every": 1, "save_every": 2, "learning_rate": 1e-3, "batch_size": 2,
                "checkpointing": "none",
            } | ({"image_noise": False} if task == "i2v" else {}) | training,
            **(more or {}),
        },
        source="test",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("task", "windows", "crop"),
    [*itertools.product(["t2v", "i2v"], ["all"], ["center", "smart"]), ("t2v", "scenes", "center")],
)
def test_cached_and_raw_windows_train_alike(tiny_model, clips, tmp_path, capsys, task, windows, crop):
    config = {"task": task, "data": {"crop": crop, "windows": windows}}
    if windows == "scenes":
        pytest.importorskip("scenedetect")
    index = prepare.run(settings(tiny_model, clips, cache=tmp_path / "cache", **config))
    assert "3 rows: 1 used, 2 trimmed; 2 of them give 5 windows, the others one clip each" in capsys.readouterr().out
    later = ["12:20:1", "21:29:1"] if windows == "scenes" else ["9:17:1", "18:26:1"]  # one would cross the cut
    assert [row["frames"] for row in index.rows] == ["0:8:1", *later, "0:8:1", "9:17:1", "0:8:1"]
    assert index.recorded["rows"] == {"total": 3, "counts": {"used": 1, "trimmed": 2}}
    assert len({clip.id for clip in index.clips}) == len({clip.clip_file for clip in index.clips}) == 6
    assert {finding.state for finding in audit_cache(tmp_path / "cache").findings} == {"ok"}
    crops = [row["crop"] for row in index.rows]
    assert all(crop["height"] == 64 and crop["top"] == 0 for crop in crops)
    assert [crop["width"] for crop in crops] == [96, 96, 96, 160, 160, 96]
    cached = train.run(settings(tiny_model, clips, cache=tmp_path / "cache", dir=str(tmp_path / "a"), **config))
    raw = train.run(settings(tiny_model, clips, dir=str(tmp_path / "b"), **config))
    assert len(losses(cached)) == 4
    np.testing.assert_allclose(losses(cached), losses(raw), rtol=2e-2)  # cached latents are bfloat16


def test_a_stopped_run_over_windows_goes_on_exactly(tiny_model, clips, tmp_path):
    whole = train.run(settings(tiny_model, clips, dir=str(tmp_path / "whole")))
    train.run(settings(tiny_model, clips, dir=str(tmp_path / "parts"), steps=2))
    parts = train.run(settings(tiny_model, clips, dir=str(tmp_path / "parts")))
    ours, theirs = weights_of(whole), weights_of(parts)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    with pytest.raises(UnfitError, match="data"):
        train.run(settings(tiny_model, clips, dir=str(tmp_path / "parts"), data={"windows": "first"}))


def test_a_changed_policy_is_refused_by_name_and_only_new_windows_are_made(tiny_model, clips, tmp_path):
    cache = tmp_path / "cache"

    def entries():
        return {path.name: path.stat().st_mtime_ns for path in (cache / "clips").rglob("*.safetensors")}

    made = {}
    for windows, more, count in (
        ("first", {}, 3),
        ("uniform", {"max_windows": 2}, 5),
        ("all", {}, 6),
        ("all", {"window_stride": 3}, 8 + 4 + 1),
    ):
        config = settings(tiny_model, clips, cache=cache, data={"windows": windows, **more}, dir=str(tmp_path / "run"))
        if made:
            with pytest.raises(UnfitError, match=rf'video\.windows +cache: ".*" +this run: "{windows}'):
                train.run(config)
        prepare.run(config)
        assert made.items() <= entries().items(), "what was there is as it was"
        made = entries()
        assert len(made) == count
    train.run(config)
    slow = settings(tiny_model, clips, cache=cache, data={"windows": "all", "window_stride": 3, "short_clips": "slow"})
    with pytest.raises(UnfitError, match=r"video\.short_policy[^\n]*\(data\.short_clips\)\nRun"):
        train.run(slow)


def test_held_out_videos_give_no_window_to_the_training(tiny_model, clips, tmp_path, capsys):
    more = {"validation": {"every": 2, "num_clips": 1}}
    train.run(settings(tiny_model, clips, dir=str(tmp_path / "run"), more=more))
    said = capsys.readouterr().out
    held = [line for line in said.splitlines() if "other windows of the 1 clips held out are not trained on" in line]
    trained = int(said.split(" clips at 8 fps")[0].rsplit("\n", 1)[-1])
    assert trained + 1 + (int(held[0].split()[0]) if held else 0) == 6


def test_a_smart_crop_is_the_same_raw_and_cached_and_another_cache_than_a_centred_one(tiny_model, clips, tmp_path):
    config = settings(tiny_model, clips, cache=tmp_path / "cache", data={"crop": "smart"})
    index = prepare.run(config)
    plan = make_plan(settings(tiny_model, clips, data={"crop": "smart"}))
    source = open_source(plan, "float32")[0]
    again = open_source(plan, "float32")[0]
    for clip in index.clips:
        draws = Draws(seed=1)
        one, other = (s.sample(Pick(clip.id, 0), draws)["pixels"] for s in (source, again))
        assert (one == other).all()
    with pytest.raises(UnfitError, match=r"video\.crop"):
        train.run(settings(tiny_model, clips, cache=tmp_path / "cache", dir=str(tmp_path / "run")))
