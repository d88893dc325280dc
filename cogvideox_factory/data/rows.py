"""Reading lists of clips: two text lists, CSV, TSV, JSONL, or captions beside the clips (Parquet: `parquet.py`).

Text is UTF-8 and strict: a byte that is not is an error with its place, never a replacement character. Lines
end at `\\n` only (`\\r\\n` accepted); other separators Unicode knows, such as U+2028, belong to the caption.
Rows keep their physical line, so a blank line is a row without a caption or a path and never shifts the rows
after it.
"""

import csv
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory.data.reasons import printable
from cogvideox_factory.errors import DataError, nearest

VIDEO_SUFFIXES = (".mp4", ".mov", ".m4v", ".mkv", ".webm", ".avi", ".ts")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
HUB_COLUMN = "file_name"
"""What the metadata tables of Hugging Face data sets call the column that names the file."""
CAPTION_COLUMN, VIDEO_COLUMN, IMAGE_COLUMN = "caption", "video", "image"
"""The columns that are looked for where none is named; a table need not have the last."""
_CSV_FIELD_LIMIT = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it was written; `code` is set when it cannot be used whatever it names."""

    line: int
    """1-based physical line (clips with a caption file beside them: 1-based place in the sorted list; Parquet: 1-based
    row)."""
    video: str = ""
    caption: str = ""
    image: str = ""
    """File of the picture that image-to-video starts from; empty for the clip's own first frame."""
    code: str | None = None
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """All rows of a source and what was noticed on the way."""

    rows: list[Row]
    notes: tuple[str, ...] = ()


class EncodingError(DataError):
    """A file's bytes are not UTF-8."""


def read_text(path: Path) -> str:
    """Return the text of `path` without its byte order mark.

    Raises:
        DataError: not readable, or (an `EncodingError`) not UTF-8, naming byte offset and line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check the name and its rights.") from error
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise EncodingError(f"{path} is UTF-16 text; save it as UTF-8.")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise EncodingError(
            f"{path}: byte {error.start} (line {line}) is 0x{data[error.start]:02x}, which is not UTF-8. "
            "Save the file as UTF-8."
        ) from error


def split_lines(text: str) -> list[str]:
    """Split at `\\n` only; a `\\r` before it belongs to the line end, and a final `\\n` opens no new line."""
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file, blank ones included.

    Raises:
        DataError: not readable, or not UTF-8.
    """
    return split_lines(read_text(path))


def read_two_lists(captions_file: Path, videos_file: Path) -> Rows:
    """Pair the lines of a caption list and a video list by their number.

    Blank lines at the end of the longer file are no rows; anywhere else they are.

    Raises:
        DataError: the counts differ.
    """
    captions, videos = read_lines(captions_file), read_lines(videos_file)
    notes = []
    for name, lines, other in ((captions_file.name, captions, videos), (videos_file.name, videos, captions)):
        before = len(lines)
        while len(lines) > len(other) and not lines[-1].strip():
            lines.pop()
        if len(lines) < before:
            notes.append(f"{name}: {before - len(lines)} blank lines at the end are not rows")
    if len(captions) != len(videos):
        raise DataError(
            f"{captions_file} has {len(captions)} lines, {videos_file} has {len(videos)}; they are paired "
            "line by line and must have as many. " + _suspect(captions_file.name, captions, videos_file.name, videos)
        )
    pairs = enumerate(zip(captions, videos), start=1)
    return Rows(rows=[Row(line=i, video=v.strip(), caption=c) for i, (c, v) in pairs], notes=tuple(notes))


def _suspect(captions_name: str, captions: list[str], videos_name: str, videos: list[str]) -> str:
    for name, lines in ((captions_name, captions), (videos_name, videos)):
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                return f"Line {number} of {name} is blank: the slip may be there."
    for number, caption in enumerate(captions, start=1):
        if caption.strip().lower().endswith(VIDEO_SUFFIXES):
            return f"Line {number} of {captions_name} looks like a path: the slip may be there."
    longer = captions_name if len(captions) > len(videos) else videos_name
    return f"Find the row without a partner in {longer}; a caption with a line break makes two lines."


def read_csv(path: Path, *, caption_column: str, video_column: str, image_column: str | None = None) -> Rows:
    """Read a comma- (or, named .tsv, tab-) separated table with a header row; every value is text.

    Raises:
        DataError: no header, a column twice or missing, or quoting that cannot be read.
    """
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    rows: list[Row] = []
    notes: tuple[str, ...] = ()
    header: list[str] | None = None
    start = 1
    try:
        for fields in reader:
            line, start = start, reader.line_num + 1
            if not fields:
                continue
            if header is None:
                header = [name.strip() for name in fields]
                video_column, image_column, notes = choose_columns(
                    path, header, caption_column, video_column, image_column
                )
            elif len(fields) != len(header):
                detail = f"{len(fields)} values for {len(header)} columns ({', '.join(header)})"
                rows.append(Row(line=line, code="row.malformed", detail=detail))
            else:
                values = dict(zip(header, fields))
                image = values[image_column].strip() if image_column else ""
                rows.append(
                    Row(line=line, video=values[video_column].strip(), caption=values[caption_column], image=image)
                )
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: {error}. Quote values that hold quotes or commas.") from error
    if header is None:
        raise DataError(f"{path} is empty; its first line must name the columns.")
    return Rows(rows=rows, notes=notes)


