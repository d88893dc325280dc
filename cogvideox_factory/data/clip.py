"""One clip of a data set: what names it, where it comes from, and what became of it."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from cogvideox_factory.data.reasons import PENDING, USABLE, ClipError
from cogvideox_factory.data.timing import ClipSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Clip:
    """One clip of a data set and its state: a row, or one of several windows of the video it names."""

    row: int
    """1-based line in the list the row came from."""
    name: str
    """The path as the list gives it."""
    set: str = ""
    """Name of its data set, where several are mixed."""
    set_row: int | None = None
    """The line in that set's own list; `row` then counts through all sets."""
    caption: str
    """The text that is encoded: cleaned, trigger word in front."""
    path: Path | None = None
    """Resolved file; None when the row names none that can be used."""
    state: str = PENDING
    reason: str | None = None
    detail: str = ""
    content: str | None = None
    """SHA-256 of the file's bytes, once it has been read."""
    stamp: tuple[int, int] | None = None
    """(size, mtime in ns) of the file when it was hashed."""
    image_name: str = ""
    """The picture that image-to-video starts from as the list gives it; empty for the clip's own first frame."""
    image_path: Path | None = None
    image_content: str | None = None
    """SHA-256 of the picture, once it has been read."""
    image_stamp: tuple[int, int] | None = None
    spec: ClipSpec | None = field(default=None, compare=False)
    """What the clip is brought to, once it has been surveyed: with buckets, its own size and length."""
    facts: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """What was found in the clip and done to it: source fps, size, frames taken, …"""

    @property
    def usable(self) -> bool:
        """Whether the clip is, or may still turn out, good."""
        return self.state == PENDING or self.state in USABLE

    @property
    def id(self) -> str:
        """Name of this clip in caches, batches and draws: its bytes, its caption, its own image if it has one, and its
        window."""
        assert self.content is not None, f"{self.name} has not been read yet"
        name = clip_id(self.content, self.caption)
        return (f"{name}-{self.image_content[:8]}" if self.image_content else name) + self.window

    @property
    def footage(self) -> str:
        """What the pixels come from: the bytes, and the window where it is not the one at the start."""
        assert self.content is not None, f"{self.name} has not been read yet"
        return self.content + self.window

    @property
    def window(self) -> str:
        """Which part of the source this is (`ClipSpec.window`), "" for the one at the start."""
        return self.spec.window if self.spec else ""

    @property
    def number(self) -> int | str:
        """What tells the clip from others in reports: its row, and its window unless that is the one at the start."""
        return f"{self.row}{self.window}" if self.window else self.row

    @property
    def place(self) -> str:
        """Where its row is, and its window in that, for people."""
        row = f"{self.set_row} of {self.set}" if self.set else f"{self.row}"
        return f"row {row}{f' {self.window}' if self.window else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return what a report says of the clip."""
        named = ("row", "name", "caption", "state", "reason", "detail")
        more = {"image_name": self.image_name} if self.image_name else {}
        more |= {"set": self.set, "set_row": self.set_row} if self.set else {}
        return {name: getattr(self, name) for name in named} | more | dict(self.facts)

    def rejected(self, error: ClipError) -> Self:
        """Return this clip in the state that `error` sends it to."""
        return replace(self, state=error.state, reason=error.code, detail=error.message)


def clip_id(content: str, caption: str) -> str:
    """Return the id of the clip with this content hash and this caption that begins at the first frame."""
    return f"{content[:24]}-{hashlib.sha256(caption.encode()).hexdigest()[:8]}"


def without_window(clip_id: str) -> str:
    """Return the id that all windows of a clip share: that of the one at the start."""
    return clip_id.partition("@")[0]


def window_of(clip_id: str) -> str:
    """Return the window (`ClipSpec.window`) of the clip with this id."""
    return clip_id.removeprefix(without_window(clip_id))
