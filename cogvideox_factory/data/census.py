"""What a data set is made of: how long, large, fast and alike its clips are, and what its captions hold.

Everything is taken from the facts that `survey` and `glimpse` left on the clips; nothing is opened here. Nothing is
dropped either: what stands here describes, the states of the manifest decide.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cogvideox_factory.data.caption_tokens import TokenCounter
from cogvideox_factory.data.glimpse import Glimpse
from cogvideox_factory.data.likeness import MAX_BITS, near_groups
from cogvideox_factory.data.manifest import Clip, Manifest

NUM_BINS = 20
"""Bars of a histogram at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measure:
    """One number of every clip that has it."""

    title: str
    unit: str
    values: np.ndarray
    """float64 [clips], not empty."""

    @property
    def median(self) -> float:
        """Half of the clips are at or below."""
        return float(np.median(self.values))

    def histogram(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (clips a bin, int64 [n]; edges, float64 [n + 1]); the counts add up to the clips."""
        low, high = float(self.values.min()), float(self.values.max())
        if high - low <= 1e-9 * max(1.0, abs(high)):
            return np.array([len(self.values)]), np.array([low, high])
        counts, edges = np.histogram(self.values, bins=NUM_BINS)
        return counts, edges

    def to_json(self) -> dict[str, Any]:
        """Return what a report keeps."""
        counts, edges = self.histogram()
        return {
            "unit": self.unit,
            "clips": len(self.values),
            "min": float(self.values.min()),
            "median": self.median,
            "max": float(self.values.max()),
            "histogram": {"edges": edges.tolist(), "counts": counts.tolist()},
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Captions:
    """What is to be said of the captions; rows are those of the manifest."""

    empty: list[int]
    """Rows whose caption has nothing visible in it."""
    missing: list[int]
    """Clips without a caption file."""
    not_utf8: list[int]
    """Rows whose caption file is not UTF-8."""
    rejected: list[int]
    """Rows whose caption holds what no tokenizer may see: NUL, half a surrogate pair."""
    replaced: dict[int, int]
    """Row -> control characters that became spaces."""
    repeated: list[list[int]]
    """Rows of usable clips with the same caption, most first."""
    max_tokens: int | None
    """Tokens that are read of a caption; None where they were not counted."""
    too_long: dict[int, int]
    """Row of a usable clip -> tokens that are cut from its caption, worst first."""

    def to_json(self) -> dict[str, Any]:
        """Return what a report keeps."""
        return {
            "empty": self.empty,
            "missing": self.missing,
            "not_utf8": self.not_utf8,
            "rejected": self.rejected,
            "replaced": {str(row): count for row, count in self.replaced.items()},
            "repeated": self.repeated,
            "max_tokens": self.max_tokens,
            "too_long": {str(row): cut for row, cut in self.too_long.items()},
            "tokens_cut": sum(self.too_long.values()),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Census:
    """The whole account."""

    measures: dict[str, Measure]
    sizes: dict[str, int]
    """WIDTHxHEIGHT as shown -> clips, most first."""
    captions: Captions
    same_bytes: list[list[int]]
    """Rows of usable clips with the same bytes under different captions."""
    near_duplicates: list[list[int]] | None
    """Rows of usable clips that look alike, first row leading (see `likeness`); None where no frame was decoded."""
    black: list[int | str]
    """Numbers (`Clip.number`) of usable clips with black frames."""
    cut: list[int | str]
    """Numbers of usable clips with a scene cut in what is trained on."""

    def to_json(self) -> dict[str, Any]:
        """Return what a report keeps."""
        near = None
        if self.near_duplicates is not None:
            near = {"max_bits": MAX_BITS, "groups": self.near_duplicates}
        return {
            "statistics": {name: measure.to_json() for name, measure in self.measures.items()},
            "sizes": self.sizes,
            "captions": self.captions.to_json(),
            "same_bytes": self.same_bytes,
            "near_duplicates": near,
        }


def with_tokens(manifest: Manifest, count: TokenCounter, max_tokens: int) -> Manifest:
    """Return the manifest with `tokens`, and `tokens_cut` where there are more than `max_tokens`, among the facts."""
    counted: dict[str, int] = {}

    def tell(clip: Clip) -> Clip:
        if clip.caption not in counted:
            counted[clip.caption] = count(clip.caption)
        tokens = counted[clip.caption]
        facts = {"tokens": tokens} | ({"tokens_cut": tokens - max_tokens} if tokens > max_tokens else {})
        return replace(clip, facts={**clip.facts, **facts})

    return manifest.map_usable(tell)


def take_census(
    manifest: Manifest, glimpses: Mapping[str, Glimpse] | None = None, *, max_tokens: int | None = None
) -> Census:
    """Add up a surveyed manifest.

    Args:
        manifest: every row with its facts.
        glimpses: what `look_closer` returned; None where it was not asked.
        max_tokens: what `with_tokens` was given; None where it was not asked.
    """
    usable = [clip for clip in manifest.rows if clip.usable]  # of the windows of a row, one: the others are no copies
    return Census(
        measures=_measures(manifest),
        sizes=dict(Counter(_size(clip) for clip in manifest.rows if "source_width" in clip.facts).most_common()),
        captions=_captions(manifest, max_tokens),
        same_bytes=_repeats([(clip.content, clip.row) for clip in usable]),
        near_duplicates=None if glimpses is None else _near(usable, glimpses),
        black=[clip.number for clip in manifest.usable if clip.facts.get("black_frames")],
        cut=[clip.number for clip in manifest.usable if clip.facts.get("scene_cuts")],
    )


def _size(clip: Clip) -> str:
    return f"{clip.facts['source_width']}x{clip.facts['source_height']}"


def _measures(manifest: Manifest) -> dict[str, Measure]:
    facts = [clip.facts for clip in manifest.clips]
    rows = [clip.facts for clip in manifest.rows]
    moving = [fact for fact in rows if "source_fps" in fact]
    found = {
        "duration": ("duration", "s", [fact["source_frames"] / fact["source_fps"] for fact in moving]),
        "fps": ("frame rate", "frames/s", [fact["source_fps"] for fact in moving]),
        "shape": ("shape", "width/height", [f["source_width"] / f["source_height"] for f in rows if "codec" in f]),
        "motion": ("motion", "widths/s", [fact["motion"] for fact in facts if "motion" in fact]),
        "brightness": ("brightness", "of white", [fact["brightness"] for fact in facts if "brightness" in fact]),
        "black_frames": ("black frames", "a clip", [fact["black_frames"] for fact in facts if "black_frames" in fact]),
        "scene_cuts": ("scene cuts", "a clip", [len(fact["scene_cuts"]) for fact in facts if "scene_cuts" in fact]),
        "words": ("caption", "words", [len(clip.caption.split()) for clip in manifest.rows if clip.usable]),
        "tokens": ("caption", "tokens", [fact["tokens"] for fact in rows if "tokens" in fact]),
    }
    return {
        name: Measure(title=title, unit=unit, values=np.array(values, np.float64))
        for name, (title, unit, values) in found.items()
        if values
    }


def _captions(manifest: Manifest, max_tokens: int | None) -> Captions:
    rows = manifest.rows
    usable = [clip for clip in rows if clip.usable]

    def lost_to(code: str) -> list[int]:
        return [clip.row for clip in rows if clip.reason == code]

    cut = {clip.row: clip.facts["tokens_cut"] for clip in usable if "tokens_cut" in clip.facts}
    return Captions(
        empty=lost_to("text.empty"),
        missing=lost_to("text.missing"),
        not_utf8=lost_to("text.encoding"),
        rejected=lost_to("text.control"),
        replaced={clip.row: clip.facts["replaced"] for clip in rows if "replaced" in clip.facts},
        repeated=_repeats([(clip.caption, clip.row) for clip in usable]),
        max_tokens=max_tokens,
        too_long=dict(sorted(cut.items(), key=lambda item: -item[1])),
    )


def _repeats(keyed: list[tuple[str | None, int]]) -> list[list[int]]:
    """Return the rows of every key that two or more rows have, the most first, then in the order of the input."""
    rows: dict[str | None, list[int]] = {}
    for key, row in keyed:
        rows.setdefault(key, []).append(row)
    return sorted((group for group in rows.values() if len(group) > 1), key=len, reverse=True)


def _near(usable: list[Clip], glimpses: Mapping[str, Glimpse]) -> list[list[int]]:
    """Compare each content once: the same bytes under another caption are no news here."""
    firsts: dict[str, Clip] = {}
    for clip in usable:
        firsts.setdefault(clip.content or "", clip)
    if len(firsts) < 2:
        return []
    hashes = np.stack([glimpses[clip.footage].hashes for clip in firsts.values()])
    colours = np.stack([glimpses[clip.footage].colours for clip in firsts.values()])
    rows = [clip.row for clip in firsts.values()]
    return [[rows[place] for place in group] for group in near_groups(hashes, colours)]
