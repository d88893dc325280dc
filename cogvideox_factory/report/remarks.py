"""What is worth saying of a data set, in words: the same on the terminal and on the page."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from cogvideox_factory.data.census import Captions, Census
from cogvideox_factory.data.likeness import MAX_BITS
from cogvideox_factory.data.manifest import Manifest
from cogvideox_factory.data.reasons import printable

_MAX_ROWS = 12
_MAX_GROUPS = 5
_MAX_CAPTION = 60


class Remark(NamedTuple):
    """One thing that was found; none of these loses a clip by itself."""

    title: str
    found: str
    """How much of it, and in which rows."""


def remarks(manifest: Manifest, census: Census) -> list[Remark]:
    """Return what was found, in a fixed order; nothing for what was not."""
    found = []
    if census.near_duplicates:
        what = _groups(census.near_duplicates, "look alike")
        found.append(Remark("near-duplicates", f"{what} (at most {MAX_BITS} of 189 hash bits differ); all are kept"))
    if census.same_bytes:
        found.append(Remark("same bytes, other caption", f"{_groups(census.same_bytes, 'are copies')}; all are kept"))
    if census.cut:
        found.append(Remark("scene cuts", f"inside {_clips(census.cut)}"))
    if census.black:
        found.append(Remark("black frames", f"in {_clips(census.black)}"))
    return found + _about_captions(manifest, census.captions)


def _about_captions(manifest: Manifest, captions: Captions) -> list[Remark]:
    found = []
    lost = (("empty", captions.empty), ("no .txt", captions.missing), ("not UTF-8", captions.not_utf8),
            ("NUL", captions.rejected))  # fmt: skip
    for title, rows in lost:
        if rows:
            found.append(Remark(f"captions: {title}", _clips(rows)))
    if captions.replaced:
        total = sum(captions.replaced.values())
        found.append(Remark("captions: control characters", f"{total} made spaces in {_clips(captions.replaced)}"))
    if captions.repeated:
        texts = {clip.row: clip.caption for clip in manifest.usable}
        most = captions.repeated[0]
        example = f"{short(texts[most[0]])!r} {len(most)} times"
        found.append(Remark("captions: repeated", f"{_groups(captions.repeated, 'share one')}; {example}"))
    if captions.too_long:
        row, cut = next(iter(captions.too_long.items()))
        found.append(
            Remark(
                "captions: too long",
                f"{sum(captions.too_long.values())} tokens beyond {captions.max_tokens} are cut from "
                f"{_clips(captions.too_long)}; the most, {cut}, from row {row}",
            )
        )
    return found


def short(caption: str) -> str:
    """Return the start of a caption, safe to print."""
    text = printable(" ".join(caption.split()))
    return text if len(text) <= _MAX_CAPTION else text[: _MAX_CAPTION - 1] + "…"


def _clips(rows: Iterable[int | str]) -> str:
    listed = list(rows)
    return f"{len(listed)} clip{'s' if len(listed) > 1 else ''} ({_rows(listed)})"


def _rows(rows: Sequence[int | str]) -> str:
    more = f" and {len(rows) - _MAX_ROWS} more" if len(rows) > _MAX_ROWS else ""
    return f"row{'s' if len(rows) > 1 else ''} {', '.join(map(str, rows[:_MAX_ROWS]))}{more}"


def _groups(groups: Sequence[Sequence[int]], verb: str) -> str:
    shown = "; ".join(_rows(group) for group in groups[:_MAX_GROUPS])
    more = f"; and {len(groups) - _MAX_GROUPS} more groups" if len(groups) > _MAX_GROUPS else ""
    return f"{sum(map(len, groups))} clips in {len(groups)} group{'s' if len(groups) > 1 else ''} {verb}: {shown}{more}"
