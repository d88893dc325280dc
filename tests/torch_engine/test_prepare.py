"""Encoding for the cache, by events and counts: what overlaps, how often each model is asked, what a failure does."""

import threading

import pytest

from cogvideox_factory.data import apart
from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.recipe import check
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine import prepare
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.text_encoder import TextEncoder

NUM_CLIPS = 8
LONG = 60  # seconds until a test says that something never happened


@pytest.fixture
def clips(tmp_path):
    """Eight clips under five captions."""
    for index in range(NUM_CLIPS):
        scene = random_scene(1, index)
        export_to_video(render(scene, num_frames=9, height=64, width=64, fps=8), tmp_path / f"clips/{index}.mp4", fps=8)
        (tmp_path / f"clips/{index}.txt").write_text(f"a caption {index % 5}")
    return tmp_path / "clips"


def settings(clips, tmp_path, **more):
    sections = {
        "model": {"path": "tiny-t2v"}, "data": {"root": str(clips)}, "cache": {"dir": str(tmp_path / "cache")},
        "run": {"device": "cpu"},
    }  # fmt: skip
    return check({name: sections.get(name, {}) | more.get(name, {}) for name in sections | more}, source="test")


class Meeting:
    """Two things that must go on at the same time: each waits until the other is under way."""

    def __init__(self):
        self.reached = {name: threading.Event() for name in ("one", "other")}

    def wait(self, me, other):
        self.reached[me].set()
        assert self.reached[other].wait(LONG), f"{other} never began while {me} was at work"


def spy(monkeypatch, owner, name, before):
    """Call `before(number of the call, thread)` first, whenever `owner.name` is called."""
    real, calls, lock = getattr(owner, name), [], threading.Lock()

    def wrapped(*given, **named):
        with lock:
            calls.append(threading.current_thread())
            number = len(calls)
        before(number)
        return real(*given, **named)

    monkeypatch.setattr(owner, name, wrapped)
    return calls


def test_a_clip_is_decoded_while_the_one_before_is_encoded(clips, tmp_path, monkeypatch):
    meeting = Meeting()
    reads = spy(monkeypatch, apart, "read_clip", lambda n: n == 3 and meeting.wait("other", "one"))
    encodes = spy(monkeypatch, Encoder, "video", lambda n: n == 1 and meeting.wait("one", "other"))
    prepare.run(settings(clips, tmp_path))
    assert len(reads) == len(encodes) == NUM_CLIPS
    assert set(encodes) == {threading.main_thread()}
    assert threading.main_thread() not in reads


def test_a_clip_is_written_while_the_next_is_encoded(clips, tmp_path, monkeypatch):
    meeting = Meeting()
    spy(monkeypatch, Encoder, "video", lambda n: n == 2 and meeting.wait("one", "other"))
    writes = spy(monkeypatch, Cache, "write_clip", lambda n: n == 1 and meeting.wait("other", "one"))
    prepare.run(settings(clips, tmp_path))
    assert len(writes) == NUM_CLIPS
    assert threading.main_thread() not in writes


def test_captions_are_encoded_once_each_and_in_batches(clips, tmp_path, monkeypatch):
    asked = []
    real = TextEncoder.encode
    monkeypatch.setattr(
        TextEncoder, "encode", lambda self, texts, n: (asked.append(list(texts)), real(self, texts, n))[1]
    )
    prepare.run(settings(clips, tmp_path))
    assert asked == [["", *(f"a caption {number}" for number in range(5))]]
    for index in range(20):
        export_to_video(
            render(random_scene(1, 50 + index), num_frames=9, height=64, width=64, fps=8),
            clips / f"more-{index}.mp4", fps=8,
        )  # fmt: skip
        (clips / f"more-{index}.txt").write_text(f"a caption {index}")
    prepare.run(settings(clips, tmp_path))
    assert [len(batch) for batch in asked[1:]] == [8, 7]
    assert [text for batch in asked[1:] for text in batch] == [
        f"a caption {number}" for number in sorted(range(5, 20), key=str)
    ]


def test_what_another_process_made_meanwhile_is_not_made_again(clips, tmp_path, monkeypatch):
    """A second preparation starts with the same list and finds every entry there when its turn comes."""
    config, nested, real = settings(clips, tmp_path), [], prepare.TorchEngine.encode

    def other_first(self, work):
        if not nested:
            nested.append(work)
            prepare.run(config)
        return real(self, work)

    monkeypatch.setattr(prepare.TorchEngine, "encode", other_first)
    encodes = spy(monkeypatch, Encoder, "video", lambda n: None)
    texts = spy(monkeypatch, TextEncoder, "encode", lambda n: None)
    prepare.run(config)
    assert (len(nested[0].clips), len(encodes), len(texts)) == (NUM_CLIPS, NUM_CLIPS, 1)


def test_a_clip_that_is_not_finite_is_named_and_the_others_are_kept(clips, tmp_path, monkeypatch, capsys):
    def refuse(number):
        if number == 3:
            raise UnfitError("mean has values that are not finite")

    spy(monkeypatch, Cache, "write_clip", refuse)
    index = prepare.run(settings(clips, tmp_path, data={"max_bad": 0.5}))
    assert len(index.clips) == NUM_CLIPS - 1
    assert "not finite" in capsys.readouterr().out


def test_a_full_disk_stops_at_once_and_leaves_what_is_done(clips, tmp_path, monkeypatch):
    def fill(number):
        if number > 3:
            raise StorageError("the disk is full")

    spy(monkeypatch, Cache, "write_clip", fill)
    with pytest.raises(StorageError, match="the disk is full"):
        prepare.run(settings(clips, tmp_path))
    monkeypatch.undo()
    again = spy(monkeypatch, Encoder, "video", lambda n: None)
    assert len(prepare.run(settings(clips, tmp_path)).clips) == NUM_CLIPS
    assert len(again) == NUM_CLIPS - 3
