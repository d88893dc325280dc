"""The catalogue of rows and text, T1 to T16."""

import json
import os
import tracemalloc
import unicodedata
from pathlib import Path

from cogvideox_factory.data.caption_tokens import token_counter
from cogvideox_factory.data.census import take_census, with_tokens
from cogvideox_factory.data.manifest import Manifest, read_manifest
from cogvideox_factory.data.reasons import printable
from cogvideox_factory.weights import resolve_model
from tests.faults.catalogue import Row, write_table
from tests.faults.makers import good_clip

A, B, C = "a.mp4", "b.mp4", "c.mp4"
_MASTER: dict[str, bytes] = {}


def clips(root: Path, *names: str) -> None:
    """Put good clips of different bytes under these names."""
    for number, name in enumerate(names):
        key = str(number)
        if key not in _MASTER:
            _MASTER[key] = good_clip(root / "master.mp4", seed=100 + number).read_bytes()
            (root / "master.mp4").unlink()
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(_MASTER[key])


def lists(prompts: str | bytes, videos: str | bytes):
    def make(root: Path) -> None:
        clips(root, A, B, C)
        for name, text in (("prompts.txt", prompts), ("videos.txt", videos)):
            (root / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return make


def table(*pairs: tuple[str, str], beside=None):
    def make(root: Path) -> None:
        clips(root, A, B, C)
        if beside:
            beside(root)
        write_table(root, pairs)

    return make


def csv(text: str):
    def make(root: Path) -> None:
        clips(root, A, B, C)
        (root / "metadata.csv").write_text(text)

    return make


def _long_caption_is_counted(manifest: Manifest, root: Path) -> None:
    count = token_counter(resolve_model("tiny-t2v"))
    assert count
    captions = take_census(with_tokens(manifest, count, 24), None, max_tokens=24).captions
    assert list(captions.too_long) == [2]


def _terminal_is_safe(manifest: Manifest, root: Path) -> None:
    assert all(printable(line).isprintable() for line in "\n".join(manifest.report()).split("\n"))


def _around(root: Path) -> None:
    (root / "folder.mp4").mkdir()
    os.mkfifo(root / "pipe.mp4")
    (root / unicodedata.normalize("NFC", "é.mp4")).write_bytes(b"x")


def _outside(root: Path) -> None:
    outside = root.parent / "outside"
    outside.mkdir(exist_ok=True)
    good_clip(outside / "secret.mp4", seed=7)
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "folder-link").symlink_to(outside)


def _many_rows(root: Path) -> None:
    clips(root, A)
    with (root / "metadata.jsonl").open("w") as file:
        for number in range(2000):
            file.write(json.dumps({"video": f"{number}.mp4", "caption": f"caption {number}"}) + "\n")
        file.write(json.dumps({"video": A, "caption": "the last"}) + "\n")


