"""Decoding in a process apart: the same pixels and refusals as here, and a crash, a hang or greed costs one clip."""

import os
import signal
import sys
from dataclasses import fields

import numpy as np
import pytest

from cogvideox_factory.data import apart, video
from cogvideox_factory.data import memo as memo_module
from cogvideox_factory.data.condition import read_condition
from cogvideox_factory.data.glimpse import look_closer
from cogvideox_factory.data.image import probe_picture
from cogvideox_factory.data.manifest import Clip, read_manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import probe_clip, read_clip
from cogvideox_factory.data.video_info import file_stamp
from cogvideox_factory.draws import generator
from tests.clips import draw_clips
from tests.faults.makers import spoilt_decoder

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8, crop="random")


@pytest.fixture
def clips(tmp_path):
    draw_clips(tmp_path / "clips", [(9, 64, 64), (12, 48, 64)])
    return tmp_path / "clips"


@pytest.fixture
def fresh(monkeypatch):
    """Processes of this test alone."""
    monkeypatch.setattr(apart, "_pool", apart._Pool())
    yield
    apart._pool.end()


def test_pixels_facts_and_refusals_are_those_of_this_process(clips):
    write_png(clips / "still.png", np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    (clips / "broken.mp4").write_bytes((clips / "0.mp4").read_bytes()[:-1000])
    draw = (7, "crop", "x")
    for name in ("0.mp4", "1.mp4", "still.png"):
        ours, here = apart.probe_clip(clips / name), probe_clip(clips / name)
        for field in fields(here):
            assert np.array_equal(getattr(ours, field.name), getattr(here, field.name)), field.name
        spec = SPEC if name != "still.png" else ClipSpec(num_frames=1, height=32, width=48, fps=8)
        given = apart.read_clip(clips / name, spec, draw=draw, stamp=file_stamp(clips / name))
        wanted = read_clip(clips / name, spec, rng=generator(*draw))
        assert np.array_equal(given.pixels, wanted.pixels)
        assert given.crop == wanted.fit.to_json()
    assert repr(apart.probe_picture(clips / "still.png")) == repr(probe_picture(clips / "still.png"))
    clip = Clip(row=1, name="0.mp4", caption="", image_name="still.png", image_path=clips / "still.png", spec=SPEC)
    assert np.array_equal(apart.read_condition(clip, draw=draw), read_condition(clip, generator(*draw)))
    calls = (
        lambda module: module.probe_clip(clips / "broken.mp4"),
        lambda module: module.read_clip(
            clips / "0.mp4", ClipSpec(num_frames=9, height=32, width=48, fps=8), stamp=(1, 2)
        ),
    )
    for call in calls:
        refused = []
        for module in (video, apart):
            with pytest.raises(ClipError) as caught:
                call(module)
            refused.append((caught.value.code, caught.value.message))
        assert refused[0] == refused[1]


def test_a_whole_data_set_is_the_same_and_the_processes_serve_again(clips, fresh, monkeypatch):
    started, popen = [], apart.subprocess.Popen
    monkeypatch.setattr(apart.subprocess, "Popen", lambda *a, **k: (started.append(a), popen(*a, **k))[1])
    here, there = (survey(read_manifest(clips), SPEC, is_apart=is_apart) for is_apart in (False, True))
    assert [clip.to_json() for clip in there.clips] == [clip.to_json() for clip in here.clips]
    (one, glimpses), (other, others) = (look_closer(here, SPEC, is_apart=is_apart) for is_apart in (False, True))
    assert [clip.to_json() for clip in one.clips] == [clip.to_json() for clip in other.clips]
    assert all(np.array_equal(glimpses[key].hashes, others[key].hashes) for key in glimpses)
    assert 1 <= len(started) <= 2  # as many as there are threads


def test_a_crash_a_hang_and_greed_cost_one_clip_each_and_are_tried_again(clips, fresh, tmp_path, monkeypatch):
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)
    for name in ("crash", "hang", "greed"):
        (clips / f"{name}.mp4").write_bytes((clips / "0.mp4").read_bytes() + name.encode())
        (clips / f"{name}.txt").write_text(name)
    memo = Memo(tmp_path / "memo.jsonl")
    with spoilt_decoder():
        manifest = survey(read_manifest(clips), SPEC, memo=memo, is_apart=True)
    memo.save()
    crashed = dict.fromkeys(("crash.mp4", "greed.mp4", "hang.mp4"), ("failed", "video.decoder_crash"))
    sound = {"0.mp4": ("used", None), "1.mp4": ("trimmed", None)}
    assert {clip.name: (clip.state, clip.reason) for clip in manifest.clips} == sound | crashed
    said = {clip.name: clip.detail for clip in manifest.clips}
    assert "crashed (SIGSEGV)" in said["crash.mp4"]
    assert "did not come to an end" in said["hang.mp4"]
    assert "more than 8 GiB" in said["greed.mp4"]

    again = survey(read_manifest(clips), SPEC, memo=Memo(tmp_path / "memo.jsonl"), is_apart=True)
    assert {clip.name: clip.state for clip in again.clips} == {
        "0.mp4": "used", "1.mp4": "trimmed", "crash.mp4": "used", "greed.mp4": "used", "hang.mp4": "used",
    }  # fmt: skip


def test_a_process_that_left_is_replaced_and_one_that_cannot_begin_is_our_fault(clips, fresh, monkeypatch, tmp_path):
    first = apart.probe_clip(clips / "0.mp4")
    for leave, is_seen in ((os.kill, True), (lambda pid, _: apart._pool.idle[0]._process.stdin.close(), False)):
        (idle,) = apart._pool.idle
        leave(idle._process.pid, signal.SIGKILL)
        idle._process.wait()
        with monkeypatch.context() as patch:
            if not is_seen:  # as if it left between the look and the question
                patch.setattr(apart._Decoder, "is_there", lambda self: True)
                patch.setattr(idle._process, "stdin", (tmp_path / "nobody").open("wb"))
            assert apart.probe_clip(clips / "0.mp4") == first
    apart._pool.end()
    monkeypatch.setattr(apart, "PROGRAM", "raise SystemExit(3)")
    with pytest.raises(RuntimeError, match="ended with exit code 3"):
        apart.probe_clip(clips / "0.mp4")


def test_threads_and_forks_do_not_mix_up_answers(clips, fresh):
    names = [f"{n % 2}.mp4" for n in range(24)]
    wanted = {name: read_clip(clips / name, SPEC, rng=generator(1, "crop", name)).pixels for name in set(names)}

    def same(name):
        return np.array_equal(apart.read_clip(clips / name, SPEC, draw=(1, "crop", name)).pixels, wanted[name])

    assert all(ordered_map(same, names, num_workers=4))
    if (child := os.fork()) == 0:
        os._exit(0 if not apart._pool.idle and same("0.mp4") else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert same("1.mp4")


def test_where_no_process_can_be_started_clips_are_decoded_in_this_one(clips, fresh, monkeypatch, capsys):
    path = clips / "0.mp4"
    expected = apart.probe_clip(path)
    apart._pool.end()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    found = [apart.probe_clip(path) for _ in range(2)]
    assert all(info.pts == expected.pts and np.array_equal(info.times, expected.times) for info in found)
    with pytest.raises(ClipError):
        apart.probe_clip(path.with_suffix(".txt"))
    assert capsys.readouterr().out.count("clips are decoded in this process, as none can be started for it") == 1
