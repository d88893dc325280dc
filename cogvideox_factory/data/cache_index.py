"""What a finished cache holds, read back and held to what its list says; `cache` writes it and draws its layout."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory.data.entry import Header, read_entry, read_header
from cogvideox_factory.data.fingerprint import CacheSettings, entry_key, require_match
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.errors import UnfitError

PARTS = ("clip", "text", "image")


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedClip:
    """One usable clip of a cache."""

    id: str
    name: str
    caption: str
    bucket: str
    """Frames x height x width, of the clip as it was encoded."""
    clip_file: Path
    text_file: Path
    image_file: Path | None
    """Entry of an image of its own, where it has one."""
    set: str
    """Its data set, where several are mixed."""
    shapes: dict[str, tuple[int, ...]]
    """Of `mean` and, for image-to-video, `image_mean` (their log-variances alike) and `prompt_embeds`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheIndex:
    """What a finished cache holds."""

    folder: Path
    recorded: dict[str, Any]
    """The parsed `cache.json`."""
    clips: list[CachedClip]
    empty_file: Path
    """Embedding of the empty caption."""
    rows: list[dict[str, Any]]
    """The parsed `clips.jsonl`."""


def open_cache(
    folder: Path,
    wanted: CacheSettings | None = None,
    *,
    command: str = "cogvideox prepare",
    num_workers: int = 4,
) -> CacheIndex:
    """Read a finished cache and check that every entry it lists is there, whole and the one that was listed.

    Args:
        folder: the cache.
        wanted: refuse a cache made with other settings; None takes any.
        command: what the user types to make the cache, for messages.
        num_workers: threads that look at entries.

    Raises:
        UnfitError: no cache, one that was not finished, another's, or a damaged one.
    """
    folder = Path(folder)
    index = read_index(folder, command=command)
    if wanted is not None:
        require_match(folder, index.recorded, wanted, command=command)
    problems = _problems(index, full=False, num_workers=num_workers)
    if problems:
        shown = "\n  ".join(problems[:20] + ([f"… and {len(problems) - 20} more"] if len(problems) > 20 else []))
        raise UnfitError(f"the cache {folder} has {len(problems)} bad entries; run `{command}` again:\n  {shown}")
    return index


def read_index(folder: Path, *, command: str = "cogvideox prepare") -> CacheIndex:
    """Read what a finished cache lists, without a look at its entries.

    Raises:
        UnfitError: no cache, one that was not finished, or a damaged list.
    """
    with locked(folder, exclusive=False):
        return read_unlocked(folder, command)


def is_imported(folder: Path) -> bool:
    """Tell whether a finished cache was made elsewhere and imported.

    Raises:
        UnfitError: a damaged `cache.json`.
    """
    path = Path(folder) / "cache.json"
    return path.is_file() and bool(_read_json(path, "cogvideox import-prepared").get("imported"))


def recorded_dtype(folder: Path) -> str | None:
    """Return the arithmetic a cache's encoders ran in, or None where there is no finished cache.

    Raises:
        UnfitError: a damaged `cache.json`.
    """
    path = Path(folder) / "cache.json"
    if not path.is_file():
        return None
    return _read_json(path, "cogvideox prepare").get("video", {}).get("settings", {}).get("dtype")


def verify_cache(folder: Path, *, num_workers: int = 4) -> list[str]:
    """Read every listed entry whole and compare its checksum; return one line a bad entry.

    Raises:
        UnfitError: there is no finished cache.
    """
    return _problems(read_index(Path(folder)), full=True, num_workers=num_workers)


def _problems(index: CacheIndex, *, full: bool, num_workers: int) -> list[str]:
    used = [row for row in index.rows if "clip" in row]
    listed = {row[part]["file"]: row[part]["checksum"] for row in used for part in PARTS if part in row}
    empty = index.recorded["empty_caption"]
    listed[empty["file"]] = empty["checksum"]
    check = _Check(index.folder, full=full)
    return [problem for problem in ordered_map(check, listed.items(), num_workers=num_workers) if problem]


class _Check:
    def __init__(self, folder: Path, *, full: bool) -> None:
        self.folder, self.full = folder, full

    def __call__(self, item: tuple[str, str]) -> str | None:
        file, checksum = item
        path = self.folder / file
        try:
            header = read_entry(path, verify=True)[1] if self.full else read_header(path)
        except UnfitError as error:
            return str(error)
        if header.checksum != checksum or not belongs(header, file):
            return f"{path} is not the entry that was listed: its checksum differs. Remove it and prepare again."
        return None


def _read_json(path: Path, command: str) -> dict[str, Any]:
    if not path.is_file():
        raise UnfitError(f"{path.parent} is no finished cache: {path.name} is not there. Run `{command}` first.")
    try:
        described = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(described, dict)
    except (ValueError, AssertionError) as error:
        raise UnfitError(f"{path} is damaged ({error}). Run `{command}` again.") from error
    if described.get("checksum") != seal(described):
        raise UnfitError(f"{path} is damaged: its checksum differs. Run `{command}` again.")
    return described


def seal(described: Mapping[str, Any]) -> str:
    """Return the checksum of all that `cache.json` says besides it; how it is laid out does not matter."""
    return text_hash(json.dumps({k: v for k, v in described.items() if k != "checksum"}, sort_keys=True))


def _read_rows(folder: Path, described: dict[str, Any], command: str) -> list[dict[str, Any]]:
    path = folder / "clips.jsonl"
    text = path.read_bytes().decode("utf-8", "replace") if path.is_file() else ""
    if text_hash(text) != described.get("clips", {}).get("sha256"):
        raise UnfitError(f"{path} does not belong to cache.json: prepare was interrupted. Run `{command}` again.")
    return [json.loads(line) for line in text.split("\n") if line]


def read_unlocked(folder: Path, command: str) -> CacheIndex:
    """Do as `read_index`, for who has the lock."""
    described = _read_json(folder / "cache.json", command)
    rows = _read_rows(folder, described, command)
    return CacheIndex(
        folder=folder,
        recorded=described,
        clips=[_cached(folder, row) for row in rows if "clip" in row],
        empty_file=folder / described["empty_caption"]["file"],
        rows=rows,
    )


def belongs(header: Header, file: str) -> bool:
    """Tell whether an entry's own words lead to the name it has."""
    content, made_with = (header.metadata.get(key, "") for key in ("content", "fingerprint"))
    return entry_key(made_with, content) == Path(file).stem


def _cached(folder: Path, row: dict[str, Any]) -> CachedClip:
    shapes = {name: shape for part in PARTS if part in row for name, shape in row[part]["shapes"].items()}
    return CachedClip(
        id=row["id"], name=row["name"], caption=row["caption"], bucket=row["bucket"],
        clip_file=folder / row["clip"]["file"], text_file=folder / row["text"]["file"],
        image_file=folder / row["image"]["file"] if "image" in row else None,
        set=row.get("set", ""),
        shapes={name: tuple(shape) for name, shape in shapes.items()},
    )  # fmt: skip


def text_hash(text: str) -> str:
    """Return the SHA-256 that names a caption."""
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def locked(folder: Path, *, exclusive: bool) -> Iterator[None]:
    """Keep cache.json and clips.jsonl together for readers; the system drops a dead process's lock."""
    path = folder / ".lock"
    if exclusive:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    if not path.exists():  # no cache, or a copy of one that nobody writes to
        yield
        return
    with path.open("r") as file:
        fcntl.flock(file, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        yield
