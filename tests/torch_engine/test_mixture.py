"""Training on several data sets with weights: one cache, exact resume, weights that cost nothing to change."""

import json

import numpy as np
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.recipe import check, read_recipe
from cogvideox_factory.torch_engine import prepare, train
from cogvideox_factory.torch_engine.loop import Loop
from tests.clips import draw_clips
from tests.torch_engine.runs import losses

SIZE = {"num_frames": 9, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sets")
    for number, (name, count) in enumerate((("small", 2), ("large", 4))):
        draw_clips(folder / name, [tuple(SIZE.values())] * count, seed=number)
    return folder


def settings(tiny_model, roots, *, cache=None, weights=(2.0, 0.5), data=None, **training):
    sets = [{"root": str(roots / name), "weight": w} for name, w in zip(("small", "large"), weights, strict=True)]
    values = {
        "model": {"path": str(tiny_model("cogvideox1.5-5b"))},
        "data": {"sets": sets, "fps": 8.0} if data is None else data | {"fps": 8.0},
        "cache": {"dir": str(cache)} if cache else {},
        "run": {"device": "cpu", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {
            "steps": 6, "log_every": 1, "save_every": 3, "learning_rate": 1e-2, "batch_size": 2, "checkpointing": "none"
        } | training,
    }  # fmt: skip
    return check(values, source="test")


def test_one_cache_exact_resume_and_raw_alike(tiny_model, roots, tmp_path, capsys):
    cache = tmp_path / "cache"
    index = prepare.run(settings(tiny_model, roots, cache=cache))
    assert sorted(clip.set for clip in index.clips) == ["large"] * 4 + ["small"] * 2
    assert index.recorded["source"]["weights"] == {"small": 2.0, "large": 0.5}
    whole = train.run(settings(tiny_model, roots, cache=cache, dir=str(tmp_path / "whole")))
    said = capsys.readouterr().out
    assert "data set small: 2 clips x weight 2 = 4 places an epoch" in said
    assert "data set large: 4 clips x weight 0.5 = 2 places an epoch" in said
    train.run(settings(tiny_model, roots, cache=cache, dir=str(tmp_path / "parts"), steps=3))
    parts = train.run(settings(tiny_model, roots, cache=cache, dir=str(tmp_path / "parts")))
    assert losses(parts) == losses(whole)
    assert len(losses(whole)) == 6
    raw = train.run(settings(tiny_model, roots, dir=str(tmp_path / "raw")))
    np.testing.assert_allclose(losses(raw), losses(whole), rtol=2e-2)  # cached latents are bfloat16
    recorded = train.run(settings(tiny_model, roots, cache=cache, data={}, dir=str(tmp_path / "recorded")))
    assert losses(recorded) == losses(whole)
    again = read_recipe(whole / "config.yaml")
    assert [part.weight for part in again.data.sets] == [2.0, 0.5]


def test_a_changed_weight_needs_no_preparing_but_is_another_run(tiny_model, roots, tmp_path, capsys):
    cache = tmp_path / "cache"
    prepare.run(settings(tiny_model, roots, cache=cache))
    one = train.run(settings(tiny_model, roots, cache=cache, dir=str(tmp_path / "a"), steps=3))
    config = settings(tiny_model, roots, cache=cache, weights=(1.0, 3.0), dir=str(tmp_path / "a"))
    with pytest.raises(UnfitError, match="data: the run has"):
        train.run(config)
    other = train.run(settings(tiny_model, roots, cache=cache, weights=(1, 3.0), dir=str(tmp_path / "b"), steps=3))
    assert losses(one) != losses(other)
    capsys.readouterr()
    prepare.run(config)
    assert "6 clips, 0 to encode; 0 captions to encode" in capsys.readouterr().out
    swapped = settings(tiny_model, roots, cache=cache, data={"root": str(roots / "small")}, dir=str(tmp_path / "c"))
    with pytest.raises(UnfitError, match="prepared from other clips"):
        train.run(swapped)


def test_an_epoch_is_what_the_weights_say(tiny_model, roots, tmp_path, monkeypatch):
    seen = []
    original = Loop._step

    def spy(self, step, batches):
        seen.extend(pick.clip_id for pick in self.sampler.batch(step - 1))  # the loop counts from 1
        original(self, step, batches)

    monkeypatch.setattr(Loop, "_step", spy)
    index = prepare.run(settings(tiny_model, roots, cache=tmp_path / "cache"))
    train.run(settings(tiny_model, roots, cache=tmp_path / "cache", dir=str(tmp_path / "run")))  # 12 clips: 2 epochs
    counts = {name: sorted(seen.count(c.id) for c in index.clips if c.set == name) for name in ("small", "large")}
    assert counts == {"small": [4, 4], "large": [1, 1, 1, 1]}


def test_sets_are_checked(tiny_model, roots, tmp_path):
    two = [{"root": "a/clips"}, {"root": "b/clips"}]
    for data, message in (
        ({"sets": two}, "'clips' is there twice; give each set a name"),
        ({"sets": [{"root": "a"}], "root": "b"}, "remove data.root"),
        ({"sets": [{"root": "a", "captions": "x"}]}, "captions and videos belong together"),
        ({"sets": [{"root": "a", "image_column": "x"}]}, "no effect with task=t2v"),
        ({"sets": [{"root": "a", "weight": 0.0}]}, r"data\.sets\.0\.weight=0\.0"),
        ({"sets": [{"root": "a", "wieght": 2.0}]}, "unknown setting"),
    ):
        with pytest.raises(FactoryError, match=message):
            check({"data": data}, source="test")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty/0.mp4").write_bytes(b"no video")
    (tmp_path / "empty/0.txt").write_text("a")
    data = {"sets": [{"root": str(roots / "large")}, {"root": str(tmp_path / "empty")}]}
    with pytest.raises(DataError, match="data set empty has no clip left"):
        prepare.run(settings(tiny_model, roots, cache=tmp_path / "cache", data=data))


def test_doctor_counts_each_set(roots, tmp_path, capsys):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"data:\n  num_frames: 9\n  height: 64\n  width: 96\n  fps: 8.0\n  sets:\n    - root: {roots}/small\n"
        f"      weight: 2.5\n    - root: {roots}/large\n"
    )
    words = ["doctor", str(recipe), "--quick", "True", "--json", str(tmp_path / "r.json")]
    assert main(words) == 0
    assert "places an epoch" in capsys.readouterr().out
    sets = json.loads((tmp_path / "r.json").read_text())["sets"]
    assert [(s["name"], s["total"], s["usable"], s["places"]) for s in sets] == [
        ("small", 2, 2, 5.0),
        ("large", 4, 4, 4.0),
    ]
    assert main([*words, "--data.sets.0.weight", "4"]) == 0
    assert json.loads((tmp_path / "r.json").read_text())["sets"][0]["places"] == 8.0
    assert main(["doctor", str(recipe), "--fix", str(tmp_path / "clean.jsonl")]) == 2
