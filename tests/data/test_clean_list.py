import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.clean_list import write_clean_list
from cogvideox_factory.data.manifest import Source, read_manifest
from cogvideox_factory.errors import FactoryError, StorageError

NAMES = ["a.mp4", " b.mp4", "sub/ö 'c'.mp4", "gone.mp4", "", "../x.mp4"]
COLUMNS = {"caption_column": "caption", "video_column": "video"}


def read_back(root, file, **more):
    source = Source(root=root, table=os.path.relpath(file, root), **COLUMNS)
    return read_manifest(source, **more)


@given(
    st.lists(st.tuples(st.sampled_from(NAMES), st.text(max_size=12)), max_size=10),
    st.sampled_from([None, "sks", " sks "]),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_what_is_written_reads_back_as_the_same_usable_clips(tmp_path_factory, rows, trigger, absolute):
    folder = tmp_path_factory.mktemp("t")
    root = folder / "set"
    (root / "sub").mkdir(parents=True)
    for name in NAMES[:3]:
        (root / name).write_bytes(b"x")
    entries = [(str(root / name) if absolute and name else name, caption) for name, caption in rows]
    (root / "m.jsonl").write_text("".join(json.dumps({"video": v, "caption": c}) + "\n" for v, c in entries))
    manifest = read_manifest(Source(root=root, table="m.jsonl"), trigger_word=trigger)
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    file = folder / "clean.jsonl"
    count = write_clean_list(manifest, file, root=root, trigger_word=trigger, **COLUMNS)
    again = read_back(root, file, trigger_word=trigger)
    assert count == len(again.clips) == len(again.usable)
    assert [(c.path, c.caption) for c in again.clips] == [(c.path, c.caption) for c in manifest.usable]
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_a_folder_whose_names_begin_with_blanks_reads_back(tmp_path):
    (tmp_path / " a.mp4").write_bytes(b"x")
    (tmp_path / " a.txt").write_text("a caption")
    manifest = read_manifest(tmp_path)
    write_clean_list(manifest, tmp_path / "clean.jsonl", root=tmp_path, trigger_word=None, **COLUMNS)
    assert read_back(tmp_path, tmp_path / "clean.jsonl").usable[0].path == manifest.usable[0].path


def test_columns_are_those_asked_for(dataset, tmp_path):
    names = {"caption_column": "text", "video_column": "file"}
    write_clean_list(read_manifest(dataset), tmp_path / "c.jsonl", root=dataset, trigger_word=None, **names)
    first = json.loads((tmp_path / "c.jsonl").read_text().splitlines()[0])
    assert first == {"file": "videos/0.mp4", "text": "a first clip"}


@pytest.mark.parametrize("make", [lambda p: p.write_text("mine"), lambda p: p.mkdir(), lambda p: p.symlink_to("gone")])
def test_nothing_is_overwritten(dataset, tmp_path, make):
    file = tmp_path / "c.jsonl"
    make(file)
    with pytest.raises(StorageError, match="never overwritten"):
        write_clean_list(read_manifest(dataset), file, root=dataset, trigger_word=None, **COLUMNS)
    assert not file.is_file() or file.read_text() == "mine"


def test_another_ending_is_refused(dataset, tmp_path):
    with pytest.raises(FactoryError, match=r"end the name in \.jsonl"):
        write_clean_list(read_manifest(dataset), tmp_path / "c.csv", root=dataset, trigger_word=None, **COLUMNS)
    assert list(tmp_path.glob("c.*")) == []
