"""Image-to-video from images of a clip's own, cached and raw."""

import json

import numpy as np
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.recipe import check
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine import prepare, train
from tests.torch_engine.runs import losses

SIZE = {"num_frames": 9, "height": 64, "width": 96}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Four clips; `first.csv` names their own first frames, `none.csv` no image, `other.csv` something else."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for index in range(4):
        scene = random_scene(1, index)
        export_to_video(render(scene, fps=8, **SIZE), folder / f"{index}.mp4", fps=8)
        write_png(folder / f"{index}.png", read_clip(folder / f"{index}.mp4", ClipSpec(fps=8, **SIZE)).pixels[0])
        write_png(folder / f"flat{index}.png", np.full((80, 80, 3), 60 * index, np.uint8))
        rows.append((f"{index}.mp4", scene.caption))
    for name, image in (("first", "{}.png"), ("none", ""), ("other", "flat{}.png")):
        lines = [f'{video},"{caption}",{image.format(i)}' for i, (video, caption) in enumerate(rows)]
        (folder / f"{name}.csv").write_text("\n".join(["video,caption,image", *lines]))
    return folder


def settings(tiny_model, clips, table, *, cache=None, task="i2v", data=None, **training):
    variant = "cogvideox-5b-i2v" if task == "i2v" else "cogvideox-5b"
    values = {
        "task": task,
        "model": {"path": str(tiny_model(variant))},
        "data": {"root": str(clips), "table": f"{table}.csv", "fps": 8.0} | (data or {}),
        "cache": {"dir": str(cache), "image_noise_variants": 0} if cache else {},
        "run": {"device": "cpu", "dtype": "float32"},
        "lora": {"rank": 4, "alpha": 8.0},
        "train": {
            "steps": 4, "log_every": 1, "learning_rate": 1e-2, "batch_size": 2, "checkpointing": "none",
        } | ({"image_noise": False} if task == "i2v" else {}) | training,
    }  # fmt: skip
    return check(values, source="test")


@pytest.mark.parametrize("kind", ["cached", "raw"])
def test_the_first_frame_as_an_image_trains_to_the_same_loss(tiny_model, clips, tmp_path, monkeypatch, kind):
    """Draws are keyed by a clip's name, which its own image is part of: here the caption alone, so that they agree."""
    monkeypatch.setattr(Clip, "id", property(lambda clip: clip.caption))
    found = {}
    for table in ("first", "none", "other"):
        cache = tmp_path / table if kind == "cached" else None
        config = settings(tiny_model, clips, table, cache=cache, dir=str(tmp_path / f"run-{table}"))
        if cache:
            prepare.run(config)
        found[table] = losses(train.run(config))
    assert len(found["first"]) == 4
    assert found["first"] == found["none"]
    assert all(abs(a - b) > 1e-6 for a, b in zip(found["other"], found["none"], strict=True))


def test_cached_and_raw_agree(tiny_model, clips, tmp_path):
    config = settings(tiny_model, clips, "other", cache=tmp_path / "cache", dir=str(tmp_path / "a"))
    prepare.run(config)
    raw = settings(tiny_model, clips, "other", dir=str(tmp_path / "b"))
    np.testing.assert_allclose(losses(train.run(config)), losses(train.run(raw)), rtol=2e-2)  # bfloat16 in the cache


def test_noised_images_are_kept_and_taken(tiny_model, clips, tmp_path):
    config = settings(tiny_model, clips, "other", cache=tmp_path / "cache", dir=str(tmp_path / "a"), image_noise=True)
    config = config.model_copy(update={"cache": config.cache.model_copy(update={"image_noise_variants": 2})})
    index = prepare.run(config)
    assert {clip.shapes["image_mean"][0] for clip in index.clips} == {3}
    assert len(losses(train.run(config))) == 4


def test_a_new_image_encodes_nothing_but_itself(tiny_model, clips, tmp_path, capsys):
    for table, said in (
        ("other", "4 clips, 4 to encode; 5 captions to encode; 4 images of their own to encode"),
        ("first", "4 clips, 0 to encode; 0 captions to encode; 4 images of their own to encode"),
    ):
        prepare.run(settings(tiny_model, clips, table, cache=tmp_path / "cache"))
        assert said in capsys.readouterr().out


def test_text_to_video_refuses_the_setting_and_leaves_the_column_alone(tiny_model, clips, tmp_path):
    with pytest.raises(FactoryError, match=r"data\.image_column has no effect with task=t2v; remove it"):
        settings(tiny_model, clips, "other", task="t2v", data={"image_column": "picture"})
    cache = {"cache": {"dir": str(tmp_path / "cache")}}
    config = settings(tiny_model, clips, "other", task="t2v")
    config = check(config.model_dump() | cache, source="test")
    assert all(clip.image_file is None for clip in prepare.run(config).clips)


def test_doctor_names_a_missing_image(clips, tmp_path, capsys):
    rows = (clips / "first.csv").read_text().replace("2.png", "gone.png")
    (clips / "bad.csv").write_text(rows)
    words = ["--task", "i2v", "--data.root", str(clips), "--data.table", "bad.csv", "--quick", "True"]
    words += ["--data.num-frames", "9", "--data.height", "64", "--data.width", "96", "--data.fps", "8"]
    assert main(["doctor", *words, "--json", str(tmp_path / "r.json")]) == 0
    assert "its image: gone.png is not there" in capsys.readouterr().out
    reasons = [clip["reason"] for clip in json.loads((tmp_path / "r.json").read_text())["clips"]]
    assert reasons == [None, None, "image.missing", None]
