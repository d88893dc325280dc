import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.manifest import Source, clean_caption, read_manifest
from cogvideox_factory.data.reasons import STATES, ClipError, printable
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import DataError
from tests.faults.trial import in_child


def states(manifest):
    return [(clip.state, clip.reason) for clip in manifest.clips]


def table(root: Path, rows: list[tuple[str, str]]) -> Path:
    root.mkdir(exist_ok=True)
    text = "".join(json.dumps({"video": video, "caption": caption}) + "\n" for video, caption in rows)
    (root / "metadata.jsonl").write_text(text)
    return root


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "set"
    root.mkdir()
    for name in ("a.mp4", "b.mp4", "Straße.mp4"):
        (root / name).write_bytes(b"x")
    return root


def test_two_lists_are_found_and_what_is_not_read_is_noted(dataset):
    table(dataset, [("videos/0.mp4", "other")])
    manifest = read_manifest(dataset)
    assert [clip.caption for clip in manifest.clips] == ["a first clip", "a second clip", "a third clip"]
    assert manifest.counts() == {"pending": 3}
    assert manifest.notes == ("also there and not read: metadata.jsonl",)
    assert read_manifest(Source(root=dataset, table="metadata.jsonl")).clips[0].caption == "other"


def test_a_table_can_be_given_by_itself(dataset):
    table(dataset, [("videos/0.mp4", "by itself")])
    assert read_manifest(dataset / "metadata.jsonl").usable[0].caption == "by itself"


def test_a_hub_folder_and_its_splits(dataset):
    """The hub's layout: metadata beside the files, or one folder a split, which must be named."""
    hub = dataset / "train"
    (dataset / "videos").rename(hub)
    for name in ("prompts.txt", "videos.txt"):
        (dataset / name).unlink()
    (hub / "metadata.csv").write_text("file_name,caption\n0.mp4,a\n1.mp4,b\n")
    manifest = read_manifest(hub)
    assert [(clip.name, clip.state) for clip in manifest.clips] == [("0.mp4", "pending"), ("1.mp4", "pending")]
    assert manifest.notes == ("no column 'video': clips are taken from 'file_name'",)
    assert "also there and not read: train/metadata.csv" in read_manifest(dataset).notes


def test_two_caption_lists_that_differ_are_refused(dataset):
    (dataset / "prompt.txt").write_text("something\nquite\nelse\n")
    with pytest.raises(DataError, match=r"prompts\.txt and prompt\.txt, and they differ"):
        read_manifest(dataset)


