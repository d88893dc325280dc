"""Looking at every clip of a manifest once, before the long work starts.

Each file is hashed, its header and packet times are read, and its frames are chosen; so whatever can be known
without decoding (missing, cut, too short, too large, a copy of another row) is known for all clips in one
pass. Here a row becomes several clips where its video is cut into windows. Files are opened by `look`, which is loaded,
and the decoder with it, for the first one that is not remembered.
"""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from cogvideox_factory.data.auto_buckets import auto_buckets
from cogvideox_factory.data.buckets import Bucket, Buckets, Source, read_buckets
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video_info import DEFAULT_LIMITS, Limits
from cogvideox_factory.data.windows import FIRST, Windows


def survey(
    manifest: Manifest,
    spec: ClipSpec,
    *,
    windows: Windows = FIRST,
    buckets: Buckets | None = None,
    memo: Memo | None = None,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
    is_apart: bool = False,
    on_clip: Callable[[Clip], None] | None = None,
) -> Manifest:
    """Return the manifest with each usable row cut into its windows, hashed, described, and in the state `spec` gives.

    Rows with the same bytes and the same caption as an earlier row become duplicates, uncut; the same bytes under
    another caption are kept. With `buckets` each clip is brought to the size and length they choose for it, and
    the rest of `spec` holds for all. What `memo` remembers of an unchanged file is not looked at again. `is_apart`:
    what decodes is a process of its own, which may crash (`apart`). `on_clip` is called with the first clip of each
    row, in order, for progress.

    Raises:
        MissingError: what `windows` needs is not installed.
    """
    windows.require()
    firsts: dict[str, Clip] = {}
    surveyed = []
    look = partial(_look_at, spec=spec, windows=windows, buckets=buckets, limits=limits, is_apart=is_apart)
    if memo:
        shapes = [buckets.to_json(), buckets.all] if buckets else None
        look = partial(memo.ask, question=["survey", asdict(spec), str(windows), shapes, asdict(limits)], look=look)
    both = partial(_with_condition, look=look, memo=memo, is_apart=is_apart)
    for clips in ordered_map(both, manifest.usable, num_workers=num_workers):
        clips = _without_copies(clips, firsts)
        surveyed += clips
        if on_clip:
            on_clip(clips[0])
    return manifest.with_clips(surveyed)


def _without_copies(clips: list[Clip], firsts: dict[str, Clip]) -> list[Clip]:
    """Return the windows of a row, those that an earlier row has as duplicates; one clip if all of them are."""
    found = []
    for clip in clips:
        if clip.usable and (first := firsts.setdefault(clip.id, clip)) is not clip:
            clip = clip.rejected(ClipError("row.duplicate", f"the same bytes and caption as {first.place}"))
        found.append(clip)
    if all(clip.reason == "row.duplicate" for clip in found) or len(found) == 1:
        return found[:1]
    return [replace(clip, facts={**clip.facts, "window": f"{n} of {len(found)}"}) for n, clip in enumerate(found, 1)]


def _with_condition(clip: Clip, *, look: Callable[[Clip], list[Clip]], memo: Memo | None, is_apart: bool) -> list[Clip]:
    """Look at a row's clip and at the picture it starts from; later windows start from their own first frames."""
    first, *later = look(clip)
    if not first.usable or first.image_path is None:
        return [first, *later]
    later = [replace(window, image_name="", image_path=None) for window in later]
    picture = Clip(row=clip.row, name=clip.image_name, caption="", path=clip.image_path)
    look = partial(_look_at_condition, is_apart=is_apart)
    (seen,) = memo.ask(picture, ["condition"], look) if memo else look(picture)
    if not seen.usable:
        return [replace(first, state=seen.state, reason=seen.reason, detail=seen.detail), *later]
    facts = {**first.facts, **seen.facts}
    return [replace(first, image_content=seen.content, image_stamp=seen.stamp, facts=facts), *later]


def _look_at(clip: Clip, **how: Any) -> list[Clip]:
    from cogvideox_factory.data.look import look_at

    return look_at(clip, **how)


def _look_at_condition(picture: Clip, **how: Any) -> list[Clip]:
    from cogvideox_factory.data.look import look_at_condition

    return look_at_condition(picture, **how)


def find_buckets(
    asked: str | None,
    clips: Iterable[Clip],
    spec: ClipSpec,
    *,
    windows: Windows = FIRST,
    max_buckets: int,
    seed: int,
    memo: Memo | None = None,
    is_apart: bool = False,
) -> Buckets | None:
    """Return the rule that gives each clip its size and length, if one is asked for.

    Args:
        asked: None, "auto" or a bucket file.
        clips: usable rows, which "auto" makes its shapes of.
        spec: the size and length the model was made for, and the rate.
        windows: how sources are cut.
        max_buckets: most shapes that "auto" makes.
        seed: of a file's keep_prob draws.
        memo: see `survey`.
        is_apart: see `survey`.

    Raises:
        FactoryError: a bucket file that cannot be read.
    """
    if asked is None:
        return None
    if asked != "auto":
        return read_buckets(Path(asked), seed=seed)
    native = Bucket(spec.num_frames, spec.height, spec.width)
    sources = measure(clips, spec, windows=windows, memo=memo, is_apart=is_apart)
    return auto_buckets(sources, native=native, max_buckets=max_buckets)


def count_buckets(clips: Iterable[Clip]) -> dict[Bucket, int]:
    """Return how many of the surveyed `clips` each bucket has, longest and largest first."""
    specs = [clip.spec for clip in clips if clip.spec]
    counts = Counter(Bucket(spec.num_frames, spec.height, spec.width) for spec in specs)
    return dict(sorted(counts.items(), reverse=True))


def measure(
    clips: Iterable[Clip],
    spec: ClipSpec,
    *,
    windows: Windows = FIRST,
    memo: Memo | None = None,
    limits: Limits = DEFAULT_LIMITS,
    num_workers: int = 2,
    is_apart: bool = False,
) -> list[Source]:
    """Return frames (at the rate of `spec`) and size of each of the usable `clips` that can be read; of each scene,
    where `windows` are cut from scenes."""
    windows.require()

    def look(clip: Clip) -> list[Clip]:
        from cogvideox_factory.data.look import sources_in

        sources = sources_in(clip, spec, windows, limits, is_apart=is_apart)
        return [replace(clip, facts={"measured": source}) for source in sources]

    if memo:
        parts = windows.policy == "scenes"
        look = partial(memo.ask, question=["measure", asdict(spec), parts, asdict(limits)], look=look)
    looked = ordered_map(look, clips, num_workers=num_workers)
    return [Source(*clip.facts["measured"]) for found in looked for clip in found]
