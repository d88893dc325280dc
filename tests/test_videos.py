"""A video and its record: whatever ends the writing of one, the other does not tell of something else."""

import numpy as np
import pytest

from cogvideox_factory import jobs, videos
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.shapes import clip_shape

SHAPE = clip_shape(TransformerConfig(), num_frames=9, height=64, width=96)


def settings(tmp_path, kind, steps):
    ask = {"prompt": ["a"], "out": str(tmp_path), "format": kind}
    return check({"model": {"path": "some/model"}, "sampling": {"steps": steps}, "generate": ask}, source="test")


def write(config, value):
    (job,) = jobs.plan_jobs(config)
    videos.write_video(config, job, record_of(config), np.full((9, 64, 96, 3), value, np.uint8), SHAPE)


def record_of(config):
    made = jobs.plan_jobs(config)
    return jobs.make_records(made, config, SHAPE, device="cpu", dtype="float32", tiling=False, versions={})[0]


def is_done(config):
    try:
        return not jobs.left_to_make(jobs.plan_jobs(config), [record_of(config)], overwrite=False)
    except jobs.StorageError:
        return False


@pytest.mark.parametrize("kind", ["npy", "png", "mp4"])
@pytest.mark.parametrize("died", ["before", "after"])
def test_a_video_that_was_to_be_replaced_never_counts_as_the_new_one(tmp_path, monkeypatch, kind, died):
    old, new = settings(tmp_path, kind, 2), settings(tmp_path, kind, 3)
    write(old, 1)
    assert is_done(old)
    export = videos.export_to_video

    def dying(*args, **options):
        if died == "after":
            export(*args, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(videos, "export_to_video", dying)
        with pytest.raises(KeyboardInterrupt):
            write(new, 2)
    assert is_done(new) == (died == "after" and kind == "mp4"), "an mp4 says itself what it is of"
    assert not (is_done(old) and died == "after")
    write(new, 2)
    assert is_done(new)
    assert not is_done(old)


def test_a_video_that_was_to_be_made_is_made_by_the_next_command(tmp_path, monkeypatch):
    config = settings(tmp_path, "npy", 2)

    def dying(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(videos, "export_to_video", dying)
        with pytest.raises(KeyboardInterrupt):
            write(config, 1)
    assert not is_done(config)
    write(config, 1)
    assert is_done(config)
