"""Looking at a cache byte for byte: every file in it ends in exactly one named state.

    ok         listed, whole, finite, of the shapes its bucket asks for
    missing    listed and not there
    damaged    cut, flipped, holding NaN, another entry's content under this name, or a list that cannot be trusted
    orphan     a good entry that the list does not name: of other settings or of rows that were taken out
    foreign    no file of ours; never touched
    temp-left  what a writer that died left behind (or a living one is writing)

`prepare` trusts names, sizes and headers of what it finds, so that running it again costs nothing; a flipped bit in the
numbers is known only here and when training reads the entry.
"""

import json
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_factory.data.cache import EMPTY_CAPTION
from cogvideox_factory.data.cache_index import CacheIndex, belongs, read_index, text_hash
from cogvideox_factory.data.clip import window_of
from cogvideox_factory.data.entry import Header, read_entry
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, num_latent_frames
from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.publish import is_temporary, sweep

OK, MISSING, DAMAGED, ORPHAN, FOREIGN, TEMP_LEFT = "ok", "missing", "damaged", "orphan", "foreign", "temp-left"
STATES = (OK, MISSING, DAMAGED, ORPHAN, FOREIGN, TEMP_LEFT)
ASIDE = "set-aside"
"""Folder of the cache that bad files are moved to; it is not looked into."""
_LISTS = ("cache.json", "clips.jsonl")
_BOOKKEEPING = (".lock", "survey.jsonl")  # neither can make a result wrong: a lock is empty, the memo only saves time
_ENTRY = re.compile(r"(clips|images|text)/([0-9a-f]{2})/\2[0-9a-f]{62}\.safetensors")
_ARRAYS = {"clips": {"mean", "logvar"}, "images": {"image_mean", "image_logvar"}, "text": {"prompt_embeds"}}
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One file of a cache and its state."""

    file: str
    """Relative to the cache."""
    state: str
    """One of `STATES`."""
    detail: str = ""
    rows: tuple[int, ...] = ()
    """Rows of the data set that need it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """What became of every file."""

    folder: Path
    findings: tuple[Finding, ...]

    def of(self, *states: str) -> list[Finding]:
        """Return the findings in these states."""
        return [finding for finding in self.findings if finding.state in states]

    def counts(self) -> dict[str, int]:
        """Return files a state, every state named; the values add up to the findings."""
        return {state: len(self.of(state)) for state in STATES}

    def to_json(self) -> dict[str, Any]:
        """Return the whole report; entries that are ok are counted and not listed."""
        files = [
            {"file": f.file, "state": f.state, "detail": f.detail, "rows": list(f.rows)}
            for f in self.findings
            if f.state != OK
        ]
        return {"cache": str(self.folder), "total": len(self.findings), "counts": self.counts(), "files": files}


@dataclass(kw_only=True, slots=True)
class _Expected:
    """What the list says of an entry."""

    checksum: str
    content: str | None
    """What it must have been made of; None for an image, of which a row keeps no hash of that kind."""
    shapes: dict[str, tuple[int, ...]] | None = None
    bucket: str | None = None
    rows: list[int] = field(default_factory=list)


def is_cache(folder: Path) -> bool:
    """Tell whether a folder is a cache, finished or not."""
    has_list = any((folder / name).is_file() for name in _LISTS)
    return has_list or any(next(folder.glob(f"{part}/??/*.safetensors"), None) for part in ("clips", "images", "text"))


def audit_cache(folder: Path, *, num_workers: int = 2, on_file: Callable[[], None] | None = None) -> Audit:
    """Read every entry whole and return the state of every file; nothing is changed.

    Args:
        folder: the cache, finished or not.
        num_workers: threads that read and hash.
        on_file: called after each entry, for progress.
    """
    folder = Path(folder)
    index, lists = _lists(folder)
    expected = _expected(index) if index else {}
    found = list(_files(folder))
    entries = [file for file, kind in found if kind == "entry"]
    judge = partial(_judge, folder, expected, is_listed=index is not None)
    findings = list(lists)
    for finding in ordered_map(judge, entries, num_workers=num_workers):
        findings.append(finding)
        if on_file:
            on_file()
    known = {*entries, *(file for file, kind in found if kind == "blocked")}
    for file, wanted in expected.items():
        if file not in known:
            findings.append(Finding(file=file, state=MISSING, detail="it is listed", rows=tuple(wanted.rows)))
    for file, kind in found:
        if kind == "blocked":
            rows = tuple(expected[file].rows) if file in expected else ()
            findings.append(Finding(file=file, state=DAMAGED, detail="a folder has the name of an entry", rows=rows))
        elif kind in (FOREIGN, TEMP_LEFT):
            findings.append(Finding(file=file, state=kind))
    return Audit(folder=folder, findings=tuple(sorted(findings, key=lambda finding: finding.file)))


def _lists(folder: Path) -> tuple[CacheIndex | None, list[Finding]]:
    """Return the list, if it can be trusted, and the state of its two files."""
    head, rows = _LISTS
    try:
        index = read_index(folder)
    except UnfitError as error:
        spoilt = partial(Finding, state=DAMAGED, detail=str(error))
        unfinished = Finding(file=head, state=MISSING, detail="prepare has not finished")
        if not (folder / head).is_file():
            alone = [Finding(file=rows, state=ORPHAN, detail=f"{head}, which vouches for it, is not there")]
            return None, [unfinished, *(alone if (folder / rows).is_file() else [])]
        if not (folder / rows).is_file():
            return None, [spoilt(file=head), Finding(file=rows, state=MISSING, detail="it is listed")]
        return None, [spoilt(file=head), spoilt(file=rows)]
    return index, [Finding(file=name, state=OK) for name in _LISTS]


