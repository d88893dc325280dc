import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.cli import main
from cogvideox_factory.data.manifest import Source, read_manifest
from cogvideox_factory.data.parquet import read_parquet
from cogvideox_factory.errors import DataError, MissingError

COLUMNS = {"caption_column": "caption", "video_column": "video"}
text = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)


def write(path, **columns):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.table(columns), path)
    return path


def test_without_pyarrow_the_way_out_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingError, match=r"cogvideox-factory\[parquet\].*or save the table as"):
        read_parquet(tmp_path / "metadata.parquet", **COLUMNS)
    size = ("--data.num-frames", "9", "--data.height", "32", "--data.width", "32", "--data.fps", "8")
    assert main(["doctor", "--data.root", str(tmp_path), *size]) == 4
    assert "pyarrow" in capsys.readouterr().err


@given(st.lists(st.tuples(text, text), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_rows_are_those_that_were_written(tmp_path_factory, pairs):
    path = tmp_path_factory.mktemp("t") / "m.parquet"
    write(path, caption=[c for c, _ in pairs], video=[v for _, v in pairs], other=list(range(len(pairs))))
    rows = read_parquet(path, **COLUMNS).rows
    assert [(row.line, row.caption, row.video) for row in rows] == [
        (i, c, v.strip()) for i, (c, v) in enumerate(pairs, 1)
    ]


def test_nothing_is_an_empty_value_and_numbers_are_malformed(tmp_path):
    path = write(tmp_path / "m.parquet", caption=[None, "b"], video=["a.mp4", None])
    assert [(row.caption, row.video, row.code) for row in read_parquet(path, **COLUMNS).rows] == [
        ("", "a.mp4", None),
        ("b", "", None),
    ]
    path = write(tmp_path / "n.parquet", caption=[1, 2], video=["a", "b"])
    assert [row.code for row in read_parquet(path, **COLUMNS).rows] == ["row.malformed"] * 2


def test_a_hub_folder_is_found(tmp_path):
    write(tmp_path / "metadata.parquet", file_name=["a.mp4"], caption=["a caption"])
    (tmp_path / "a.mp4").write_bytes(b"x")
    manifest = read_manifest(tmp_path)
    assert manifest.usable[0].path == (tmp_path / "a.mp4").resolve()
    assert "file_name" in manifest.notes[0]


def test_what_is_no_table_of_names_is_refused(tmp_path):
    path = write(tmp_path / "m.parquet", caption=["a"], video=[{"bytes": b"x", "path": "a.mp4"}])
    with pytest.raises(DataError, match="'video' holds struct"):
        read_parquet(path, **COLUMNS)
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_parquet(tmp_path / "bad.parquet", **COLUMNS)
    with pytest.raises(DataError, match="cannot be read as Parquet"):
        read_manifest(Source(root=tmp_path, table="gone.parquet"))
