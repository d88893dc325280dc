"""Writing a clean list of a data set: the rows that can be used, as JSON lines that any command here reads back."""

import json
import os
from pathlib import Path

from cogvideox_factory.data.manifest import Manifest
from cogvideox_factory.data.rows import IMAGE_COLUMN
from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.publish import publish_file

SUFFIX = ".jsonl"


def require_free(path: Path) -> None:
    """Refuse a name that is taken or that no command would read as a table.

    Raises:
        FactoryError: another ending.
        StorageError: something of this name exists.
    """
    if path.suffix.lower() != SUFFIX:
        raise FactoryError(f"{path}: the clean list is written as JSON lines; end the name in {SUFFIX}.")
    if os.path.lexists(path):
        raise StorageError(f"{path} exists already; it is never overwritten. Remove it or choose another name.")


def write_clean_list(
    manifest: Manifest, path: Path, *, root: Path, caption_column: str, video_column: str, trigger_word: str | None,
    image_column: str = IMAGE_COLUMN,
) -> int:  # fmt: skip
    """Write caption and path of every row that gives a usable clip, in the order of the input, and return how many.

    Read with the same root, columns and trigger word, the list gives the same clips with the same captions, all
    usable. What was no row of its own (a duplicate) or cannot be used is not in it; no other file is touched.

    Args:
        manifest: every row with its state.
        path: a new file that ends in .jsonl; it appears complete or not at all.
        root: the data root; paths are written relative to it.
        caption_column: name of the caption in a row.
        video_column: name of the path in a row.
        trigger_word: what stands in front of every caption of `manifest` and would be put there again.
        image_column: name of the image in a row; only rows that have one get it.

    Raises:
        FactoryError: another ending.
        StorageError: the file exists, or the disk is full or cannot be written.
    """
    require_free(path)
    lines = [
        json.dumps(
            {video_column: _entry(clip.name, clip.path, root), caption_column: _bare(clip.caption, trigger_word)}
            | ({image_column: _entry(clip.image_name, clip.image_path, root)} if clip.image_path else {}),
            ensure_ascii=False,
        )
        for clip in manifest.rows
        if clip.usable
    ]
    with publish_file(path) as temporary:
        temporary.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        require_free(path)  # it may have come into being while clips were read
    return len(lines)


def _entry(name: str, path: Path | None, root: Path) -> str:
    """Return the path as the list gave it, or relative to the root where that was absolute."""
    assert path is not None, f"{name} names no file"
    if os.path.isabs(name):
        name = os.path.relpath(path, os.path.realpath(root))
    return name if name == name.strip() else f"./{name}"  # readers strip blanks around a path


def _bare(caption: str, trigger_word: str | None) -> str:
    trigger = (trigger_word or "").strip()
    if caption == trigger:  # an empty caption that was allowed
        return ""
    return caption.removeprefix(f"{trigger} ") if trigger else caption
