"""Preparing without a framework: what is done is known cheaply, what changed is noticed, shards share the work."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory import preparation
from cogvideox_factory.cli import prepare
from cogvideox_factory.data import memo as memo_module
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.preparation import Shard
from cogvideox_factory.recipe import check
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.weights import resolve_model

NUM_CLIPS = 6
ROOT = Path(__file__).parents[1]


@pytest.fixture
def clips(tmp_path, monkeypatch):
    """Drawn clips, as if written a while ago (the time of an entry's last change cannot be set)."""
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)
    for index in range(NUM_CLIPS):
        write_clip(tmp_path / "clips", index)
    return tmp_path / "clips"


def write_clip(folder, index):
    scene = random_scene(1, index)
    export_to_video(render(scene, num_frames=9, height=64, width=64, fps=8), folder / f"{index}.mp4", fps=8)
    (folder / f"{index}.txt").write_text(f"{scene.caption} {index}")


@pytest.fixture
def model(tmp_path):
    """A model folder of one's own to change."""
    return shutil.copytree(resolve_model("tiny-t2v"), tmp_path / "model")


class ZeroEngine:
    """Encodes everything to zeros and remembers what it was given."""

    def __init__(self, *, auto="float32", breaks=()):
        self.works, self.auto, self.breaks = [], auto, breaks

    def __call__(self):
        return self

    def auto_dtype(self, device, transformer):
        return self.auto

    def encode(self, work):
        self.works.append(work)
        for caption in work.captions:
            work.cache.write_caption(caption, np.zeros((work.cache.settings.text.max_sequence_length, 64)))
        for clip in work.clips:
            if clip.name not in self.breaks:
                zeros = np.zeros((3, 16, 8, 8))
                first = {} if clip.image_content else self.image(work)
                work.cache.write_clip(clip, mean=zeros, logvar=zeros, **first)
        for clip in work.images:
            if clip.image_name not in self.breaks:
                work.cache.write_image(clip, **self.image(work))
        return {c.footage: ClipError("video.corrupt", "broken") for c in work.clips if c.name in self.breaks} | {
            work.cache.image_file(c): ClipError("image.unreadable", "broken")
            for c in work.images
            if c.image_name in self.breaks
        }

    @staticmethod
    def image(work):
        variants = work.cache.settings.video.image_variants
        zeros = np.zeros((variants, 16, 8, 8))
        return {"image_mean": zeros, "image_logvar": zeros, "image_sigmas": [0.0] * variants} if variants else {}

    @property
    def made(self):
        """(clips, captions) of each time it was asked."""
        return [(len(work.clips), len(work.captions)) for work in self.works]


def never():
    raise AssertionError("nothing is to be encoded, so no engine is needed")


def settings(clips, model, tmp_path, **more):
    sections = {
        "model": {"path": str(model)}, "data": {"root": str(clips)}, "cache": {"dir": str(tmp_path / "cache")},
        "run": {"device": "cpu"},
    }  # fmt: skip
    return check({name: sections.get(name, {}) | more.get(name, {}) for name in sections | more}, source="test")


def test_a_finished_preparation_needs_no_engine_and_writes_nothing(clips, model, tmp_path):
    config, engine = settings(clips, model, tmp_path), ZeroEngine()
    first = preparation.run(config, engine)
    assert engine.made == [(NUM_CLIPS, NUM_CLIPS + 1)]
    before = tree(tmp_path / "cache")
    again = preparation.run(config, never)
    assert again.rows == first.rows
    assert tree(tmp_path / "cache") == before