def _expected(index: CacheIndex) -> dict[str, _Expected]:
    """Return what the list says of each entry, by file."""
    empty = index.recorded["empty_caption"]
    expected = {empty["file"]: _Expected(checksum=empty["checksum"], content=text_hash(EMPTY_CAPTION))}
    for row in index.rows:
        footage = f"{row['content']}{window_of(row['id'] or '')}"
        for part, content, bucket in (
            ("clip", footage, row.get("bucket")), ("text", text_hash(row["caption"]), None), ("image", None, None),
        ):  # fmt: skip
            if part in row:
                shapes = {name: tuple(shape) for name, shape in row[part]["shapes"].items()}
                new = _Expected(checksum=row[part]["checksum"], content=content, shapes=shapes, bucket=bucket)
                expected.setdefault(row[part]["file"], new).rows.append(row["row"])
    return expected


def _files(folder: Path) -> Iterator[tuple[str, str]]:
    """Yield (path relative to the folder, "entry", "blocked", `FOREIGN` or `TEMP_LEFT`) of all there is to judge."""
    for path, folders, names in os.walk(folder):
        here = Path(path)
        at_top = here == folder
        for name in sorted(folders):
            file = (here / name).relative_to(folder).as_posix()
            if is_temporary(here / name):
                yield file, TEMP_LEFT
            elif _ENTRY.fullmatch(file):
                yield file, "blocked"
        folders[:] = sorted(n for n in folders if not is_temporary(here / n) and not n.endswith(".safetensors"))
        if at_top and ASIDE in folders:
            folders.remove(ASIDE)
        for name in sorted(names):
            file = (here / name).relative_to(folder).as_posix()
            if is_temporary(here / name):
                yield file, TEMP_LEFT
            elif _ENTRY.fullmatch(file):
                yield file, "entry"
            elif not (at_top and name in _LISTS + _BOOKKEEPING):
                yield file, FOREIGN


def _judge(folder: Path, expected: Mapping[str, _Expected], file: str, *, is_listed: bool) -> Finding:
    """Read one entry; without a list that can be trusted, a good one is `OK`."""
    wanted = expected.get(file)
    rows = tuple(wanted.rows) if wanted else ()
    path = folder / file
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would never end
            return Finding(file=file, state=DAMAGED, detail="no regular file", rows=rows)
        arrays, header = read_entry(path, verify=True)
    except (UnfitError, OSError) as error:
        return Finding(file=file, state=DAMAGED, detail=str(error), rows=rows)
    problem = _problem(file, arrays, header) or (wanted and _difference(header, wanted))
    if problem:
        return Finding(file=file, state=DAMAGED, detail=problem, rows=rows)
    return Finding(file=file, state=OK if wanted or not is_listed else ORPHAN, rows=rows)


def _problem(file: str, arrays: Mapping[str, np.ndarray], header: Header) -> str | None:
    """Return what is wrong with an entry whatever the list says."""
    if not belongs(header, file):
        return "it holds what belongs under another name"
    for name, array in arrays.items():
        if array.dtype != _BFLOAT16:
            return f"{name} is {array.dtype}, not bfloat16"
        if not np.isfinite(array).all():
            return f"{name} holds values that are not finite"
    wanted = _ARRAYS[file.split("/")[0]]
    if not wanted <= arrays.keys():
        return f"it has no {' and no '.join(sorted(wanted - arrays.keys()))}"
    return None


def _difference(header: Header, wanted: _Expected) -> str | None:
    """Return how an entry differs from what is listed."""
    if header.checksum != wanted.checksum:
        return "it is not the entry that was listed: its checksum differs"
    if wanted.content is not None and header.metadata.get("content") != wanted.content:
        return "it was made of another clip or caption than the row that names it"
    if wanted.shapes is not None and header.shapes != wanted.shapes:
        return f"its shapes are {header.shapes}, listed are {wanted.shapes}"
    if wanted.bucket:
        frames, height, width = map(int, wanted.bucket.split("x"))
        law = (num_latent_frames(frames), height // SPATIAL_COMPRESSION, width // SPATIAL_COMPRESSION)
        shape = header.shapes["mean"]
        if len(shape) != 4 or (shape[0], *shape[2:]) != law:
            return f"mean has shape {shape}; a clip of {wanted.bucket} gives {law[0]} x channels x {law[1]} x {law[2]}"
    return None


def set_aside(audit: Audit, *, orphans: bool = False) -> list[str]:
    """Move what is damaged (and orphans, if asked) to `CACHE/set-aside/`; remove the temporaries of dead writers.

    Only files of the cache are moved, under their own names; foreign files and all clips stay where they are. The next
    `prepare` makes what was moved again, and nothing else.

    Returns:
        the files that were moved, relative to the cache.

    Raises:
        StorageError: the cache cannot be written.
    """
    moved = []
    try:
        for finding in audit.of(DAMAGED, *([ORPHAN] if orphans else [])):
            source, target = audit.folder / finding.file, audit.folder / ASIDE / finding.file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            moved.append(finding.file)
        sweep(audit.folder)
    except OSError as error:
        raise StorageError(
            f"{audit.folder} cannot be mended: {error.strerror} ({error.filename}). {len(moved)} files were moved; "
            "mend the rights and run it again."
        ) from error
    return moved


def report_json(audit: Audit, moved: list[str]) -> str:
    """Return the report as JSON text, with what was moved."""
    return json.dumps(audit.to_json() | {"set_aside": moved}, indent=1, ensure_ascii=False) + "\n"
