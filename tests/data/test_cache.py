import json
import multiprocessing
import os
import shutil
import signal
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.cache_index import open_cache, verify_cache
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.draws import normal
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.publish import sweep

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
SHAPE = (3, 4, 4, 6)


def settings(**more) -> CacheSettings:
    video = VideoSettings.from_spec(SPEC, vae="a" * 64, dtype="float32", image_variants=more.pop("image_variants", 0))
    text = TextSettings(text_encoder="b" * 64, tokenizer="c" * 64, dtype="float32", max_sequence_length=5)
    return CacheSettings(model="tiny", video=replace(video, **more), text=text)


def moments(clip) -> dict:
    return {key: normal(0, key, clip.content, shape=SHAPE) for key in ("mean", "logvar")}


def fill(cache, manifest) -> tuple[int, int]:
    """Do what prepare does, with numbers drawn in place of encoders."""
    clips, captions = cache.missing_clips(manifest.clips), cache.missing_captions(manifest.clips)
    variants = cache.settings.video.image_variants
    for clip in clips:
        image = {}
        if variants:
            shape = (variants, *SHAPE[1:])
            image = {key: normal(0, key, clip.content, shape=shape) for key in ("image_mean", "image_logvar")}
            image["image_sigmas"] = [0.0] + [0.05] * (variants - 1)
        cache.write_clip(clip, **moments(clip), **image)
    for caption in captions:
        cache.write_caption(caption, normal(0, "text", caption, shape=(5, 8)))
    return len(clips), len(captions)


@pytest.fixture
def manifest(dataset):
    return survey(read_manifest(dataset), SPEC)


@pytest.fixture
def cache(tmp_path):
    return Cache(tmp_path / "cache", settings())