def tree(folder):
    """State of every file but the lock: what it is and when it was written."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != ".lock"]
    return {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}


def test_what_changed_is_noticed(clips, model, tmp_path):
    """The clip and the weights keep size and date: only the time of the entry's change tells."""
    config, engine = settings(clips, model, tmp_path), ZeroEngine()
    preparation.run(config, engine)

    (clips / "0.txt").write_text("something else")
    preparation.run(config, engine)
    write_clip(clips, 77)
    preparation.run(config, engine)
    under_its_old_date(clips / "1.mp4", render(random_scene(1, 500), num_frames=9, height=64, width=64, fps=8))
    preparation.run(config, engine)
    assert engine.made[1:] == [(0, 1), (1, 1), (1, 0)]

    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    flip_a_byte(vae)
    preparation.run(config, engine)
    assert engine.made[4:] == [(NUM_CLIPS + 1, 0)]
    flip_a_byte(next((model / "text_encoder").glob("*.safetensors")))
    preparation.run(config, engine)
    assert engine.made[5:] == [(0, NUM_CLIPS + 2)]
    preparation.run(settings(clips, model, tmp_path, run={"seed": 7, "dtype": "bfloat16"}), engine)
    assert engine.made[6:] == [(NUM_CLIPS + 1, NUM_CLIPS + 2)]
    preparation.run(settings(clips, model, tmp_path, run={"seed": 7, "dtype": "bfloat16"}), never)


def under_its_old_date(path, frames):
    status = path.stat()
    path.unlink()
    export_to_video(frames, path, fps=8)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def flip_a_byte(path):
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_damaged_entry_or_list_is_made_again(clips, model, tmp_path):
    config, engine = settings(clips, model, tmp_path), ZeroEngine()
    index = preparation.run(config, engine)
    index.clips[0].clip_file.write_bytes(index.clips[0].clip_file.read_bytes()[:-1])
    (tmp_path / "cache" / "clips.jsonl").write_text("nonsense")
    (tmp_path / "cache" / "cache.json").write_text("{")
    assert preparation.run(config, engine).rows == index.rows
    assert engine.made[1:] == [(1, 0)]


def test_auto_goes_on_with_what_a_finished_cache_was_made_in(clips, model, tmp_path):
    """As on a machine with a card first and on one without afterwards."""
    config = settings(clips, model, tmp_path, run={"device": "auto"})
    preparation.run(config, ZeroEngine(auto="bfloat16"))
    assert preparation.run(config, never).recorded["video"]["settings"]["dtype"] == "bfloat16"
    engine = ZeroEngine()
    preparation.run(settings(clips, model, tmp_path), engine)  # a CPU was asked for, which means float32
    assert engine.made == [(NUM_CLIPS, NUM_CLIPS + 1)]
    preparation.run(settings(clips, model, tmp_path, run={"device": "auto", "dtype": "float16"}), ZeroEngine())
    engine = ZeroEngine(auto="bfloat16")  # auto never is float16 for this model, so nothing is taken over
    preparation.run(config, engine)
    assert engine.made == []  # the bfloat16 entries are still there
    assert preparation.run(config, never).recorded["video"]["settings"]["dtype"] == "bfloat16"


def test_a_failed_clip_is_tried_again_and_named_in_the_list(clips, model, tmp_path):
    config = settings(clips, model, tmp_path, data={"max_bad": 0.5})
    index = preparation.run(config, ZeroEngine(breaks={"2.mp4"}))
    assert [row["reason"] for row in index.rows if row["state"] == "corrupt"] == ["video.corrupt"]
    engine = ZeroEngine()
    assert len(preparation.run(config, engine).clips) == NUM_CLIPS
    assert engine.made == [(1, 0)]


@given(st.binary(min_size=32, max_size=32), st.integers(1, 64))
def test_everything_is_of_exactly_one_shard(digest, count):
    assert sum(Shard(number=number, count=count).takes(digest.hex()) for number in range(1, count + 1)) == 1


@pytest.mark.parametrize("text", ["", "1", "0/2", "3/2", "1/0", "a/b", "1/2/3", "-1/2", "1 / 2"])
def test_what_is_no_shard(text):
    with pytest.raises(FactoryError, match=r"is no part of the work; give I/N"):
        Shard.parse(text)