def _memory_is_that_of_the_rows(manifest: Manifest, root: Path) -> None:
    tracemalloc.start()
    read_manifest(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4000 * len(manifest.clips), f"{peak / len(manifest.clips):.0f} bytes a row"


USED = ("used", None)
BAD_LINE = "row.malformed"
TEXTS = [
    Row(id="T1", fault="the two lists have different numbers of lines", refused=True,
        make=lists("one\n\nthree\nfour\n", f"{A}\n{B}\n{C}\n"),
        says=("prompts.txt has 4 lines", "videos.txt has 3", "Line 2 of prompts.txt is blank")),
    Row(id="T2", fault="one blank caption and one blank path elsewhere: equal counts",
        make=lists("one\n\nthree\nfour\n", f"{A}\n{B}\n\n{C}\n"),
        ends=((A, *USED), (B, "uncaptioned", "text.empty"), ("", "missing", "path.empty"), (C, *USED)),
        pairs=((A, "one"), (C, "four"))),
    Row(id="T3", fault="captions that are empty, blank or invisible",
        make=table((A, ""), (B, " \t "), (C, "\u200b\u2060"), (A, "good")),
        ends=((A, "uncaptioned", "text.empty"), (B, "uncaptioned", "text.empty"), (C, "uncaptioned", "text.empty"),
              (A, *USED)),
        differs="training without captions is `train.caption_dropout`'s business; no flag lets empty ones in"),
    Row(id="T4", fault="a caption longer than the model reads",
        make=table((A, "short"), (B, "a large red circle " * 20)), ends=((A, *USED), (B, *USED)),
        check=_long_caption_is_counted),
    Row(id="T5", fault="Unicode line separators inside a caption",
        make=lists("a\u2028b\u0085c\nd\u2029e\x0bf\x0cg\n", f"{A}\n{B}\n"), ends=((A, *USED), (B, *USED)),
        pairs=((A, "a\u2028b\u0085c"), (B, "d\u2029e f g"))),
    Row(id="T6", fault="byte order marks, CRLF, mixed endings",
        make=lists("\ufeffone\r\ntwo\nthree\r\n", f"\ufeff{A}\n{B}\r\n{C}"),
        ends=((A, *USED), (B, *USED), (C, *USED)), pairs=((A, "one"), (B, "two"), (C, "three")),
        differs="not recorded: nothing of the rows depends on it"),
    Row(id="T7", fault="text that is not UTF-8", refused=True, make=lists(b"good\nbad \xff\n", f"{A}\n{B}\n"),
        says=("byte 9 (line 2) is 0xff", "UTF-8"), differs="no other encodings: the file is to be saved as UTF-8"),
    Row(id="T8", fault="NUL and control characters",
        make=table(("n\0.mp4", "x"), (A, "nul\0"), (B, "bell\x07 and \x1b[31m"), (C, "a\tb")),
        ends=(("n\0.mp4", "malformed", "path.nul"), (A, "malformed", "text.control"), (B, *USED), (C, *USED)),
        pairs=((B, "bell  and  [31m"), (C, "a\tb")), facts=((B, "replaced", 2),)),
    Row(id="T9", fault="right-to-left marks, overrides, joiners, emoji, combining marks",
        make=table((A, "\u202eevil\u202c \u200d👩\u200d🚀 e\u0301"), ("\u202egpm.mp4", "x")),
        ends=((A, *USED), ("\u202egpm.mp4", "missing", "path.missing")),
        pairs=((A, "\u202eevil\u202c \u200d👩\u200d🚀 e\u0301"),), check=_terminal_is_safe),
    Row(id="T10a", fault="CSV: quoted newlines, too many and too few values, blanks, number-like ids",
        make=csv(f'id,video,caption\n007,{A},"two\nlines, quoted"\n1,{B}\n2,{B},x,y\n3,{C},\n'),
        ends=((A, *USED), ("", "malformed", BAD_LINE), ("", "malformed", BAD_LINE), (C, "uncaptioned", "text.empty")),
        pairs=((A, "two lines, quoted"),)),
    Row(id="T10b", fault="CSV: a column twice", refused=True, make=csv("video,caption,video\na,b,c\n"),
        says=("'video' is there twice",)),
    Row(id="T10c", fault="CSV: no caption column", refused=True, make=csv("video,captoin\na,b\n"),
        says=("no column 'caption'", "did you mean 'captoin'", "it has: video, captoin")),
    Row(id="T10d", fault="JSON lines: broken lines, numbers, keys twice, null",
        make=lambda root: (clips(root, A), (root / "metadata.jsonl").write_text(
            f'{{"video": "{A}", "caption": "ok"}}\n\nnot json\n[1]\n{{"video": "{A}", "caption": NaN}}\n'
            f'{{"video": "{A}", "video": "{B}", "caption": "x"}}\n{{"video": "{A}", "caption": null}}\n'))[0],
        ends=((A, *USED), *[("", "malformed", BAD_LINE)] * 4, (A, "uncaptioned", "text.empty")),
        says=("row 3", "row 4", "row 5", "row 6", "row 7")),
    Row(id="T11", fault="rows twice, one video with two captions, the same bytes under two names",
        make=table((A, "x"), (A, "x"), (A, "y"), ("copy.mp4", "x"), ("copy.mp4", "z"),
                   beside=lambda root: (root / "copy.mp4").write_bytes((root / A).read_bytes())),
        ends=((A, *USED), (A, "duplicate", "row.duplicate"), (A, *USED), ("copy.mp4", "duplicate", "row.duplicate"),
              ("copy.mp4", *USED)), says=("as row 1",)),
    Row(id="T12", fault="missing, a folder, a pipe, other case, other normal form",
        make=table((A, "x"), ("gone.mp4", "x"), ("folder.mp4", "x"), ("pipe.mp4", "x"), ("B.MP4", "x"),
                   (unicodedata.normalize("NFD", "é.mp4"), "x"), beside=_around),
        ends=((A, *USED), ("gone.mp4", "missing", "path.missing"), ("folder.mp4", "missing", "path.is_dir"),
              ("pipe.mp4", "missing", "path.not_file"), ("B.MP4", "missing", "path.missing"),
              (unicodedata.normalize("NFD", "é.mp4"), "missing", "path.missing")),
        says=("did you mean 'b.mp4'", "did you mean 'é.mp4'", "is a folder")),
    Row(id="T13", fault="paths that lead out of the root: .., absolute, links, a drive letter",
        make=table((A, "x"), ("../outside/secret.mp4", "x"), ("/etc/hostname", "x"), ("link.mp4", "x"),
                   ("folder-link/secret.mp4", "x"), ("C:\\clips\\a.mp4", "x"), beside=_outside),
        ends=((A, *USED), ("../outside/secret.mp4", "outside", "path.outside"),
              ("/etc/hostname", "outside", "path.outside"), ("link.mp4", "outside", "path.outside"),
              ("folder-link/secret.mp4", "outside", "path.outside"), ("C:\\clips\\a.mp4", "missing", "path.missing")),
        says=("leads out of the data root",)),
    Row(id="T14", fault="addresses and protocols of the demuxer in place of names",
        make=table((A, "x"), *[(url, "x") for url in (
            "http://127.0.0.1:9/x.mp4", "tcp://127.0.0.1:9", f"concat:{A}|{B}", f"subfile,,start,0,end,9,,:{A}",
            "pipe:0", "data:video/mp4;base64,AAAA", f"file:{A}", f"cache:{A}")]),
        ends=((A, *USED), *[(url, "missing", "path.missing") for url in (
            "http://127.0.0.1:9/x.mp4", "tcp://127.0.0.1:9", f"concat:{A}|{B}", f"subfile,,start,0,end,9,,:{A}",
            "pipe:0", "data:video/mp4;base64,AAAA", f"file:{A}", f"cache:{A}")]),
        says=("addresses are never opened",)),
    Row(id="T15a", fault="no rows at all", refused=True, make=lists("", ""), says=("not one row",)),
    Row(id="T15b", fault="one row", make=table((A, "x")), ends=((A, *USED),)),
    Row(id="T15c", fault="rows, and none of them usable", refused=True, make=table(("gone.mp4", "x")),
        says=("no clip is left to use", "path.missing")),
    Row(id="T16", fault="very many rows", make=_many_rows, check=_memory_is_that_of_the_rows,
        differs="rows are kept in memory (at most 4 kB each), so that all bad ones are known at once"),
]  # fmt: skip
