"""What is in a data set: every row, what it names, and what became of it.

`read_manifest` looks at lists and paths only; no clip is opened. Rows that cannot be used stay in the
manifest with their state and reason, so the counts always add up to the rows of the input and all bad rows
are known at once.
"""

import logging
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from cogvideox_factory.data.clip import Clip
from cogvideox_factory.data.clip import clip_id as clip_id
from cogvideox_factory.data.parquet import read_parquet
from cogvideox_factory.data.paths import PathResolver
from cogvideox_factory.data.reasons import STATES, ClipError, printable
from cogvideox_factory.data.rows import IMAGE_COLUMN, Row, Rows, read_csv, read_folder, read_jsonl, read_two_lists
from cogvideox_factory.data.rows import read_lines as read_lines
from cogvideox_factory.errors import DataError

log = logging.getLogger(__name__)
_READERS = {".csv": read_csv, ".tsv": read_csv, ".jsonl": read_jsonl, ".parquet": read_parquet}
TABLE_SUFFIXES = tuple(_READERS)
_LISTS = (("prompts.txt", "prompt.txt", "captions.txt"), ("videos.txt",))
_TABLES = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
_MAX_PRINTED = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """All clips of a data set, in the order of the input; a row that is cut into windows has one a window."""

    source: str
    """Which files the rows came from."""
    clips: tuple[Clip, ...]
    notes: tuple[str, ...] = ()

    @property
    def usable(self) -> list[Clip]:
        """Clips that are, or may still turn out, good."""
        return [clip for clip in self.clips if clip.usable]

    @property
    def lost(self) -> list[Clip]:
        """Clips that cannot be used."""
        return [clip for clip in self.clips if not clip.usable]

    def counts(self) -> dict[str, int]:
        """Return clips a state, in a fixed order, without zeros; the values add up to `len(self.clips)`."""
        return _tally(self.clips)

    @property
    def rows(self) -> list[Clip]:
        """One clip a row, which stands for it: the first that is usable, or the first."""
        rows = _by_row(self.clips).values()
        return [next((clip for clip in row if clip.usable), row[0]) for row in rows]

    def row_counts(self) -> dict[str, int]:
        """Return rows a state, as `counts`; the values add up to `len(self.rows)`."""
        return _tally(self.rows)

    def with_clips(self, changed: Iterable[Clip]) -> Self:
        """Return the manifest with `changed` clips put in place of those with the same row, one or more a row."""
        old, new = _by_row(self.clips), _by_row(changed)
        assert not new.keys() - old.keys(), f"rows {sorted(new.keys() - old.keys())} are not in the manifest"
        return replace(self, clips=tuple(clip for row in (old | new).values() for clip in row))

    def map_usable(self, change: Callable[[Clip], Clip]) -> Self:
        """Return the manifest with `change` applied to each usable clip; a `ClipError` sets its state."""

        def changed(clip: Clip) -> Clip:
            try:
                return change(clip) if clip.usable else clip
            except ClipError as error:
                return clip.rejected(error)

        return replace(self, clips=tuple(changed(clip) for clip in self.clips))

    def report(self) -> list[str]:
        """Return lines to print: the counts, then how rows were cut, then what was lost, then the notes."""
        first = f"{len(self.clips)} clips from {printable(self.source)}: {_listed(self.counts())}"
        return [first, *(f"  {line}" for line in self.about_windows()), *self.about_losses()]

    def about_losses(self, *, limit: int = _MAX_PRINTED) -> list[str]:
        """Return a line for each of the first `limit` lost clips and for each note."""
        lines = [f"  {c.place} {printable(c.name)}: {printable(c.detail)} [{c.reason}]" for c in self.lost[:limit]]
        if len(self.lost) > limit:
            lines.append(f"  … and {len(self.lost) - limit} more")
        return lines + [f"  note: {note}" for note in self.notes]

    def about_windows(self) -> list[str]:
        """Return lines that say how rows and clips add up, nothing where every row is one clip."""
        rows = self.rows
        lines = []
        if len(rows) < len(self.clips):
            several = [len(row) for row in _by_row(self.clips).values() if len(row) > 1]
            others = ", the others one clip each" if len(several) < len(rows) else ""
            lines = [
                f"{len(rows)} rows: {_listed(self.row_counts())}; {len(several)} of them give {sum(several)} windows"
                f"{others}"
            ]
        if scenes := sum(clip.facts.get("scenes", 0) for clip in rows):
            without = sum(clip.facts.get("scenes_without_clip", 0) for clip in rows)
            lines.append(f"{scenes} scenes, {without} of them too short for a clip or fit for no bucket")
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the whole report: total, counts, one entry a clip, and the counts of the rows."""
        clips = [clip.to_json() for clip in self.clips]
        rows = {"total": len(self.rows), "counts": self.row_counts()}
        return {"source": self.source, "total": len(clips), "counts": self.counts(), "clips": clips, "rows": rows}

    def require_good(self, *, strict: bool = False, max_bad: float = 0.01) -> None:
        """Stop when too many clips are lost.

        A few are always let pass, because a small set reaches any share with one: up to 3, at most a quarter
        of the rows, at least one. `max_bad=0` lets none pass, `strict` none either.

        Raises:
            DataError: nothing usable is left, something was lost and `strict` is set, or too much was.
        """
        lost, total = len(self.lost), len(self.clips)
        few = 0 if max_bad == 0 else min(3, max(1, total // 4))
        allowed = 0 if strict else max(int(max_bad * total), few)
        if total > lost and lost <= allowed:
            return
        if total == 0:
            law = "there is not one row in it. Add clips, or check the name of the list"
        elif total == lost:
            law = "no clip is left to use"
        elif strict:
            law = f"strict allows no loss; {lost} of {total} clips cannot be used. Mend or remove their rows"
        else:
            law = (
                f"{lost} of {total} clips cannot be used, more than max_bad={max_bad:g} allows ({allowed}); "
                "that many mean a wrong setting more often than bad clips. Mend them, or raise max_bad"
            )
        raise DataError("\n".join([f"{printable(self.source)}: {law}.", *self.report()]))


def _by_row(clips: Iterable[Clip]) -> dict[int, list[Clip]]:
    """Return the clips of each row, in order."""
    rows: dict[int, list[Clip]] = {}
    for clip in clips:
        rows.setdefault(clip.row, []).append(clip)
    return rows


def _tally(clips: Iterable[Clip]) -> dict[str, int]:
    found = Counter(clip.state for clip in clips)
    return {state: found[state] for state in STATES if found[state]}


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {state}" for state, count in counts.items()) or "none"


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """Where the rows of a data set are: a table, two lists, or (neither given) captions beside the clips."""

    root: Path
    """Folder that holds the clips; paths in lists are relative to it."""
    table: str | None = None
    """CSV, TSV, JSONL or Parquet file, relative to the root."""
    captions: str | None = None
    """Text file with one caption a line, relative to the root; goes with `videos`."""
    videos: str | None = None
    """Text file with one path a line, relative to the root."""
    caption_column: str = "caption"
    video_column: str = "video"
    image_column: str | None = None
    """Column of the pictures that image-to-video starts from; None reads none."""
    notes: tuple[str, ...] = ()

    @classmethod
    def detect(cls, root: Path, *, caption_column: str = "caption", video_column: str = "video") -> Self:
        """Find the layout of a folder (or take a table file as it is).

        Two lists (`prompts.txt` or `prompt.txt` with `videos.txt`) come before `metadata.jsonl`,
        `metadata.csv`, `metadata.parquet` (Hugging Face's names) and captions beside the clips; what else is
        there and is not read is noted.

        Raises:
            DataError: no such folder, or two caption lists that differ.
        """
        root = Path(root)
        found = cls(root=root, caption_column=caption_column, video_column=video_column)
        if root.is_file() and root.suffix.lower() in TABLE_SUFFIXES:
            return replace(found, root=root.parent, table=root.name)
        if not root.is_dir():
            raise DataError(
                f"{root} is no folder and no {', '.join(TABLE_SUFFIXES)} file. Give the folder of the clips."
            )
        captions = [name for name in _LISTS[0] if (root / name).is_file()]
        videos = [name for name in _LISTS[1] if (root / name).is_file()]
        tables = [name for name in _TABLES if (root / name).is_file()]
        if captions and videos:
            if len({(root / name).read_bytes() for name in captions}) > 1:
                raise DataError(f"{root} has {' and '.join(captions)}, and they differ. Say which holds the captions.")
            notes = _unread(captions[1:] + tables)
            return replace(found, captions=captions[0], videos=videos[0], notes=notes)
        if tables:
            return replace(found, table=tables[0], notes=_unread(tables[1:]))
        splits = sorted(path.relative_to(root).as_posix() for name in _TABLES for path in root.glob(f"*/{name}"))
        return replace(found, notes=_unread(splits))

    @classmethod
    def choose(
        cls, root: Path, *, table: str | None, captions: str | None, videos: str | None, caption_column: str,
        video_column: str, image_column: str | None = None,
    ) -> Self:  # fmt: skip
        """Return the lists that are named, or, where none is, what `detect` finds."""
        if table or captions:
            return cls(
                root=root, table=table, captions=captions, videos=videos, caption_column=caption_column,
                video_column=video_column, image_column=image_column,
            )  # fmt: skip
        found = cls.detect(root, caption_column=caption_column, video_column=video_column)
        return replace(found, image_column=image_column)

    @property
    def description(self) -> str:
        """What to call this source in a report."""
        if self.table:
            return str(self.root / self.table)
        if self.captions:
            return f"{self.root / self.captions} + {self.videos}"
        return f"{self.root} (captions beside the clips)"


def _unread(names: list[str]) -> tuple[str, ...]:
    return (f"also there and not read: {', '.join(names)}",) if names else ()


def read_manifest(
    source: Source | Path | str,
    *,
    trigger_word: str | None = None,
    allow_outside_root: bool = False,
    allow_empty_captions: bool = False,
) -> Manifest:
    """Read all rows of `source` (a folder is searched for a layout) and check their captions and paths.

    Args:
        source: where the rows are.
        trigger_word: put in front of every caption, with one space.
        allow_outside_root: accept paths that lead out of the root.
        allow_empty_captions: use clips without a caption too (unconditional training).

    Raises:
        DataError: the list itself cannot be read. Single bad rows get a state instead.
    """
    if not isinstance(source, Source):
        source = Source.detect(Path(source))
    if not source.root.is_dir():
        raise DataError(f"the data root {source.root} is no folder. Give the folder of the clips.")
    read = read_rows(source)
    resolver = PathResolver(source.root, allow_outside=allow_outside_root)
    seen: dict[tuple[Path | None, str, Path | None], int] = {}
    clips = [_clip(row, resolver, seen, (trigger_word or "").strip(), allow_empty_captions) for row in read.rows]
    manifest = Manifest(source=source.description, clips=tuple(clips), notes=source.notes + read.notes)
    for note in manifest.notes:
        log.warning("%s: %s", manifest.source, note)
    return manifest


def read_rows(source: Source) -> Rows:
    """Return the rows of a source as they were written.

    Raises:
        DataError: the list cannot be read.
    """
    if source.table:
        path = source.root / source.table
        reader = _READERS.get(path.suffix.lower())
        if reader is None:
            raise DataError(f"{path} is no table that can be read. Use one of {', '.join(TABLE_SUFFIXES)}.")
        return reader(
            path, caption_column=source.caption_column, video_column=source.video_column,
            image_column=source.image_column,
        )  # fmt: skip
    if source.image_column not in (None, IMAGE_COLUMN):
        raise DataError(
            f"image_column={source.image_column!r} names a column, and {source.description} is no table. Put the clips "
            "into a .csv or .jsonl table, or leave it out."
        )
    if source.captions and source.videos:
        return read_two_lists(source.root / source.captions, source.root / source.videos)
    if source.captions or source.videos:
        raise DataError("a caption list and a video list belong together. Give both, or a table.")
    return read_folder(source.root)


def _clip(
    row: Row,
    resolver: PathResolver,
    seen: dict[tuple[Path | None, str, Path | None], int],
    trigger: str,
    allow_empty: bool,
) -> Clip:
    clip = Clip(row=row.line, name=row.video, caption=row.caption, image_name=row.image)
    try:
        if row.code:
            raise ClipError(row.code, row.detail)
        caption = clean_caption(row.caption, allow_empty=allow_empty)
        replaced = 0 if row.caption.isprintable() else sum(_is_control(c) for c in row.caption.strip())
        clip = replace(clip, caption=f"{trigger} {caption}".strip(), facts={"replaced": replaced} if replaced else {})
        clip = replace(clip, path=resolver.resolve(row.video))
        if row.image:
            clip = replace(clip, image_path=_image_path(row.image, resolver))
        first = seen.setdefault((clip.path, clip.caption, clip.image_path), row.line)
        if first != row.line:
            raise ClipError("row.duplicate", f"the same clip and caption as row {first}")
    except ClipError as error:
        return clip.rejected(error)
    return clip


def _image_path(entry: str, resolver: PathResolver) -> Path:
    try:
        return resolver.resolve(entry)
    except ClipError as error:
        code = "image.outside" if error.code == "path.outside" else "image.missing"
        raise ClipError(code, f"its image: {error.message}") from error


def clean_caption(text: str, *, allow_empty: bool = False) -> str:
    """Return the caption as it is encoded: control characters become spaces, blanks around it go.

    Raises:
        ClipError: `text.control` for NUL or half a surrogate pair, `text.empty` when nothing visible is left.
    """
    if text.isprintable() and (plain := text.strip()):  # nearly always; else character by character
        return plain
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise ClipError("text.control", "the caption holds a NUL character or half a surrogate pair")
    caption = "".join(" " if _is_control(c) else c for c in text).strip()
    if not any(unicodedata.category(c)[0] not in "ZC" for c in caption):
        if allow_empty:
            return ""
        raise ClipError("text.empty", "the row has no caption")
    return caption


def _is_control(character: str) -> bool:
    return (character < " " and character != "\t") or character == "\x7f"
