import csv
import json
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.rows import (
    read_csv,
    read_folder,
    read_jsonl,
    read_text,
    read_two_lists,
    split_lines,
)
from cogvideox_factory.errors import DataError

COLUMNS = {"caption_column": "caption", "video_column": "video"}
line = st.text(st.characters(blacklist_characters="\n\r", blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(line, min_size=1, max_size=8), st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=60, deadline=None)
def test_lines_survive_separators_marks_and_endings(tmp_path_factory, lines, crlf, final, bom):
    end = "\r\n" if crlf else "\n"
    path = tmp_path_factory.mktemp("t") / "p.txt"
    text = end.join(lines) + (end if final else "")
    path.write_bytes(("\ufeff" if bom else "").encode() + text.encode())
    wanted = lines if final or lines[-1] else lines[:-1]
    if bom or not text.startswith("\ufeff"):
        assert split_lines(read_text(path)) == wanted


@given(st.lists(st.tuples(line, st.text(string.ascii_letters, min_size=1, max_size=5)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_blank_captions_never_shift_the_pairs(tmp_path_factory, pairs):
    root = tmp_path_factory.mktemp("t")
    (root / "c").write_bytes("".join(c + "\n" for c, _ in pairs).encode())
    (root / "v").write_bytes("".join(v + "\n" for _, v in pairs).encode())
    rows = read_two_lists(root / "c", root / "v").rows
    assert [row.video for row in rows] == [video for _, video in pairs]
    assert [row.line for row in rows] == list(range(1, len(pairs) + 1))


def test_a_list_one_line_short_shows_both_counts_and_the_slip(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\nthree\n")
    (tmp_path / "v.txt").write_text("1.mp4\n3.mp4\n")
    with pytest.raises(DataError, match=r"p\.txt has 3 lines.*v\.txt has 2.*Line 2 of p\.txt is blank"):
        read_two_lists(tmp_path / "p.txt", tmp_path / "v.txt")


def test_blank_lines_at_the_end_of_one_list_are_no_rows(tmp_path):
    (tmp_path / "p.txt").write_text("one\ntwo\n\n\n")
    (tmp_path / "v.txt").write_text("1.mp4\n2.mp4")
    read = read_two_lists(tmp_path / "p.txt", tmp_path / "v.txt")
    assert len(read.rows) == 2
    assert "2 blank lines" in read.notes[0]


def test_unicode_line_separators_stay_in_the_caption(tmp_path):
    caption = "a\u2028b\u0085c\x0bd\x0ce"
    (tmp_path / "p.txt").write_text(caption + "\n", encoding="utf-8")
    (tmp_path / "v.txt").write_text("1.mp4\n")
    assert read_two_lists(tmp_path / "p.txt", tmp_path / "v.txt").rows[0].caption == caption


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"good\nbad \xff here\n")
    with pytest.raises(DataError, match=r"byte 9 \(line 2\) is 0xff"):
        read_text(tmp_path / "p.txt")
    (tmp_path / "p.txt").write_bytes("text".encode("utf-16"))
    with pytest.raises(DataError, match="UTF-16"):
        read_text(tmp_path / "p.txt")


def test_csv_keeps_quoted_newlines_and_reports_short_rows(tmp_path):
    path = tmp_path / "m.csv"
    path.write_text('video,caption,id\n1.mp4,"two\nlines, quoted",7\n\n2.mp4\n3.mp4,,9\n')
    rows = read_csv(path, **COLUMNS).rows
    assert [(row.line, row.video, row.caption, row.code) for row in rows] == [
        (2, "1.mp4", "two\nlines, quoted", None),
        (5, "", "", "row.malformed"),
        (6, "3.mp4", "", None),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("video,prompt\na,b\n", "no column 'caption'.*it has: video, prompt"),
        ("video,captions\na,b\n", "did you mean 'captions'"),
        ("video,caption,video\na,b,c\n", "'video' is there twice"),
        ('video,caption\n"a"b,c\n', "line 2"),
        ("", "is empty"),
    ],
)
def test_csv_schema_errors(tmp_path, text, message):
    (tmp_path / "m.csv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_csv(tmp_path / "m.csv", **COLUMNS)


def test_tsv(tmp_path):
    (tmp_path / "m.tsv").write_text("caption\tvideo\na, b\t1.mp4\n")
    assert read_csv(tmp_path / "m.tsv", **COLUMNS).rows[0].caption == "a, b"


def test_jsonl_reports_each_bad_line_and_keeps_the_good(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text(
        '{"video": "1.mp4", "caption": "ok"}\n'
        "\n"
        "not json\n"
        "[1]\n"
        '{"video": "2.mp4"}\n'
        '{"video": "3.mp4", "caption": 5}\n'
        '{"video": "4.mp4", "video": "5.mp4", "caption": "twice"}\n'
        '{"video": "6.mp4", "caption": null}\n'
    )
    rows = read_jsonl(path, **COLUMNS).rows
    assert [row.line for row in rows] == [1, 3, 4, 5, 6, 7, 8]
    assert [row.code for row in rows] == [None, *["row.malformed"] * 5, None]
    assert rows[-1].caption == ""


def test_jsonl_without_the_column_lists_what_it_has(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"file": "a", "text": "b"}\n')
    with pytest.raises(DataError, match=r"no column 'caption'.*file, text"):
        read_jsonl(tmp_path / "m.jsonl", **COLUMNS)


def test_folder_pairs_by_name(tmp_path):
    for name in ("b.mp4", "a.b.mp4", "sub/c.MOV", "none.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text("bee\r\nsecond line\n")
    (tmp_path / "a.b.txt").write_text("dotted")
    (tmp_path / "sub/c.txt").write_text("sea")
    (tmp_path / "alone.txt").write_text("?")
    read = read_folder(tmp_path)
    assert [(row.video, row.caption, row.code) for row in read.rows] == [
        ("a.b.mp4", "dotted", None),
        ("b.mp4", "bee second line", None),
        ("none.mp4", "", "text.missing"),
        ("sub/c.MOV", "sea", None),
    ]
    assert "alone.txt" in read.notes[0]


@given(st.lists(st.tuples(line, st.text(string.ascii_letters, min_size=1, max_size=5)), min_size=1, max_size=8))
@settings(max_examples=40, deadline=None)
def test_csv_tsv_and_jsonl_of_the_same_rows_read_alike(tmp_path_factory, pairs):
    root = tmp_path_factory.mktemp("t")
    for name, dialect in (("m.csv", "excel"), ("m.tsv", "excel-tab")):
        with (root / name).open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, dialect, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerows([("caption", "video"), *pairs])
    (root / "m.jsonl").write_text("".join(json.dumps({"caption": c, "video": v}) + "\n" for c, v in pairs))
    readers = {"m.csv": read_csv, "m.tsv": read_csv, "m.jsonl": read_jsonl}
    read = [reader(root / name, **COLUMNS) for name, reader in readers.items()]
    for rows in read:
        assert [(row.caption, row.video, row.code) for row in rows.rows] == [(c, v, None) for c, v in pairs]


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl"])
def test_file_name_stands_in_for_a_video_column_that_is_not_there(tmp_path, name):
    def read(columns):
        values = {"file_name": "hub.mp4", "video": "own.mp4", "caption": "a caption", "clip": "asked.mp4"}
        rows = {column: values[column] for column in columns}
        text = ",".join(rows) + "\n" + ",".join(rows.values()) + "\n" if name == "m.csv" else json.dumps(rows) + "\n"
        (tmp_path / name).write_text(text)
        return (read_csv if name == "m.csv" else read_jsonl)(tmp_path / name, **COLUMNS)

    hub = read(["file_name", "caption"])
    assert (hub.rows[0].video, hub.rows[0].caption) == ("hub.mp4", "a caption")
    assert hub.notes == ("no column 'video': clips are taken from 'file_name'",)
    own = read(["file_name", "video", "caption"])
    assert (own.rows[0].video, own.notes) == ("own.mp4", ())
    with pytest.raises(DataError, match=r"no column 'video'.*it has: clip, caption"):
        read(["clip", "caption"])


def test_pictures_in_a_folder(tmp_path):
    """With videos about, only a picture with a text of its own is a clip; by themselves, all are."""
    for name in ("alone.png", "other.JPG", "both.webp"):
        (tmp_path / name).touch()
    (tmp_path / "other.txt").write_text("a picture")
    (tmp_path / "both.txt").write_text("a clip")
    assert [(r.video, r.code) for r in read_folder(tmp_path).rows] == [
        ("alone.png", "text.missing"), ("both.webp", None), ("other.JPG", None),
    ]  # fmt: skip
    (tmp_path / "both.mp4").touch()
    read = read_folder(tmp_path)
    assert [(r.video, r.caption) for r in read.rows] == [("both.mp4", "a clip"), ("other.JPG", "a picture")]
    assert read.notes == ("2 pictures have no .txt of their own and are not read",)
