"""Entries that are wrong though their bytes are as they were written, and files that are no entries."""

import os
from dataclasses import replace

import numpy as np
import pytest

from cogvideox_factory.data.cache_check import audit_cache, is_cache, set_aside
from cogvideox_factory.data.entry import read_entry, write_entry
from cogvideox_factory.errors import StorageError
from tests.faults.caches import finished


@pytest.fixture
def cache(tmp_path):
    return finished().copy(tmp_path / "cache")


def rewrite(cache, change) -> str:
    """Write the first clip's entry anew with changed arrays, and finish the cache with it; return its file."""
    made = finished()
    file = cache.clip_file(made.manifest.clips[0])
    arrays, header = read_entry(cache.folder / file)
    metadata = {name: value for name, value in header.metadata.items() if name != "checksum"}
    changed = change({name: np.array(array) for name, array in arrays.items()})
    (cache.folder / file).unlink()
    write_entry(cache.folder / file, changed, metadata)
    cache.publish(made.manifest)
    return file


def not_finite(arrays):
    arrays["mean"][0, 0, 0, 0] = np.nan
    return arrays


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (not_finite, "mean holds values that are not finite"),
        (lambda a: {name: array.astype(np.float32) for name, array in a.items()}, "not bfloat16"),
        (lambda a: {"mean": a["mean"]}, "it has no logvar"),
        (lambda a: {name: array.transpose(1, 0, 2, 3) for name, array in a.items()}, "a clip of 9x64x64 gives 3 x"),
        (lambda a: {name: array[..., :4] for name, array in a.items()}, "x 8 x 8"),
    ],
)
def test_an_entry_that_is_wrong_whatever_its_checksum_says(cache, change, says):
    file = rewrite(cache, change)
    bad = audit_cache(cache.folder).of("damaged")
    assert [finding.file for finding in bad] == [file]
    assert bad[0].rows == (1,)
    assert says in bad[0].detail


def test_what_is_no_entry(cache, tmp_path):
    made = finished()
    clip, other = (cache.folder / cache.clip_file(clip) for clip in made.manifest.clips[:2])
    clip.unlink()
    clip.mkdir()
    (clip / "inside").write_text("x")
    other.unlink()
    os.mkfifo(other)
    (cache.folder / "link").symlink_to(tmp_path)
    audit = audit_cache(cache.folder)
    assert {f.file for f in audit.of("damaged")} == {str(p.relative_to(cache.folder)) for p in (clip, other)}
    assert sum(audit.counts().values()) == len(audit.findings)
    assert len(set_aside(audit)) == 2
    assert (cache.folder / "set-aside" / clip.relative_to(cache.folder) / "inside").read_text() == "x"


def test_an_unfinished_cache(cache, tmp_path):
    assert is_cache(cache.folder)
    assert not is_cache(tmp_path)
    (cache.folder / "cache.json").unlink()
    audit = audit_cache(cache.folder)
    assert [f.file for f in audit.of("missing")] == ["cache.json"]
    assert [f.file for f in audit.of("orphan")] == ["clips.jsonl"]
    assert len(audit.of("ok")) == 7, "what the entries are for nobody can tell, and they are good"
    (cache.folder / "clips.jsonl").unlink()
    assert is_cache(cache.folder)
    assert len(audit_cache(cache.folder).findings) == 8


def test_rows_with_exchanged_captions_are_told(cache):
    made = finished()
    one, two, _ = made.manifest.clips
    cache.publish(made.manifest)
    text = (cache.folder / cache.caption_file(one.caption)).read_bytes()
    (cache.folder / cache.caption_file(two.caption)).write_bytes(text)
    bad = audit_cache(cache.folder).of("damaged")
    assert [(finding.rows, finding.file) for finding in bad] == [((2,), cache.caption_file(two.caption))]


def test_a_cache_that_cannot_be_mended(cache, monkeypatch):
    cut = cache.folder / cache.caption_file("")
    cut.write_bytes(cut.read_bytes()[:-1])
    audit = audit_cache(cache.folder)

    def refuse(*args):
        raise OSError(30, "Read-only file system", str(cut))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match="Read-only"):
        set_aside(audit)
    assert replace(audit, findings=()).counts()["ok"] == 0