def test_the_last_shard_lists_the_clips(clips, model, tmp_path, capsys):
    config, engine = settings(clips, model, tmp_path), ZeroEngine()
    shards = [Shard.parse(f"{number}/3") for number in (3, 1, 2)]
    results = [preparation.run(config, engine, shard=shard) for shard in shards]
    assert results[:2] == [None, None]
    assert "are with others" in capsys.readouterr().out
    assert len(results[2].clips) == NUM_CLIPS
    assert sum(clips for clips, _ in engine.made) == NUM_CLIPS
    assert sum(captions for _, captions in engine.made) == NUM_CLIPS + 1
    assert preparation.run(config, never).rows == results[2].rows


def test_processes_of_torchrun_share_the_work_without_being_told(clips, model, tmp_path, capsys, monkeypatch):
    engine, done = ZeroEngine(), []
    monkeypatch.setattr(prepare, "_engine", lambda config: engine)
    words = ["--model.path", str(model), "--data.root", str(clips), "--run.device", "cpu"]
    words += ["--cache.dir", str(tmp_path / "cache")]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        prepare.run(words)
        assert f"--prepare.shard {rank + 1}/3" in capsys.readouterr().out
        done.append((tmp_path / "cache/cache.json").exists())
    assert done == [False, False, True]
    assert sum(clips for clips, _ in engine.made) == NUM_CLIPS
    assert len([work for work in engine.works if work.clips]) > 1
    shutil.rmtree(tmp_path / "cache")
    prepare.run([*words, "--prepare.shard", "1/1"])  # what is asked for counts
    assert engine.made[-1] == (NUM_CLIPS, NUM_CLIPS + 1)
    assert Shard.of_process({}) is Shard.of_process({"RANK": "0", "WORLD_SIZE": "1"}) is None
    assert Shard.of_process({"RANK_ID": "2", "MS_WORKER_NUM": "4"}) == Shard(number=3, count=4)


def test_a_plain_run_ends_what_a_shard_left(clips, model, tmp_path):
    config = settings(clips, model, tmp_path, data={"max_bad": 0.5})
    assert preparation.run(config, ZeroEngine(breaks={"2.mp4", "3.mp4"}), shard=Shard(number=1, count=2)) is None
    engine = ZeroEngine()
    assert len(preparation.run(config, engine).clips) == NUM_CLIPS
    assert 0 < engine.made[0][0] < NUM_CLIPS


@pytest.fixture
def mixed(tmp_path, monkeypatch):
    """Settings of two sets: two videos of two windows each that start from one image, and a short clip without."""
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)
    for index, num_frames in enumerate((20, 20, 9)):
        folder = tmp_path / ("short" if num_frames == 9 else "long")
        frames = render(random_scene(1, index), num_frames=num_frames, height=64, width=64, fps=8)
        export_to_video(frames, folder / f"{index}.mp4", fps=8)
    write_png(tmp_path / "long/start.png", np.full((64, 64, 3), 99, np.uint8))
    (tmp_path / "long/clips.csv").write_text("video,caption,image\n0.mp4,one,start.png\n1.mp4,two,start.png\n")
    (tmp_path / "short/2.txt").write_text("three")
    sets = [{"root": str(tmp_path / "long"), "table": "clips.csv"}, {"root": str(tmp_path / "short"), "weight": 2.0}]
    return {
        "task": "i2v", "model": {"path": "tiny-i2v"}, "cache": {"dir": str(tmp_path / "cache")},
        "data": {"sets": sets, "windows": "all", "fps": 8.0, "max_bad": 0.5}, "run": {"device": "cpu"},
    }  # fmt: skip


