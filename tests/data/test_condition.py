"""Images of a clip's own: which row has one, what is wrong with it, and what of a cache depends on it."""

import json
from dataclasses import replace

import numpy as np
import pytest

from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.cache_check import audit_cache
from cogvideox_factory.data.cache_index import open_cache
from cogvideox_factory.data.clean_list import write_clean_list
from cogvideox_factory.data.condition import read_condition
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings
from cogvideox_factory.data.loader import CacheSource, Draws, RawSource
from cogvideox_factory.data.manifest import Source, read_manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.draws import generator
from cogvideox_factory.errors import DataError

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SHAPE = (3, 4, 4, 6)


@pytest.fixture
def table(dataset):
    """Three clips; the first and the last start from pictures of their own, twice as large."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        write_png(dataset / f"{name}.png", rng.integers(0, 255, (64, 96, 3), dtype=np.uint8))
    rows = [("0", "one", "a.png"), ("1", "two", ""), ("2", "three", "b.png")]
    write_table(dataset, [(f"videos/{video}.mp4", caption, image) for video, caption, image in rows])
    return dataset


def write_table(root, rows, image="image"):
    lines = [json.dumps({"video": v, "caption": c, image: i}) for v, c, i in rows]
    (root / "table.jsonl").write_text("\n".join(lines))


def read(root, *, table="table.jsonl", image_column: str | None = "image", spec=SPEC, memo=None):
    source = Source(root=root, table=table, image_column=image_column)
    return survey(read_manifest(source), spec, memo=memo)


def cache_settings(spec=SPEC, image_variants=2, **more):
    video = VideoSettings.from_spec(spec, vae="a", dtype="float32", image_variants=image_variants, seed=1, **more)
    text = TextSettings(text_encoder="b", tokenizer="c", dtype="float32", max_sequence_length=5)
    return CacheSettings(model="tiny", video=video, text=text)


def fill(cache, manifest):
    """Do what prepare does; every latent tells what it was made of."""
    clips, images = cache.missing_clips(manifest.clips), cache.missing_images(manifest.clips)
    for clip in clips:
        ones = np.ones(SHAPE)
        image = (
            np.full((2, *SHAPE[1:]), 1.0) if not clip.image_content and cache.settings.video.image_variants else None
        )
        sigmas = [] if image is None else [0, 0.1]
        cache.write_clip(clip, mean=ones, logvar=ones, image_mean=image, image_logvar=image, image_sigmas=sigmas)
    for clip in images:
        image = np.full((2, *SHAPE[1:]), 2.0)
        cache.write_image(clip, image_mean=image, image_logvar=image, image_sigmas=[0, 0.1])
    for caption in cache.missing_captions(manifest.clips):
        cache.write_caption(caption, np.zeros((5, 8)))
    return len(clips), len(images)


def test_rows_with_and_without_an_image(table):
    manifest = read(table)
    assert manifest.counts() == {"used": 3}
    assert [clip.image_content is not None for clip in manifest.clips] == [True, False, True]
    assert manifest.clips[0].facts["image_height"] == 64
    assert "column 'image' names the images to start from" in manifest.notes[0]
    plain = read(table, image_column=None)
    assert [clip.image_path for clip in plain.clips] == [None] * 3
    assert plain.clips[1].id == manifest.clips[1].id
    assert plain.clips[0].id != manifest.clips[0].id


@pytest.mark.parametrize("suffix", ["csv", "tsv", "parquet"])
def test_every_table_has_the_column(table, suffix):
    rows = [json.loads(line) for line in (table / "table.jsonl").read_text().split("\n")]
    if suffix == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), table / "table.parquet")
    else:
        comma = "\t" if suffix == "tsv" else ","
        lines = [comma.join(rows[0]), *(comma.join(row.values()) for row in rows)]
        (table / f"table.{suffix}").write_text("\n".join(lines))
    found, wanted = read(table, table=f"table.{suffix}"), read(table)
    assert [clip.id for clip in found.clips] == [clip.id for clip in wanted.clips]


def test_doctor_reads_the_entries_of_images(table, tmp_path):
    manifest = read(table)
    cache = Cache(tmp_path / "cache", cache_settings())
    fill(cache, manifest)
    cache.publish(manifest)
    assert set(audit_cache(cache.folder).counts().items()) >= {("missing", 0), ("damaged", 0), ("foreign", 0)}
    file = cache.folder / cache.image_file(manifest.clips[0])
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert [f.file for f in audit_cache(cache.folder).of("damaged")] == [cache.image_file(manifest.clips[0])]
    file.unlink()
    assert [f.rows for f in audit_cache(cache.folder).of("missing")] == [(1,)]


def test_a_column_that_is_named_must_be_there(table):
    with pytest.raises(DataError, match=r"no column 'first_image' \(did you mean 'image'"):
        read(table, image_column="first_image")
    (table / "other.csv").write_text("video,caption\nvideos/0.mp4,a\n")
    assert read(table, table="other.csv").clips[0].image_content is None
    with pytest.raises(DataError, match="is no table"):
        read_manifest(replace(Source.detect(table), image_column="picture"))
    (table / "table.jsonl").write_text(json.dumps({"video": "videos/0.mp4", "caption": "a", "image": 3}))
    assert read(table).clips[0].reason == "row.malformed"


def test_what_is_wrong_with_an_image_is_named(table, tmp_path):
    (table / "broken.png").write_bytes((table / "a.png").read_bytes()[:300])
    write_png(tmp_path / "outside.png", np.zeros((8, 8, 3), np.uint8))
    wrong = {
        "gone.png": "image.missing", "../outside.png": "image.outside", "broken.png": "image.unreadable",
        "videos/0.mp4": "image.unreadable", "videos": "image.missing", "a.png": None,
    }  # fmt: skip
    write_table(table, [("videos/0.mp4", f"caption {i}", name) for i, name in enumerate(wrong)])
    manifest = read(table)
    assert [clip.reason for clip in manifest.clips] == list(wrong.values())
    assert sum(manifest.counts().values()) == len(wrong)
    assert all("image" in clip.detail for clip in manifest.lost)


def test_one_clip_may_start_from_two_images_but_not_twice_from_one(table):
    (table / "copy.png").write_bytes((table / "a.png").read_bytes())
    names = ["a.png", "b.png", "", "a.png", "copy.png"]
    write_table(table, [("videos/0.mp4", "same", name) for name in names])
    assert [clip.reason for clip in read(table).clips] == [None, None, None, "row.duplicate", "row.duplicate"]


def test_a_memo_sees_a_changed_image(table, tmp_path, monkeypatch):
    monkeypatch.setattr("cogvideox_factory.data.memo._FRESH_NS", -1)
    memo = Memo(tmp_path / "memo.jsonl")
    before = read(table, memo=memo)
    memo.save()
    assert [c.id for c in read(table, memo=Memo(tmp_path / "memo.jsonl")).clips] == [c.id for c in before.clips]
    write_png(table / "a.png", np.zeros((64, 96, 3), np.uint8))
    after = read(table, memo=Memo(tmp_path / "memo.jsonl"))
    assert [a.id == b.id for a, b in zip(before.clips, after.clips)] == [False, True, True]


def test_an_image_decides_about_its_own_entry_only(table, tmp_path):
    cache = Cache(tmp_path / "cache", cache_settings())
    manifest = read(table)
    assert fill(cache, manifest) == (3, 2)
    index = cache.publish(manifest)
    assert [clip.image_file is not None for clip in open_cache(cache.folder, cache.settings).clips] == [
        True,
        False,
        True,
    ]
    assert index.clips[0].shapes["image_mean"] == (2, *SHAPE[1:])
    draws = Draws(seed=0, image_to_video=True, image_noise=False)
    values = [CacheSource(index).sample(Pick(c.id, 0), draws)["image_mean"].max() for c in index.clips]
    assert values == [2, 1, 2]
    write_png(table / "a.png", np.zeros((64, 96, 3), np.uint8))
    assert fill(cache, read(table)) == (0, 1)
    video_only = Cache(cache.folder, cache_settings(image_variants=0))
    assert [clip.row for clip in video_only.missing_clips(read(table, image_column=None).clips)] == [2]
    longer = replace(SPEC, fps=4.0)
    assert len(Cache(cache.folder, cache_settings(longer)).missing_images(read(table).clips)) == 0
    wider = replace(SPEC, width=64)
    assert len(Cache(cache.folder, cache_settings(wider)).missing_images(read(table, spec=wider).clips)) == 2
    entry = cache.folder / cache.image_file(read(table).clips[0])
    entry.write_bytes(entry.read_bytes()[:-1])
    assert fill(cache, read(table)) == (0, 1)


@pytest.mark.parametrize("crop", ["center", "random", "stretch"])
def test_an_image_of_the_clips_own_size_is_cropped_at_the_clips_place(table, make_video, crop):
    """Oracle: the clip itself, whose first frame the picture is (a lossless clip, so that they are equal)."""
    rng = np.random.default_rng(3)
    picture = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
    make_video(table / "videos/v.mkv", pictures=[picture] * 9, height=64, width=64, codec="ffv1", pix_fmt="bgr0")
    write_png(table / "first.png", picture)
    write_table(table, [("videos/v.mkv", "noise", "first.png")])
    spec = replace(SPEC, crop=crop)
    (clip,) = read(table, spec=spec).usable
    assert clip.path is not None
    for seed in range(5):
        frames = read_clip(clip.path, spec, rng=generator(seed, "crop", "x")).pixels
        image = read_condition(clip, generator(seed, "crop", "x"))
        assert np.array_equal(image, frames[0])


def test_raw_samples_carry_the_image_flipped_with_the_clip(table):
    source = RawSource(read(table).usable, latent_channels=4)
    for probability in (0.0, 1.0):
        draws = Draws(seed=0, image_to_video=True, flip_probability=probability)
        for clip in read(table).usable:
            sample = source.sample(Pick(clip.id, 0), draws)
            expected = read_condition(clip) if clip.image_path else None
            if expected is None:
                assert np.array_equal(sample["image_pixels"], sample["pixels"][0])
            else:
                assert np.array_equal(sample["image_pixels"], expected[:, ::-1] if probability else expected)
    plain = RawSource(read(table, image_column=None).usable, latent_channels=4)
    (first, *_) = read(table, image_column=None).usable
    assert "image_pixels" not in plain.sample(Pick(first.id, 0), Draws(seed=0, image_to_video=True))


def test_an_image_that_changes_under_way_is_an_error(table):
    (clip, *_) = read(table).usable
    write_png(table / "a.png", np.zeros((64, 99, 3), np.uint8))
    with pytest.raises(ClipError, match=r"changed while clips were read.*image\.changed"):
        read_condition(clip)
    (table / "a.png").unlink()
    with pytest.raises(ClipError, match=r"image\.unreadable"):
        read_condition(clip)


def test_a_clean_list_keeps_the_images(table):
    write_clean_list(
        read(table), table / "clean.jsonl", root=table, caption_column="caption", video_column="video",
        trigger_word=None, image_column="image",
    )  # fmt: skip
    assert [clip.id for clip in read(table, table="clean.jsonl").clips] == [clip.id for clip in read(table).clips]