def test_each_bad_row_gets_its_reason_in_one_pass(root, tmp_path):
    (tmp_path / "secret.mp4").write_bytes(b"x")
    (root / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (root / "loop.mp4").symlink_to(root / "loop.mp4")
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    rows = [
        ("a.mp4", "good", None),
        ("a.mp4", "good", "row.duplicate"),
        ("a.mp4", "other caption", None),
        ("b.mp4", " \u200b ", "text.empty"),
        ("b.mp4", "nul\0", "text.control"),
        ("b.mp4", "\ud800", "text.control"),
        ("", "x", "path.empty"),
        ("n\0.mp4", "x", "path.nul"),
        ("../secret.mp4", "x", "path.outside"),
        (str(tmp_path / "secret.mp4"), "x", "path.outside"),
        ("/etc/hostname", "x", "path.outside"),
        ("link.mp4", "x", "path.outside"),
        ("loop.mp4", "x", "path.missing"),
        ("folder.mp4", "x", "path.is_dir"),
        ("pipe.mp4", "x", "path.not_file"),
        ("gone.mp4", "x", "path.missing"),
        ("a" * 300, "x", "path.missing"),
        ("a.mp4/b", "x", "path.missing"),
        ("C:\\clips\\a.mp4", "x", "path.missing"),
        *[(url, "x", "path.missing") for url in ("http://h/x.mp4", "concat:a.mp4", "pipe:0", "data:,x")],
    ]
    manifest = read_manifest(table(root, [row[:2] for row in rows]))
    assert [clip.reason for clip in manifest.clips] == [row[2] for row in rows]
    assert sum(manifest.counts().values()) == len(rows)
    assert len(manifest.usable) + len(manifest.lost) == len(rows)
    report = "\n".join(manifest.report())
    assert "\0" not in report
    assert "addresses are never opened" in report


def test_hints_for_near_names(root):
    (root / "sub").mkdir()
    (root / "sub/c.mp4").touch()
    manifest = read_manifest(table(root, [("A.MP4", "x"), ("Strasse.mp4", "x"), ("sub\\c.mp4", "x")]))
    assert "'a.mp4'" in manifest.clips[0].detail
    assert "'Straße.mp4'" in manifest.clips[1].detail
    assert "use / between folders" in manifest.clips[2].detail


def test_paths_may_lead_outside_when_allowed(root, tmp_path):
    (tmp_path / "out.mp4").write_bytes(b"x")
    manifest = read_manifest(table(root, [("../out.mp4", "x")]), allow_outside_root=True)
    assert manifest.clips[0].path == (tmp_path / "out.mp4").resolve()


def test_trigger_word_and_cleaning(root):
    manifest = read_manifest(table(root, [("a.mp4", " a\x01b\tc\n ")]), trigger_word=" sks ")
    assert manifest.clips[0].caption == "sks a b\tc"
    assert manifest.clips[0].facts == {"replaced": 1}


def test_empty_captions_can_be_allowed(root):
    manifest = read_manifest(table(root, [("a.mp4", "")]), allow_empty_captions=True)
    assert (manifest.clips[0].state, manifest.clips[0].caption) == ("pending", "")


@given(st.text(max_size=30))
@settings(max_examples=200, deadline=None)
def test_captions_are_cleaned_or_named_and_cleaning_is_stable(text):
    try:
        caption = clean_caption(text)
    except ClipError as error:
        assert error.code in ("text.empty", "text.control")  # noqa: PT017
        return
    assert clean_caption(caption) == caption
    assert not any(c < " " and c != "\t" for c in caption)
    assert caption.encode()


@given(st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_what_is_printed_cannot_steer_a_terminal(text):
    assert printable(text).isprintable()


@given(st.lists(st.sampled_from(["a.mp4", "b.mp4", "gone.mp4", "../x", ""]), max_size=20))
@settings(max_examples=40, deadline=None)
def test_counts_are_conserved(tmp_path_factory, names):
    root = tmp_path_factory.mktemp("t")
    for name in ("a.mp4", "b.mp4"):
        (root / name).write_bytes(b"x")
    table(root, [(name, "caption") for name in names])
    manifest = read_manifest(root)
    assert sum(manifest.counts().values()) == len(names)
    assert set(manifest.counts()) <= set(STATES)
    assert manifest.to_json()["total"] == len(names)


@pytest.mark.parametrize(
    ("good", "bad", "arguments", "passes"),
    [
        (1, 0, {}, True),
        (0, 0, {}, False),
        (0, 1, {}, False),
        (1, 1, {}, True),
        (6, 2, {}, True),
        (6, 3, {}, False),
        (97, 3, {}, True),
        (96, 4, {}, False),
        (396, 4, {}, True),
        (99, 1, {"strict": True}, False),
        (99, 1, {"max_bad": 0.0}, False),
        (8, 4, {"max_bad": 0.5}, True),
    ],
)
def test_how_much_loss_stops(tmp_path, good, bad, arguments, passes):
    root = tmp_path / "set"
    table(root, [(f"{i}.mp4", "x") for i in range(good)] + [("gone.mp4", f"{i}") for i in range(bad)])
    for i in range(good):
        (root / f"{i}.mp4").write_bytes(b"x")
    manifest = read_manifest(root)
    if passes:
        manifest.require_good(**arguments)
    else:
        with pytest.raises(DataError):
            manifest.require_good(**arguments)


def test_the_message_lists_twenty_rows_and_counts_the_rest(tmp_path):
    manifest = read_manifest(table(tmp_path / "s", [(f"gone{i}.mp4", "x") for i in range(25)]))
    with pytest.raises(DataError, match="and 5 more") as caught:
        manifest.require_good()
    assert str(caught.value).count("[path.missing]") == 20


@pytest.mark.parametrize("name", ["nowhere", "file.txt"])
def test_no_such_folder(tmp_path, name):
    (tmp_path / "file.txt").touch()
    with pytest.raises(DataError, match="no folder"):
        read_manifest(tmp_path / name)


def test_files_and_folders_without_permission_are_told(make_video):
    """In a fork that gives up root's rights, which would open everything."""
    with TemporaryDirectory(dir="/tmp") as name:  # a place that everybody may walk through
        root = Path(name)
        make_video(root / "good.mp4")
        make_video(root / "closed.mp4").chmod(0)
        make_video(root / "sub/inside.mp4")
        (root / "metadata.csv").write_text("video,caption\ngood.mp4,a\nclosed.mp4,b\nsub/inside.mp4,c\n")
        (root / "sub").chmod(0)
        root.chmod(0o755)

        def look():
            if os.getuid() == 0:
                os.setuid(65534)
            manifest = read_manifest(root)
            return [(clip.state, clip.reason, clip.detail) for clip in manifest.clips]

        found = in_child(look).value
        (root / "sub").chmod(0o755)
    assert [clip[:2] for clip in found] == [["pending", None], *[["missing", "path.denied"]] * 2]
    assert [clip[2] for clip in found[1:]] == [
        "closed.mp4: no permission to read it", "sub/inside.mp4: no permission to look at it",
    ]  # fmt: skip


def test_a_file_that_is_closed_between_the_list_and_the_look_is_told(tmp_path, make_video, monkeypatch):
    make_video(tmp_path / "a.mp4")
    (tmp_path / "a.txt").write_text("a")
    manifest = read_manifest(tmp_path)

    def closed(self, *_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", closed)
    (clip,) = survey(manifest, ClipSpec(num_frames=9, height=32, width=48, fps=8)).clips
    assert (clip.state, clip.reason) == ("missing", "path.denied")
    assert "Permission denied" in clip.detail
