"""The memo of a survey: the same answers, no second look, and a look whenever the file may be another one."""

import json
import os
from dataclasses import asdict

import pytest

from cogvideox_factory.data import look as look_module
from cogvideox_factory.data import memo as memo_module
from cogvideox_factory.data.auto_buckets import auto_buckets
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.fingerprint import hash_folder
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.survey import measure, survey
from cogvideox_factory.data.timing import ClipSpec

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)


@pytest.fixture
def looks(monkeypatch):
    """Names of the files that are opened."""
    seen = []
    original = look_module.probe_clip

    def probe(path, **more):
        seen.append(path.name)
        return original(path, **more)

    monkeypatch.setattr(look_module, "probe_clip", probe)
    return seen


@pytest.fixture
def old(dataset, monkeypatch):
    """The data set, as if it had been written a while ago (the time of an entry's last change cannot be set)."""
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)
    return dataset


def ask(dataset, file, spec=SPEC, **more):
    memo = Memo(file)
    manifest = survey(read_manifest(dataset), spec, memo=memo, **more)
    memo.save()
    return manifest


def everything(manifest):
    return [(asdict(clip), clip.spec) for clip in manifest.clips]


def test_the_second_look_opens_nothing_and_says_the_same(old, tmp_path, looks):
    file = tmp_path / "memo.jsonl"
    first = ask(old, file)
    opened = len(looks)
    assert opened == len(first.usable) > 1
    again = ask(old, file)
    assert len(looks) == opened
    assert everything(again) == everything(first) == everything(survey(read_manifest(old), SPEC))


def test_a_file_that_changed_is_looked_at_though_its_date_and_size_did_not(old, tmp_path, looks):
    file = tmp_path / "memo.jsonl"
    first = ask(old, file)
    path = first.usable[0].path
    status, data = path.stat(), bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    looks.clear()
    again = ask(old, file)
    assert looks == [path.name]
    assert again.clips[0].content != first.clips[0].content


def test_another_question_is_asked_anew_and_both_answers_stay(old, tmp_path, looks):
    file = tmp_path / "memo.jsonl"
    ask(old, file)
    ask(old, file, ClipSpec(num_frames=5, height=32, width=48, fps=8))
    looks.clear()
    ask(old, file)
    ask(old, file, ClipSpec(num_frames=5, height=32, width=48, fps=8))
    assert not looks


def paths_in(file):
    return {json.loads(line[memo_module._SEAL :])[1]["path"] for line in file.read_text().splitlines()}


def test_what_is_gone_or_changed_is_forgotten_when_the_memo_is_written_next(old, tmp_path):
    file = tmp_path / "memo.jsonl"
    ask(old, file)
    ask(old, file, ClipSpec(num_frames=5, height=32, width=48, fps=8))
    assert len(file.read_text().splitlines()) == 6
    gone, edited = old / "videos/0.mp4", old / "videos/1.mp4"
    gone.unlink()
    edited.write_bytes(edited.read_bytes() + b"\0")
    ask(old, file)
    assert paths_in(file) == {str(old / "videos/1.mp4"), str(old / "videos/2.mp4")}
    assert len(file.read_text().splitlines()) == 3  # two answers about 2.mp4, one about what 1.mp4 is now


def test_without_new_answers_nothing_is_written(old, tmp_path):
    file = tmp_path / "memo.jsonl"
    ask(old, file)
    before = file.stat()
    ask(old, file)
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_model_file_is_hashed_once_a_state(old, tmp_path, monkeypatch):
    hashed, real = [], memo_module.sha256_file
    monkeypatch.setattr(memo_module, "sha256_file", lambda path: (hashed.append(path.name), real(path))[1])
    folder = tmp_path / "vae"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    weights = folder / "model.safetensors"
    weights.write_bytes(b"0123")

    def digest():
        memo = Memo(tmp_path / "memo.jsonl")
        found = hash_folder(folder, hash_file=memo.sha256)
        memo.save()
        return found

    first = digest()
    assert first == digest() == hash_folder(folder)
    assert hashed == ["config.json", "model.safetensors"]
    status = weights.stat()
    weights.write_bytes(b"0124")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest() == hash_folder(folder) != first
    assert hashed[2:] == ["model.safetensors"]
    (folder / "more.json").write_text("{}")
    assert digest() == hash_folder(folder)
    assert hashed[3:] == ["more.json"]


def test_with_buckets_too(old, tmp_path, looks):
    file = tmp_path / "memo.jsonl"

    def bucketed():
        memo = Memo(file)
        rows = read_manifest(old)
        buckets = auto_buckets(measure(rows.usable, SPEC, memo=memo), native=Bucket(9, 32, 48), max_buckets=2)
        manifest = survey(rows, SPEC, buckets=buckets, memo=memo)
        memo.save()
        return manifest

    first = bucketed()
    looks.clear()
    assert everything(bucketed()) == everything(first)
    assert not looks


def test_what_was_just_written_is_not_trusted_yet(dataset, tmp_path, looks):
    file = tmp_path / "memo.jsonl"
    for path in dataset.rglob("*.mp4"):
        path.touch()
    ask(dataset, file)
    looks.clear()
    ask(dataset, file)
    assert looks


@pytest.mark.parametrize("damage", ["", "nonsense", '["a"]\n', '{"a": 1}\n'])
def test_a_damaged_memo_only_means_looking_again(old, tmp_path, damage):
    file = tmp_path / "memo.jsonl"
    file.write_text(damage)
    assert everything(ask(old, file)) == everything(survey(read_manifest(old), SPEC))


def test_a_flipped_bit_in_an_answer_is_not_believed(tmp_path, dataset):
    """Whatever bit it is, the clips come out as if nothing were remembered."""
    from unittest import mock

    file = tmp_path / "memo.jsonl"
    spec = ClipSpec(num_frames=9, height=32, width=48, fps=8)
    memo = Memo(file)
    with mock.patch("cogvideox_factory.data.memo._FRESH_NS", 0):
        wanted = survey(read_manifest(dataset), spec, memo=memo)
    memo.save()
    data = file.read_bytes()
    for place in range(0, 8 * len(data), 131):
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        file.write_bytes(spoilt)
        assert survey(read_manifest(dataset), spec, memo=Memo(file)) == wanted