def tree(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_written_is_read_back(cache, manifest):
    assert fill(cache, manifest) == (3, 4)
    index = cache.publish(manifest)
    assert [clip.id for clip in index.clips] == [clip.id for clip in manifest.clips]
    assert index.recorded["counts"] == {"used": 3}
    for clip, cached in zip(manifest.clips, index.clips):
        arrays, header = read_entry(cached.clip_file, verify=True)
        for key, value in moments(clip).items():
            assert (arrays[key] == value.astype(ml_dtypes.bfloat16)).all()
        assert cached.bucket == "9x32x48"
        assert cached.shapes == {"mean": SHAPE, "logvar": SHAPE, "prompt_embeds": (5, 8)}
        assert header.metadata["content"] == clip.content
    assert read_entry(index.empty_file)[0]["prompt_embeds"].shape == (5, 8)
    assert open_cache(cache.folder, settings()).clips == index.clips
    assert verify_cache(cache.folder) == []


def test_every_row_of_the_input_is_in_the_list(cache, dataset):
    (dataset / "videos.txt").write_text("videos/0.mp4\nvideos/gone.mp4\nvideos/0.mp4\n\n")
    (dataset / "prompts.txt").write_text("one\ntwo\none\n\ud800\n".encode("utf-8", "replace").decode())
    manifest = survey(read_manifest(dataset), SPEC)
    fill(cache, manifest)
    rows = cache.publish(manifest).rows
    assert [row["state"] for row in rows] == ["used", "missing", "duplicate", "missing"]
    assert [row["reason"] for row in rows] == [None, "path.missing", "row.duplicate", "path.empty"]
    assert sum(open_cache(cache.folder).recorded["counts"].values()) == len(rows) == 4
    assert rows[0]["frames"] == "0:8:1"


def test_rerunning_makes_only_what_is_missing_and_ends_the_same(cache, manifest):
    fill(cache, manifest)
    cache.publish(manifest)
    before = tree(cache.folder)
    assert fill(cache, manifest) == (0, 0)
    removed = cache.folder / cache.clip_file(manifest.clips[1])
    removed.unlink()
    cut = cache.folder / cache.caption_file("")
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [clip.row for clip in cache.missing_clips(manifest.clips)] == [2]
    assert cache.missing_captions(manifest.clips) == [""]
    fill(cache, manifest)
    cache.publish(manifest)
    assert tree(cache.folder) == before


def test_a_changed_part_leaves_the_other_alone(cache, manifest, dataset):
    fill(cache, manifest)
    larger = Cache(cache.folder, settings(height=64))
    assert (len(larger.missing_clips(manifest.clips)), larger.missing_captions(manifest.clips)) == (3, [])
    longer = Cache(cache.folder, replace(settings(), text=replace(settings().text, max_sequence_length=7)))
    assert (longer.missing_clips(manifest.clips), len(longer.missing_captions(manifest.clips))) == ([], 4)
    (dataset / "prompts.txt").write_text("a first clip\nchanged\na third clip\n")
    edited = survey(read_manifest(dataset), SPEC)
    assert cache.missing_clips(edited.clips) == []
    assert cache.missing_captions(edited.clips) == ["changed"]


def test_one_content_with_two_captions_is_encoded_once(cache, dataset):
    (dataset / "videos.txt").write_text("videos/0.mp4\nvideos/0.mp4\n")
    (dataset / "prompts.txt").write_text("one\ntwo\n")
    manifest = survey(read_manifest(dataset), SPEC)
    assert fill(cache, manifest) == (1, 3)
    clips = cache.publish(manifest).clips
    assert clips[0].clip_file == clips[1].clip_file
    assert clips[0].id != clips[1].id


def test_two_sizes_live_side_by_side_and_the_last_is_current(cache, manifest):
    fill(cache, manifest)
    cache.publish(manifest)
    other = Cache(cache.folder, settings(height=64))
    fill(other, manifest)
    other.publish(manifest)
    with pytest.raises(UnfitError, match=r"video\.height  cache: 64  this run: 32"):
        open_cache(cache.folder, settings())
    assert fill(cache, manifest) == (0, 0)
    cache.publish(manifest)
    assert len(open_cache(cache.folder, settings()).clips) == 3


def test_image_moments(tmp_path, manifest):
    cache = Cache(tmp_path / "cache", settings(image_variants=3))
    fill(cache, manifest)
    index = cache.publish(manifest)
    assert index.clips[0].shapes["image_mean"] == (3, 4, 4, 6)
    _, header = read_entry(index.clips[0].clip_file)
    assert json.loads(header.metadata["image_sigmas"]) == [0.0, 0.05, 0.05]
    with pytest.raises(UnfitError, match=r"video\.image_variants"):
        open_cache(cache.folder, settings())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_not_written(cache, manifest, value):
    clip = manifest.clips[0]
    bad = moments(clip)
    bad["logvar"][1, 2, 3, 4] = value
    with pytest.raises(UnfitError, match=r"videos/0\.mp4: logvar"):
        cache.write_clip(clip, **bad)
    with pytest.raises(UnfitError, match="caption 'x'"):
        cache.write_caption("x", np.full((5, 8), value, np.float32))
    assert not cache.folder.exists()


def test_lost_while_encoding(cache, manifest):
    error = ClipError("video.corrupt", "frame 7 is damaged")
    manifest = manifest.with_clips([manifest.clips[1].rejected(error)])
    fill(cache, manifest)
    index = cache.publish(manifest)
    assert [row["state"] for row in index.rows] == ["used", "corrupt", "used"]
    assert len(index.clips) == 2


def test_an_unfinished_cache_is_refused(cache, manifest, tmp_path):
    with pytest.raises(UnfitError, match=r"no finished cache.*Run `cogvideox prepare x`"):
        open_cache(cache.folder, command="cogvideox prepare x")
    fill(cache, manifest)
    with pytest.raises(UnfitError, match="no finished cache"):
        open_cache(cache.folder)
    (cache.folder / cache.clip_file(manifest.clips[0])).unlink()
    with pytest.raises(UnfitError):
        cache.publish(manifest)
    fill(cache, manifest)
    cache.publish(manifest)
    with (cache.folder / "clips.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(UnfitError, match=r"clips\.jsonl does not belong"):
        open_cache(cache.folder)
    (cache.folder / "cache.json").write_text('{"format":')
    with pytest.raises(UnfitError, match=r"cache\.json is damaged"):
        open_cache(cache.folder)


def test_damage_is_named(cache, manifest):
    fill(cache, manifest)
    index = cache.publish(manifest)
    files = [clip.clip_file for clip in index.clips]
    data = files[0].read_bytes()
    files[0].write_bytes(data[:-40] + bytes([data[-40] ^ 1]) + data[-39:])
    assert open_cache(cache.folder)  # sizes and headers are right; the bytes are only known when read
    assert [str(files[0]) in problem for problem in verify_cache(cache.folder)] == [True]
    files[0].write_bytes(data[:-8])
    files[1].unlink()
    shutil.copy(files[2], files[0])
    problems = verify_cache(cache.folder)
    assert len(problems) == 2
    with pytest.raises(UnfitError, match="2 bad entries"):
        open_cache(cache.folder)
    assert [clip.row for clip in cache.missing_clips(manifest.clips)] == [
        1,
        2,
    ]  # another's bytes are not taken
    fill(cache, manifest)
    cache.publish(manifest)
    assert verify_cache(cache.folder) == []


def _prepare(folder, manifest, barrier):
    barrier.wait()
    cache = Cache(folder, settings())
    fill(cache, manifest)
    cache.publish(manifest)


def test_several_writers_at_once_end_as_one(cache, manifest, tmp_path):
    fill(cache, manifest)
    cache.publish(manifest)
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(3)
    folder = tmp_path / "shared"
    writers = [context.Process(target=_prepare, args=(folder, manifest, barrier)) for _ in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0, 0]
    assert tree(folder) == tree(cache.folder)


def _die(folder, manifest, boundary):
    calls = iter(range(1000))
    real = os.replace

    def replace_or_die(*args):
        if next(calls) == boundary:
            os.kill(os.getpid(), signal.SIGKILL)
        real(*args)

    os.replace = replace_or_die
    cache = Cache(folder, settings())
    fill(cache, manifest)
    cache.publish(manifest)


def test_killed_before_every_rename_the_next_run_ends_the_same(cache, manifest, tmp_path):
    fill(cache, manifest)
    cache.publish(manifest)
    wanted = tree(cache.folder)
    context = multiprocessing.get_context("fork")
    for boundary in range(9):  # 3 clips, 4 captions, the list, cache.json
        folder = tmp_path / f"killed{boundary}"
        child = context.Process(target=_die, args=(folder, manifest, boundary))
        child.start()
        child.join()
        assert child.exitcode == -signal.SIGKILL
        again = Cache(folder, settings())
        with pytest.raises(UnfitError):
            open_cache(folder)
        assert fill(again, manifest) == (max(0, 3 - boundary), min(4, max(0, 7 - boundary)))
        again.publish(manifest)
        sweep(folder)
        assert tree(folder) == wanted