def choose_columns(
    path: Path, columns: Sequence[str], caption_column: str, video_column: str, image_column: str | None = None
) -> tuple[str, str | None, tuple[str, ...]]:
    """Check that a table has its columns; return (the video column, the image column, notes).

    `file_name`, as in the metadata of a Hugging Face data set, stands in for a video column that is not there. An image
    column of the default name may be missing; None reads none.

    Raises:
        DataError: a column is missing or there twice.
    """
    notes: tuple[str, ...] = ()
    if video_column not in columns and HUB_COLUMN in columns:
        notes = (f"no column {printable(video_column)!r}: clips are taken from {HUB_COLUMN!r}",)
        video_column = HUB_COLUMN
    if image_column == IMAGE_COLUMN and image_column not in columns:
        image_column = None
    _check_columns(path, columns, (caption_column, video_column, *([image_column] if image_column else [])))
    if image_column:
        notes += (f"column {printable(image_column)!r} names the images to start from; where it is empty, the clip's "
                  "first frame is taken",)  # fmt: skip
    return video_column, image_column, notes


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if len(set(columns)) < len(columns):
        twice = sorted({name for name in columns if list(columns).count(name) > 1})
        raise DataError(f"{path}: column {', '.join(map(repr, twice))} is there twice; keep one.")
    for name in wanted:
        if name not in columns:
            raise DataError(
                f"{path} has no column {printable(name)!r}{nearest(name, list(columns))}; it has: "
                f"{printable(', '.join(columns)) or 'none'}. Name the columns."
            )


def read_jsonl(path: Path, *, caption_column: str, video_column: str, image_column: str | None = None) -> Rows:
    """Read one JSON object a line; blank lines are no rows.

    Raises:
        DataError: no row at all has the columns.
    """
    parsed: list[tuple[int, dict[str, Any] | str]] = []
    columns: dict[str, None] = {}
    for line, text in enumerate(read_lines(path), start=1):
        if text.strip():
            values = _json_object(text)
            parsed.append((line, values))
            columns.update(dict.fromkeys(values) if isinstance(values, dict) else {})
    notes: tuple[str, ...] = ()
    if columns:
        video_column, image_column, notes = choose_columns(
            path, list(columns), caption_column, video_column, image_column
        )
    rows = [
        Row(line=line, code="row.malformed", detail=values)
        if isinstance(values, str)
        else table_row(
            line, values, caption_column=caption_column, video_column=video_column, image_column=image_column
        )
        for line, values in parsed
    ]
    return Rows(rows=rows, notes=notes)


def _json_object(text: str) -> dict[str, Any] | str:
    """Return the object, or what is wrong with the line."""
    try:
        values = json.loads(text, object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        return f"not a JSON object: {error}"
    return values if isinstance(values, dict) else f"a JSON {type(values).__name__}, not an object"


def table_row(
    line: int, values: Mapping[str, Any], *, caption_column: str, video_column: str, image_column: str | None = None
) -> Row:
    """Return the row of a table whose values have types: text or nothing is good, all else malformed.

    A row without the image column has no image of its own.
    """
    for name in (caption_column, video_column, *([image_column] if image_column and image_column in values else [])):
        if name not in values:
            detail = f"no {name!r} in it (it has: {', '.join(values) or 'nothing'})"
            return Row(line=line, code="row.malformed", detail=detail)
        if values[name] is not None and not isinstance(values[name], str):
            detail = f"{name!r} is a {type(values[name]).__name__}, not text"
            return Row(line=line, code="row.malformed", detail=detail)
    image = (values.get(image_column) or "").strip() if image_column else ""
    return Row(line=line, video=(values[video_column] or "").strip(), caption=values[caption_column] or "", image=image)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is there twice")
    return values


def read_folder(root: Path) -> Rows:
    """Read clips with a text file of the same name beside them (`x.mp4`, `x.txt`), in all subfolders.

    Pictures with a text of their own are rows too, and where there is no video at all, every picture is one. What else
    lies there (a preview beside a clip, a text without a clip) is counted in a note.
    """
    found = sorted(_files(root))
    videos = [path for path in found if path.suffix.lower() in VIDEO_SUFFIXES]
    pictures = [path for path in found if path.suffix.lower() in IMAGE_SUFFIXES]
    taken = {path.with_suffix("") for path in videos}
    chosen = [
        path
        for path in pictures
        if path.with_suffix("") not in taken and (not videos or path.with_suffix(".txt").is_file())
    ]
    rows: list[Row] = []
    for path in sorted(videos + chosen):
        line, name, caption_file = len(rows) + 1, path.relative_to(root).as_posix(), path.with_suffix(".txt")
        if not caption_file.is_file():
            rows.append(Row(line=line, video=name, code="text.missing", detail=f"no {caption_file.name} beside it"))
        else:
            rows.append(_folder_row(line, name, caption_file))
    notes = []
    stems = taken | {path.with_suffix("") for path in chosen}
    orphans = [p.name for p in found if p.suffix == ".txt" and p.with_suffix("") not in stems]
    if orphans:
        notes.append(f"{len(orphans)} .txt files have no clip beside them, for example {printable(orphans[0])}")
    if left := len(pictures) - len(chosen):
        notes.append(f"{left} pictures have no .txt of their own and are not read")
    return Rows(rows=rows, notes=tuple(notes))


def _files(root: Path) -> Iterator[Path]:
    for folder, _, names in os.walk(root):  # several times faster than Path.rglob
        for name in names:
            if not name.startswith(".") and os.path.isfile(path := os.path.join(folder, name)):
                yield Path(path)


def _folder_row(line: int, name: str, caption_file: Path) -> Row:
    try:
        caption = read_text(caption_file).strip()
    except DataError as error:
        code = "text.encoding" if isinstance(error, EncodingError) else "row.malformed"
        return Row(line=line, video=name, code=code, detail=str(error))
    return Row(line=line, video=name, caption=" ".join(split_lines(caption)))
