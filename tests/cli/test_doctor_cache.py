"""`cogvideox doctor CACHE`: every file in one state, damage is exit code 5, mending touches nothing else."""

import json
import subprocess
import sys

import pytest

from cogvideox_factory.cli import main
from tests.faults.caches import fill, finished
from tests.faults.trial import files_of


@pytest.fixture
def cache(tmp_path):
    return finished().copy(tmp_path / "cache")


def doctor(*words):
    return main(["doctor", *(str(word) for word in words)])


def entries(cache):
    return sorted(cache.folder.glob("*/??/*.safetensors"))


def test_a_good_cache_is_good_and_stays_as_it_is(cache, tmp_path, capsys):
    before = files_of(cache.folder, skip=())
    assert doctor(cache.folder, "--json", tmp_path / "r.json", "--fix", "True", "--orphans", "True") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"ok": 9, "missing": 0, "damaged": 0, "orphan": 0, "foreign": 0, "temp-left": 0}
    assert (report["total"], report["files"], report["set_aside"]) == (9, [], [])
    assert files_of(cache.folder, skip=()) == before
    assert "total" in capsys.readouterr().out


def test_every_file_ends_in_one_state_and_mending_makes_exactly_what_is_bad(cache, tmp_path, capsys):
    made = finished()
    clips, texts = ([p for p in entries(cache) if part in p.parts] for part in ("clips", "text"))
    data = bytearray(clips[0].read_bytes())
    data[-3] ^= 1
    clips[0].write_bytes(data)
    texts[1].unlink()
    (cache.folder / "holiday.mp4").write_bytes(b"mine")
    left = cache.folder / "clips" / clips[1].parent.name / ".tmp-elsewhere-1-abcd-x.safetensors"
    left.write_bytes(b"half")
    assert doctor(cache.folder, "--json", tmp_path / "r.json", "--fix", "True") == 5
    said = capsys.readouterr()
    assert "row" in said.out
    assert "2 bad files" in said.err
    assert "cogvideox prepare" in said.err
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"ok": 7, "missing": 1, "damaged": 1, "orphan": 0, "foreign": 1, "temp-left": 1}
    assert sum(report["counts"].values()) == report["total"]
    assert report["set_aside"] == [clips[0].relative_to(cache.folder).as_posix()]
    assert (cache.folder / "set-aside" / report["set_aside"][0]).read_bytes() == data
    assert (cache.folder / "holiday.mp4").read_bytes() == b"mine"
    assert fill(cache, made.manifest) == (1, 1)
    cache.publish(made.manifest)
    assert doctor(cache.folder) == 0


def test_temporaries_of_dead_writers_go_and_orphans_only_when_asked(cache):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    from cogvideox_factory.publish import _host

    (cache.folder / f".tmp-{_host()}-{dead.pid}-abcd-x").write_bytes(b"half")
    made = finished()
    cut = made.manifest.with_clips([])
    cache.publish(cut.__class__(source=cut.source, clips=cut.clips[:2]))
    assert doctor(cache.folder, "--fix", "True") == 0
    assert not list(cache.folder.glob(".tmp-*"))
    assert len(entries(cache)) == 7
    assert doctor(cache.folder, "--fix", "True", "--orphans", "True") == 0
    assert len(entries(cache)) == 5


def test_a_spoilt_list_is_told_and_good_entries_stay(cache, capsys):
    for name in ("cache.json", "clips.jsonl"):
        data = (cache.folder / name).read_bytes()
        (cache.folder / name).write_bytes(data.replace(b"clip", b"clap", 1))
        assert doctor(cache.folder, "--fix", "True") == 5
        assert fill(cache, finished().manifest) == (0, 0)
        cache.publish(finished().manifest)
        assert doctor(cache.folder) == 0


@pytest.mark.parametrize("words", [("--orphans", "True"), ("--data.root", ".")])
def test_words_that_would_do_nothing(cache, words, capsys):
    if words[0] == "--orphans":
        assert doctor(cache.folder, *words) == 2
        return
    with pytest.raises(SystemExit):
        doctor(cache.folder, *words)


def test_a_data_set_is_no_cache(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("x")
    assert doctor(tmp_path) == 2
    assert "--data.root" in capsys.readouterr().err


def test_no_framework_is_loaded(cache):
    code = f"import sys; from cogvideox_factory.cli import main; main(['doctor', {str(cache.folder)!r}])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("False")
