"""Looking at every clip of a manifest once, before the long work starts.

Each file is hashed, its header and packet times are read, and its frames are chosen; so whatever can be known
without decoding (missing, cut, too short, too large, a copy of another row) is known for all clips in one
pass.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cogvideox_factory.data.container import DEFAULT_LIMITS, Limits
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec, plan_frames
from cogvideox_factory.data.video import file_stamp, probe_clip, source_facts

_BLOCK = 1 << 20


def survey(
    manifest: Manifest,
    spec: ClipSpec,
    *,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
    on_clip: Callable[[Clip], None] | None = None,
) -> Manifest:
    """Return the manifest with each usable clip hashed, described and put in the state `spec` gives it.

    Clips with the same bytes and the same caption as an earlier row become duplicates; the same bytes under
    another caption are kept. `on_clip` is called with each clip, in order, for progress.
    """
    first_rows: dict[str, int] = {}
    surveyed = []
    for clip in ordered_map(lambda clip: look_at(clip, spec, limits=limits), manifest.usable, num_workers=num_workers):
        if clip.usable:
            first = first_rows.setdefault(clip.id, clip.row)
            if first != clip.row:
                clip = clip.rejected(ClipError("row.duplicate", f"the same bytes and caption as row {first}"))
        surveyed.append(clip)
        if on_clip:
            on_clip(clip)
    return manifest.with_clips(surveyed)


def look_at(clip: Clip, spec: ClipSpec, *, limits: Limits = DEFAULT_LIMITS) -> Clip:
    """Return `clip` with its content hash, facts and state; never raises for what is wrong with it."""
    path = clip.path
    assert path is not None, f"{clip.name} names no file"
    try:
        stamp = file_stamp(path)
        clip = replace(clip, content=hash_file(path), stamp=stamp)
        info = probe_clip(path, spec, limits=limits)
        clip = replace(clip, facts={**clip.facts, **source_facts(info)})
        plan = plan_frames(info, spec)
        return replace(clip, state=plan.state, facts={**clip.facts, **plan.to_json()})
    except ClipError as error:
        return clip.rejected(error)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file's bytes.

    Raises:
        ClipError: `path.denied`, it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
    except OSError as error:
        raise ClipError("path.denied", f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()
