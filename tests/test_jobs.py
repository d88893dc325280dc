"""What makes a video what it is: files are read once for many videos, and another transformer is another video."""

import json

import numpy as np
import pytest

from cogvideox_factory import jobs
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.fingerprint import sha256_file
from cogvideox_factory.errors import FactoryError, StorageError, UnfitError
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.shapes import clip_shape
from cogvideox_factory.weights import save_folder


def settings(tmp_path, **model):
    ask = {"prompt": ["a", "b", "c"], "image": [str(tmp_path / "image.png")], "out": str(tmp_path / "out")}
    return check({"task": "i2v", "model": {"path": "some/model", **model}, "generate": ask}, source="test")


def make_all(config):
    """Return the jobs of `config` and their records."""
    made = jobs.plan_jobs(config)
    shape = clip_shape(TransformerConfig(), num_frames=9, height=64, width=96)
    return made, jobs.make_records(made, config, shape, device="cpu", dtype="float32", tiling=False, versions={})


@pytest.fixture
def image(tmp_path):
    (tmp_path / "image.png").write_bytes(b"not looked into here")


def test_a_file_of_many_videos_is_hashed_once(tmp_path, image, monkeypatch):
    hashed = []
    monkeypatch.setattr(jobs, "sha256_file", lambda path: hashed.append(path) or sha256_file(path))
    _, records = make_all(settings(tmp_path))
    assert hashed == [tmp_path / "image.png"]
    assert [len(record["files"]) for record in records] == [1, 1, 1]


def test_a_transformer_that_was_trained_again_makes_other_videos(tmp_path, image):
    def train(value):
        save_folder(tmp_path / "mine", {"w": np.full(8, value, np.float32)}, config={"_class_name": "x"})

    train(1.0)
    config = settings(tmp_path, transformer=str(tmp_path / "mine"))
    made, records = make_all(config)
    for job, record in zip(made, records, strict=True):
        export_to_video(np.zeros((3, 16, 16, 3), np.uint8), job.path, note=jobs.to_note(record))
    assert jobs.left_to_make(made, records, overwrite=False) == []
    assert jobs.settings_like(made[0].path).model == config.model
    train(2.0)
    with pytest.raises(StorageError, match="with other settings"):
        jobs.left_to_make(*make_all(config), overwrite=False)
    with pytest.raises(UnfitError, match="mine is another than the one that went into"):
        jobs.settings_like(made[0].path)
    for job, record in zip(made, records, strict=True):  # as they were before they knew of folders
        del record["folders"]
        export_to_video(np.zeros((3, 16, 16, 3), np.uint8), job.path, note=json.dumps(record))
    assert jobs.left_to_make(*make_all(config), overwrite=False) == []
    jobs.settings_like(made[0].path)


@pytest.mark.parametrize(
    ("ask", "says"),
    [
        ({"out": "fox.mov"}, r"generate\.out=fox\.mov: \.mov is not written; end the name with \.mp4, \.gif"),
        ({"out": "fox.gif", "codec": "h265"}, r"generate\.codec=h265 has no effect with generate\.out=fox\.gif"),
        ({"out": "fox.gif", "format": "webp"}, r"name two formats; pass --generate\.format gif"),
    ],
)
def test_a_name_that_does_not_go_with_what_is_asked_for_is_refused(ask, says):
    config = check({"model": {"path": "some/model"}, "generate": {"prompt": ["a"], **ask}}, source="test")
    with pytest.raises(FactoryError, match=says):
        jobs.plan_jobs(config)


@pytest.mark.parametrize("record", ["[" * 100_000, "[]", '{"settings": {}}', '{"settings": {}, "files": []}',
                                    '{"settings": {}, "files": {}, "folders": 1}'])  # fmt: skip
def test_a_record_of_another_form_is_none(tmp_path, record):
    path = export_to_video(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / "v.mp4")
    path.with_suffix(".json").write_text(record)
    with pytest.raises(FactoryError, match="does not say how it was made"):
        jobs.settings_like(path)
