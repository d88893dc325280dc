"""Several data sets as one: their rows in one manifest, each clip with the name of its set.

Sets are mixed by weights (see `sampler`); a weight is no property of a clip and no cache entry depends on it. A clip
that two sets hold with the same caption belongs to the first; in the second it is a duplicate, so it is not seen more
often than the first set's weight says.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from cogvideox_factory.data.manifest import Clip, Manifest, Source, read_manifest


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One data set of a mixture."""

    name: str
    """Empty for a data set that is alone."""
    weight: float
    """How often an epoch sees each of its clips; above 0."""
    source: Source

    @classmethod
    def choose(
        cls, *, name: str, weight: float, root: str, table: str | None, captions: str | None, videos: str | None,
        caption_column: str, video_column: str, image_column: str | None,
    ) -> Self:  # fmt: skip
        """Find the lists of a data set; see `Source.choose`."""
        source = Source.choose(
            Path(root), table=table, captions=captions, videos=videos, caption_column=caption_column,
            video_column=video_column, image_column=image_column,
        )  # fmt: skip
        return cls(name=name, weight=weight, source=source)


@dataclass(frozen=True, kw_only=True, slots=True)
class SetCount:
    """What became of one data set of a mixture."""

    name: str
    weight: float
    total: int
    """Rows of its lists, or the windows they give."""
    usable: int

    @property
    def places(self) -> float:
        """Places in an epoch."""
        return self.weight * self.usable


def read_parts(parts: Sequence[Part], *, trigger_word: str | None = None, allow_outside_root: bool = False) -> Manifest:
    """Return the rows of all sets, in their order; see `read_manifest`.

    Raises:
        DataError: a list cannot be read.
    """
    read = [
        read_manifest(part.source, trigger_word=trigger_word, allow_outside_root=allow_outside_root) for part in parts
    ]
    if len(parts) == 1 and not parts[0].name:
        return read[0]
    clips: list[Clip] = []
    for part, manifest in zip(parts, read, strict=True):
        for clip in manifest.clips:
            clips.append(replace(clip, row=len(clips) + 1, set=part.name, set_row=clip.row))
    notes = [f"{part.name}: {note}" for part, manifest in zip(parts, read, strict=True) for note in manifest.notes]
    return Manifest(source=" + ".join(part.name for part in parts), clips=tuple(clips), notes=tuple(notes))


def count_sets(clips: Iterable[Clip], parts: Sequence[Part]) -> list[SetCount]:
    """Return what became of each set's clips; nothing for a data set that is alone."""
    listed = list(clips)
    counts = []
    for part in parts:
        own = [clip for clip in listed if clip.set == part.name]
        usable = sum(clip.usable for clip in own)
        counts.append(SetCount(name=part.name, weight=part.weight, total=len(own), usable=usable))
    return counts if any(part.name for part in parts) else []