def test_sets_windows_and_own_images_are_shared_out_and_known_to_be_there(mixed, tmp_path):
    config, engine = check(mixed, source="test"), ZeroEngine()
    results = [preparation.run(config, engine, shard=Shard(number=number, count=3)) for number in (1, 2, 3)]
    index = next(result for result in results if result)
    assert sum(len(work.clips) for work in engine.works) == len(index.clips) == 5
    assert sum(len(work.images) for work in engine.works) == 1
    assert [clip.set for clip in index.clips] == ["long"] * 4 + ["short"]
    assert len({clip.image_file for clip in index.clips if clip.image_file}) == 1
    assert [bool(clip.image_file) for clip in index.clips] == [True, False, True, False, False]
    preparation.run(config, never)
    before = tree(tmp_path / "cache")
    assert preparation.run(config, never).rows == index.rows
    assert tree(tmp_path / "cache") == before
    write_png(tmp_path / "long/start.png", np.full((64, 64, 3), 7, np.uint8))
    preparation.run(config, engine)
    assert (len(engine.works[-1].clips), len(engine.works[-1].images)) == (0, 1)


def test_an_image_that_cannot_be_encoded_takes_every_clip_that_starts_from_it(mixed):
    index = preparation.run(check(mixed, source="test"), ZeroEngine(breaks={"start.png"}))
    assert [row["reason"] for row in index.rows] == ["image.unreadable", None, "image.unreadable", None, None]


RERUN = """
import sys
opened = []
sys.addaudithook(lambda event, given: opened.append(str(given[0])) if event == "open" else None)
from cogvideox_factory.data import memo
memo._FRESH_NS = -1
from cogvideox_factory import cli
status = cli.main(sys.argv[2:])
loaded = sorted({"av", "torch", "transformers", "tokenizers", "sentencepiece", "diffusers"} & set(sys.modules))
clips = [path for path in opened if path.endswith((".mp4", ".png"))]
weights = [path for path in opened if path.endswith((".safetensors", ".model")) and sys.argv[1] not in path]
import json
print(json.dumps({"status": status, "loaded": loaded, "clips": clips, "weights": weights}))
"""


@pytest.mark.slow
def test_two_processes_at_once_give_the_tree_of_one_and_a_rerun_loads_neither_framework_nor_decoder(clips, tmp_path):
    """Real encoders in real processes, counted by what they say and by every file they open."""
    model = tmp_path / "tiny"
    shutil.copytree(resolve_model("tiny-t2v"), model)
    one, two = tmp_path / "one", tmp_path / "two"
    words = ["prepare", "--model.path", str(model), "--data.root", str(clips), "--run.device", "cpu", "--cache.dir"]
    alone = run_all([[*words, str(one)]], one)[0]
    pair = run_all([[*words, str(two), "--prepare.shard", f"{number}/2"] for number in (1, 2)], two)
    assert contents(one) == contents(two)
    encoded = [counts_of(out) for out in pair]
    assert tuple(map(sum, zip(*encoded))) == counts_of(alone) == (NUM_CLIPS, NUM_CLIPS + 1)
    assert "torch" in json.loads(alone.splitlines()[-1])["loaded"]

    again = run_all([[*words, str(one)]], one)[0]
    assert counts_of(again) == (0, 0)
    assert json.loads(again.splitlines()[-1]) == {"status": 0, "loaded": [], "clips": [], "weights": []}


def run_all(commands, cache):
    """Run commands at the same time and return what they print."""
    running = [
        subprocess.Popen(
            [sys.executable, "-c", RERUN, str(cache), *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for command in commands
    ]
    outs = [process.communicate(timeout=240)[0] for process in running]
    assert [process.returncode for process in running] == [0] * len(commands), outs
    return outs


def counts_of(out):
    """(clips, captions) it had to encode."""
    line = next(line for line in out.splitlines() if "captions to encode" in line)
    words = line.replace(",", "").replace(";", "").split()
    return int(words[2]), int(words[5])


def contents(cache):
    return {
        path.relative_to(cache).as_posix(): path.read_bytes()
        for path in sorted(cache.rglob("*"))
        if path.is_file() and path.name not in ("survey.jsonl", ".lock")
    }
