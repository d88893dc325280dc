"""Each setting that reaches a cache, changed alone: `train` names it and refuses, `prepare` makes its part anew."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from cogvideox_factory import preparation
from cogvideox_factory.config import Config
from cogvideox_factory.data import memo as memo_module
from cogvideox_factory.data.cache_index import read_index
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.recipe import check
from cogvideox_factory.run_plan import open_source, read_plan
from cogvideox_factory.torch_engine import train
from cogvideox_factory.weights import resolve_model
from tests.clips import draw_clips
from tests.test_preparation import ZeroEngine, flip_a_byte, never

T2V = {"task": "t2v", "model": {"path": "tiny-t2v"}}
I2V = {"task": "i2v", "model": {"path": "tiny-i2v"}}
AUTO = {"data": {"buckets": "auto", "max_buckets": 2}}
EVENLY = {"data": {"windows": "uniform", "max_windows": 1}}
ALL = {"data": {"windows": "all"}}
SLOW = {"data": {"short_clips": "slow", "max_slowdown": 1.2}}
RANDOM = {"data": {"crop": "random"}}
TABLE = {"data": {"table": "clips.csv"}}
LISTED = {
    "model": {"path": "tiny-t2v", "transformer_config": "roomy.json"}, "train": {"method": "full"},
    "data": {"root": "../large", "buckets": "buckets.yaml"},
}  # fmt: skip
CLEAN = {"train": {"image_noise": False}}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """Two square clips and a narrow one of 20 frames, and a square one of 6 that shares a caption; lists of them.

    Other folders have the first of them and one more, and some large enough for a bucket file.
    """
    folder = tmp_path_factory.mktemp("data") / "clips"
    draw_clips(folder, [(20, 64, 64), (20, 64, 64), (20, 64, 32), (6, 64, 64)])
    draw_clips(folder.parent / "again", [(20, 64, 64), (19, 64, 64)])
    shutil.copy(folder / "0.txt", folder / "3.txt")
    for name, grey in (("a", 50), ("b", 150)):
        write_png(folder / f"{name}.png", np.full((64, 64, 3), grey, np.uint8))
    rows = [f"{n}.mp4,{3 - n}.mp4,brief {n},long {n},a.png,b.png" for n in range(3)]
    (folder / "clips.csv").write_text("\n".join(["video,other,caption,long,image,start", *rows]))
    (folder / "captions.lst").write_text("one\ntwo\n")
    (folder / "videos.lst").write_text("0.mp4\n1.mp4\n")
    draw_clips(folder.parent / "large", [(9, 256, 256)] * 4)
    described = json.loads((resolve_model("tiny-t2v") / "transformer/config.json").read_text())
    (folder / "roomy.json").write_text(json.dumps(described | {"sample_height": 40, "sample_width": 40}))
    (folder / "buckets.yaml").write_text("bucket_config: {256: {9: [1.0, 1]}}")
    (folder / "smaller.yaml").write_text("bucket_config: {144p: {9: [1.0, 1]}}")
    (folder / "drawn.yaml").write_text("bucket_config: {256: {9: [0.5, 1]}, 144p: {9: [1.0, 1]}}")
    return folder


@pytest.fixture(autouse=True)
def settled(monkeypatch, clips):
    """Files count as written a while ago, so that what is known of them is remembered; the clips are right here."""
    monkeypatch.chdir(clips)
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)


def settings(clips, cache, *layers):
    sections = {"data": {"root": str(clips), "fps": 8.0, "max_bad": 0.9}, "cache": {"dir": str(cache)}}
    sections |= {"run": {"device": "cpu", "dtype": "float32"}, "train": {"dir": str(cache.parent / "run")}}
    for layer in layers:
        for name, values in layer.items():
            sections[name] = sections.get(name, {}) | values if isinstance(values, dict) else values
    return check(sections, source="test")


@pytest.fixture(scope="module")
def prepared(clips, tmp_path_factory):
    """Return `prepared(layers, folder)`: a cache of those settings, made once and copied into `folder`."""
    made: dict[str, Path] = {}

    def copy(layers, folder):
        if str(layers) not in made:
            made[str(layers)] = tmp_path_factory.mktemp("cache") / "cache"
            preparation.run(settings(clips, made[str(layers)], *layers), ZeroEngine())
        return shutil.copytree(made[str(layers)], folder / "cache")

    return copy


def refused(config):
    """Return the settings that a run is refused for, as the message names them."""
    try:
        open_source(read_plan(config), "float32")
    except UnfitError as error:
        lines = [line for line in str(error).splitlines() if "this run: " in line]
        return {named[1] if (named := re.search(r"\(([\w.]+)\)$", line)) else line.split()[0] for line in lines}
    return set()


CASES = [
    # what the cache was made with, what is changed, what is named, (clips, images, captions) made again of 3, 0, 3
    (T2V, {"data": {"height": 48}}, {"data.height"}, (3, 0, 0)),
    (T2V, {"data": {"width": 48}}, {"data.width"}, (3, 0, 0)),
    (T2V, {"data": {"num_frames": 5}}, {"data.num_frames"}, (4, 0, 0)),
    (T2V, {"data": {"fps": 4.0}}, {"data.fps"}, (3, 0, 0)),
    (T2V, {"data": {"fps_policy": "stretch"}}, {"data.fps_policy"}, (3, 0, 0)),
    (T2V, {"data": {"crop": "smart"}}, {"data.crop"}, (3, 0, 0)),
    (T2V, {"data": {"crop": "stretch"}}, {"data.crop"}, (3, 0, 0)),
    (T2V, RANDOM, {"data.crop"}, (3, 0, 0)),
    (T2V, {"data": {"short_clips": "repeat_last"}}, {"data.short_clips"}, (4, 0, 0)),
    (T2V, {"data": {"short_clips": "slow"}}, {"data.short_clips"}, (4, 0, 0)),
    (T2V, {"data": {"windows": "all"}}, {"data.windows"}, (3, 0, 0)),
    (T2V, {"data": {"windows": "uniform"}}, {"data.windows"}, (3, 0, 0)),
    (T2V, {"data": {"buckets": "auto"}}, {"data.buckets"}, (1, 0, 0)),
    (T2V, {"data": {"vae_tiling": True}}, {"data.vae_tiling"}, (3, 0, 0)),
    (T2V, {"data": {"trigger_word": "sks"}}, {"data.trigger_word"}, (0, 0, 3)),
    (T2V, {"text": {"max_sequence_length": 20}}, {"text.max_sequence_length"}, (0, 0, 4)),
    (T2V, {"run": {"seed": 7}}, set(), (0, 0, 0)),
    (T2V | SLOW, {"data": {"max_slowdown": 2.0}}, {"data.max_slowdown"}, (1, 0, 0)),
    (T2V | EVENLY, {"data": {"max_windows": 2}}, {"data.max_windows"}, (3, 0, 0)),
    (T2V | ALL, {"data": {"window_stride": 3}}, {"data.window_stride"}, (6, 0, 0)),
    (T2V | AUTO, {"data": {"max_buckets": 1}}, {"data.max_buckets"}, (2, 0, 0)),
    (T2V | AUTO, {"data": {"num_frames": 17}}, {"data.num_frames"}, (3, 0, 0)),
    (LISTED, {"data": {"buckets": "smaller.yaml"}}, {"data.buckets"}, (4, 0, 0)),
    (LISTED, {"run": {"seed": 7}}, set(), (0, 0, 0)),
    (T2V | RANDOM, {"run": {"seed": 7}}, {"run.seed"}, (3, 0, 0)),
    (T2V, TABLE, {"data.table"}, (0, 0, 3)),
    (T2V, {"data": {"captions": "captions.lst", "videos": "videos.lst"}}, {"data.captions", "data.videos"}, (0, 0, 2)),
    (T2V, {"data": {"root": "../clips"}}, set(), (0, 0, 0)),
    (T2V, {"data": {"root": "../again"}}, {"data.root"}, (1, 0, 0)),
    (T2V, {"data": {"root": "", "sets": [{"root": "."}, {"root": "../again"}]}}, {"data.root", "data.sets"},
     (1, 0, 0)),
    (T2V | TABLE, {"data": {"caption_column": "long"}}, {"data.caption_column"}, (0, 0, 3)),
    (T2V | TABLE, {"data": {"video_column": "other"}}, {"data.video_column"}, (0, 0, 0)),
    (I2V, {"cache": {"image_noise_variants": 2}}, {"cache.image_noise_variants"}, (3, 0, 0)),
    (I2V, {"run": {"seed": 7}}, {"run.seed"}, (3, 0, 0)),
    (I2V | TABLE, {"data": {"image_column": "start"}}, {"data.image_column"}, (0, 1, 0)),
    (I2V | CLEAN, {"cache": {"image_noise_variants": 0}}, {"cache.image_noise_variants"}, (3, 0, 0)),
    (I2V | TABLE, {"run": {"seed": 7}}, {"run.seed"}, (0, 1, 0)),
    (I2V | TABLE, {"data": {"fps": 4.0}}, {"data.fps"}, (3, 0, 0)),
    (I2V | TABLE, {"data": {"width": 48}}, {"data.width"}, (3, 1, 0)),
]  # fmt: skip

NEVER_NAMED = {"data.strict": True, "data.max_bad": 0.8, "data.allow_outside_root": True}
"""What decides whether a preparation is refused, and nothing of what it makes."""


@pytest.mark.parametrize(("base", "change", "named", "made"), CASES)
def test_a_changed_setting_is_named_and_its_part_alone_is_made_again(
    clips, prepared, tmp_path, base, change, named, made
):
    cache = prepared((base,), tmp_path)
    config, before = settings(clips, cache, base, change), settings(clips, cache, base)
    assert refused(before) == set()
    assert refused(config) == named
    engine = ZeroEngine()
    preparation.run(config, engine)
    works = engine.works or [None]
    assert len(works) == 1
    assert tuple(len(getattr(works[0], part, ())) for part in ("clips", "images", "captions")) == made
    assert refused(config) == set()
    preparation.run(before, never)  # what the old settings made is still there
    assert refused(config) == named


def test_a_seed_that_draws_buckets_is_named_and_what_moved_alone_is_made_again(clips, prepared, tmp_path):
    drawn = LISTED | {"data": LISTED["data"] | {"buckets": "drawn.yaml"}}
    cache = prepared((drawn,), tmp_path)
    known = entries_of(read_index(cache))
    for seed in range(8):
        config, engine = settings(clips, cache, drawn, {"run": {"seed": seed}}), ZeroEngine()
        assert refused(config) == {"run.seed"}
        moved = entries_of(preparation.run(config, engine)) - known
        assert sum(len(work.clips) for work in engine.works) == len(moved)
        known |= moved
    assert len(known) > 4  # that four clips never move is one chance of 2 ** 32


def entries_of(index):
    return {clip.clip_file for clip in index.clips}


def test_no_setting_of_clips_and_captions_was_forgotten(clips, prepared, tmp_path):
    changed = {f"{section}.{name}" for _, change, *_ in CASES for section, values in change.items() for name in values}
    known = {f"{name}.{field}" for name in ("data", "cache", "text") for field in getattr(Config(), name).model_dump()}
    assert known - changed == {"cache.dir", "data.flip_probability"} | set(NEVER_NAMED)
    cache = prepared((T2V,), tmp_path)
    for name, value in NEVER_NAMED.items():
        config = settings(clips, cache, T2V, {"data": {name.removeprefix("data."): value}})
        assert refused(config) == set()
    with pytest.raises(FactoryError, match="flip_probability has no effect on cached latents"):
        settings(clips, cache, T2V, {"data": {"flip_probability": 0.5}})


@pytest.mark.parametrize(
    ("part", "named", "made"),
    [
        ("vae", {"video.vae"}, (3, 0)),
        ("text_encoder", {"text.text_encoder"}, (0, 4)),
        ("tokenizer", {"text.tokenizer"}, (0, 4)),
    ],
)
def test_a_changed_byte_of_the_model_is_named_and_its_part_alone_is_made_again(
    clips, prepared, tmp_path, part, named, made
):
    cache = prepared((T2V,), tmp_path)
    model = shutil.copytree(resolve_model("tiny-t2v"), tmp_path / "model")
    config = settings(clips, cache, T2V, {"model": {"path": str(model)}})
    assert refused(config) == set()
    flip_a_byte(max((model / part).iterdir(), key=lambda path: path.stat().st_size))
    with pytest.raises(UnfitError) as caught:
        train.run(config)
    assert {line.split()[0] for line in str(caught.value).splitlines() if "this run: " in line} == named
    engine = ZeroEngine()
    preparation.run(config, engine)
    assert engine.made == [made]
    assert refused(config) == set()


def test_what_the_encoders_ran_in_is_the_cache_s_affair_and_another_is_made_whole(clips, prepared, tmp_path):
    cache = prepared((T2V,), tmp_path)
    config = settings(clips, cache, T2V, {"run": {"dtype": "bfloat16"}})
    assert refused(config) == set()
    engine = ZeroEngine()
    preparation.run(config, engine)
    assert engine.made == [(3, 4)]
