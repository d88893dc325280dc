"""The form of a catalogue row: a data set with something wrong in it, and what must become of every clip."""

import hashlib
import json
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from cogvideox_factory.data.manifest import Clip, Manifest, read_manifest
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from tests.faults.makers import SPEC, spoilt_decoder


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One fault of the data."""

    id: str
    fault: str
    make: Callable[[Path], None]
    """Builds the data set in an empty folder."""
    ends: tuple[tuple[str, str, str | None], ...] = ()
    """(name, state, reason) of every row of the data set, in order."""
    refused: bool = False
    """Whether the list as a whole is refused (exit code 3)."""
    says: tuple[str, ...] = ()
    """What the error, the details of the clips or the notes must hold."""
    pairs: tuple[tuple[str, str], ...] = ()
    """(name, caption) that must have stayed together."""
    facts: tuple[tuple[str, str, object], ...] = ()
    """(name, fact, value) that the report must hold."""
    spec: ClipSpec = SPEC
    meanwhile: Callable[[Path], None] | None = None
    """What happens to the data between the first look and the decoding."""
    spoilt: bool = False
    """Whether it is looked at by a decoder that crashes and hangs (`makers.spoilt_decoder`)."""
    check: Callable[[Manifest, Path], None] | None = None
    differs: str = ""
    """Where this project answers otherwise than a cautious reader might expect, and why."""


def through(
    root: Path, spec: ClipSpec = SPEC, *, meanwhile: Callable[[Path], None] | None = None, spoilt: bool = False
) -> Manifest:
    """Do to a data set what `prepare` does before it encodes, and return what became of every row.

    What decodes is in this process, where it is watched; a `spoilt` one is apart, as for `prepare`.

    Raises:
        DataError: the list cannot be read, or no clip is left.
    """
    with spoilt_decoder() if spoilt else nullcontext():
        manifest = survey(read_manifest(root), spec, num_workers=0, is_apart=spoilt)
    if meanwhile:
        meanwhile(root)

    def decode(clip: Clip) -> Clip:
        assert clip.path is not None
        assert clip.spec is not None
        decoded = read_clip(clip.path, clip.spec, stamp=clip.stamp)
        assert decoded.pixels.shape == (spec.num_frames, spec.height, spec.width, 3)
        return replace(clip, facts={**clip.facts, **decoded.facts})

    manifest = manifest.map_usable(decode)
    manifest.require_good(max_bad=1.0)
    return manifest


def problems(row: Row, manifest: Manifest, root: Path) -> list[str]:
    """Return what is not as the row wants it."""
    found = []
    ends = tuple((clip.name, clip.state, clip.reason) for clip in manifest.clips)
    if row.ends and ends != row.ends:
        found.append(f"ends {ends}, wanted {row.ends}")
    if sum(manifest.counts().values()) != len(manifest.clips):
        found.append(f"the counts {manifest.counts()} do not add up to {len(manifest.clips)}")
    found += _replaced(manifest, root) if row.meanwhile is None else []
    said = "\n".join([*manifest.report(), *(clip.detail for clip in manifest.clips)])
    found += [f"{word!r} is not said in {said!r}" for word in row.says if word not in said]
    captions = {clip.name: clip.caption for clip in manifest.clips}
    found += [f"{name} has caption {captions.get(name)!r}" for name, text in row.pairs if captions.get(name) != text]
    facts = {clip.name: clip.facts for clip in manifest.clips}
    found += [
        f"{name}: {fact} is {facts[name].get(fact)!r}" for name, fact, v in row.facts if facts[name].get(fact) != v
    ]
    if row.check:
        row.check(manifest, root)
    return found


def _replaced(manifest: Manifest, root: Path) -> list[str]:
    """Return the clips that hold other bytes than the file their row names."""
    return [
        f"{clip.name} holds the bytes of another file"
        for clip in manifest.usable
        if clip.content != hashlib.sha256((root / clip.name).read_bytes()).hexdigest()
    ]


def write_table(root: Path, pairs: Iterable[tuple[str, str]]) -> None:
    """Write metadata.jsonl with (file, caption) rows."""
    lines = [json.dumps({"video": video, "caption": caption}) for video, caption in pairs]
    (root / "metadata.jsonl").write_text("".join(line + "\n" for line in lines))
