"""Looking at every clip of a manifest once, before the long work starts.

Each file is hashed, its header and packet times are read, and its frames are chosen; so whatever can be known
without decoding (missing, cut, too short, too large, a copy of another row) is known for all clips in one
pass.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from cogvideox_factory.data.auto_buckets import auto_buckets
from cogvideox_factory.data.buckets import Bucket, Buckets, Source, read_buckets
from cogvideox_factory.data.container import DEFAULT_LIMITS, Limits, VideoInfo
from cogvideox_factory.data.image import probe_picture
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.paths import require_in_place
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec, num_available, plan_frames
from cogvideox_factory.data.video import file_stamp, probe_clip, require_moving, source_facts

_BLOCK = 1 << 20


def survey(
    manifest: Manifest,
    spec: ClipSpec,
    *,
    buckets: Buckets | None = None,
    memo: Memo | None = None,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
    on_clip: Callable[[Clip], None] | None = None,
) -> Manifest:
    """Return the manifest with each usable clip hashed, described and put in the state `spec` gives it.

    Clips with the same bytes and the same caption as an earlier row become duplicates; the same bytes under
    another caption are kept. With `buckets` each clip is brought to the size and length they choose for it, and
    the rest of `spec` holds for all. What `memo` remembers of an unchanged file is not looked at again. `on_clip` is
    called with each clip, in order, for progress.
    """
    first_rows: dict[str, Clip] = {}
    surveyed = []
    look = partial(look_at, spec=spec, buckets=buckets, limits=limits)
    if memo:
        shapes = [buckets.to_json(), buckets.all] if buckets else None
        look = partial(memo.ask, question=["survey", asdict(spec), shapes, asdict(limits)], look=look)
    both = partial(_with_condition, look=look, memo=memo)
    for clip in ordered_map(both, manifest.usable, num_workers=num_workers):
        if clip.usable:
            first = first_rows.setdefault(clip.id, clip)
            if first is not clip:
                clip = clip.rejected(ClipError("row.duplicate", f"the same bytes and caption as {first.place}"))
        surveyed.append(clip)
        if on_clip:
            on_clip(clip)
    return manifest.with_clips(surveyed)


def _with_condition(clip: Clip, *, look: Callable[[Clip], Clip], memo: Memo | None) -> Clip:
    clip = look(clip)
    if not clip.usable or clip.image_path is None:
        return clip
    picture = Clip(row=clip.row, name=clip.image_name, caption="", path=clip.image_path)
    seen = memo.ask(picture, ["condition"], look_at_condition) if memo else look_at_condition(picture)
    if not seen.usable:
        return replace(clip, state=seen.state, reason=seen.reason, detail=seen.detail)
    return replace(clip, image_content=seen.content, image_stamp=seen.stamp, facts={**clip.facts, **seen.facts})


def look_at_condition(picture: Clip) -> Clip:
    """Return the picture a clip starts from (as the only file of a `Clip`) with its hash, size and state."""
    path = picture.path
    assert path is not None
    try:
        picture = replace(picture, stamp=file_stamp(path), content=hash_file(path))
        info = probe_picture(path)
        return replace(picture, facts={"image_height": info.height, "image_width": info.width})
    except ClipError as error:
        return picture.rejected(ClipError("image.unreadable", f"its image {path.name}: {error.message}"))


def find_buckets(
    asked: str | None,
    clips: Iterable[Clip],
    spec: ClipSpec,
    *,
    max_buckets: int,
    seed: int,
    memo: Memo | None = None,
) -> Buckets | None:
    """Return the rule that gives each clip its size and length, if one is asked for.

    Args:
        asked: None, "auto" or a bucket file.
        clips: usable rows, which "auto" makes its shapes of.
        spec: the size and length the model was made for, and the rate.
        max_buckets: most shapes that "auto" makes.
        seed: of a file's keep_prob draws.
        memo: see `survey`.

    Raises:
        FactoryError: a bucket file that cannot be read.
    """
    if asked is None:
        return None
    if asked != "auto":
        return read_buckets(Path(asked), seed=seed)
    native = Bucket(spec.num_frames, spec.height, spec.width)
    return auto_buckets(measure(clips, spec, memo=memo), native=native, max_buckets=max_buckets)


def count_buckets(clips: Iterable[Clip]) -> dict[Bucket, int]:
    """Return how many of the surveyed `clips` each bucket has, longest and largest first."""
    specs = [clip.spec for clip in clips if clip.spec]
    counts = Counter(Bucket(spec.num_frames, spec.height, spec.width) for spec in specs)
    return dict(sorted(counts.items(), reverse=True))


def measure(
    clips: Iterable[Clip],
    spec: ClipSpec,
    *,
    memo: Memo | None = None,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
) -> list[Source]:
    """Return frames (at the rate of `spec`) and size of each of the usable `clips` whose header can be read."""

    def look(clip: Clip) -> Clip:
        assert clip.path is not None
        try:
            return replace(clip, facts={"measured": _source(probe_clip(clip.path, limits=limits), spec)})
        except ClipError:
            return replace(clip, facts={})  # `survey` will say why

    if memo:
        look = partial(memo.ask, question=["measure", asdict(spec), asdict(limits)], look=look)
    looked = ordered_map(look, clips, num_workers=num_workers)
    return [Source(*clip.facts["measured"]) for clip in looked if "measured" in clip.facts]


def look_at(clip: Clip, spec: ClipSpec, *, buckets: Buckets | None = None, limits: Limits = DEFAULT_LIMITS) -> Clip:
    """Return `clip` with its content hash, facts and state; never raises for what is wrong with it."""
    path = clip.path
    assert path is not None, f"{clip.name} names no file"
    try:
        require_in_place(path)
        stamp = file_stamp(path)
        clip = replace(clip, content=hash_file(path), stamp=stamp)
        info = probe_clip(path, limits=limits)
        clip = replace(clip, facts={**clip.facts, **source_facts(info)})
        if buckets:
            chosen = buckets.choose(clip.content or "", _source(info, spec))
            spec = replace(spec, num_frames=chosen.num_frames, height=chosen.height, width=chosen.width)
            clip = replace(clip, facts={**clip.facts, "bucket": chosen.key})
        require_moving(info, spec)
        plan = plan_frames(info, spec)
        return replace(clip, state=plan.state, spec=spec, facts={**clip.facts, **plan.to_json()})
    except ClipError as error:
        return clip.rejected(error)


def _source(info: VideoInfo, spec: ClipSpec) -> Source:
    return Source(num_available(info, spec), info.height, info.width)


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
