"""Buckets made from the shapes the clips have (`data.buckets: auto`), and batches that make their steps cost alike."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import NamedTuple

from cogvideox_factory.data.buckets import FILLS, MULTIPLE, RATIOS, Bucket, Source, rounded
from cogvideox_factory.data.reasons import ClipError


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoBuckets:
    """Buckets made from the clips themselves."""

    buckets: tuple[Bucket, ...]
    rule: str
    """What they were made by, for a fingerprint."""

    @property
    def all(self) -> tuple[Bucket, ...]:
        """Every bucket."""
        return self.buckets

    def choose(self, content: str, source: Source) -> Bucket:
        """Return the longest bucket the clip has frames for, of those the one that shows most of it.

        Raises:
            ClipError: `bucket.none`.
        """
        fitting = [bucket for bucket in self.buckets if _fits(bucket, source)]
        if not fitting:
            found = f"{source.num_frames} frames of {source.height}x{source.width}"
            least = f"; the shortest is {min(self.buckets).key}" if self.buckets else ""
            raise ClipError("bucket.none", f"{found} fit none of {len(self.buckets)} buckets{least}")
        return min(fitting, key=lambda bucket: (-bucket.num_frames, _distance(bucket, source)))

    def to_json(self) -> str:
        """Return what decides which clip goes where."""
        return self.rule


def auto_buckets(sources: Iterable[Source], *, native: Bucket, max_buckets: int) -> AutoBuckets:
    """Make at most `max_buckets` buckets that fit the clips.

    Each clip asks for its own proportions at the native area (or its own, if smaller) and for the most frames it has
    of the native count or 3/4, 1/2, 1/4 of it (as 8k + 1; a still image for one). Clips shorter than that ask for
    nothing. Then the rarest wishes join the nearest shape that their clips can still fill, until there are few enough.
    No clip loses its place by that.

    Args:
        sources: the clips.
        native: the size and length the model was made for.
        max_buckets: more are only kept when joining further would leave clips without a bucket.
    """
    wishes: dict[Bucket, _Wish] = {}
    for source in sources:
        if bucket := _wish(source, native):
            wishes[bucket] = wishes.get(bucket, _Wish(0, source)).joined(_Wish(1, source))
    while len(wishes) > max_buckets:
        for rare in sorted(wishes, key=lambda bucket: (wishes[bucket].count, bucket)):
            hosts = [bucket for bucket in wishes if bucket != rare and _fits(bucket, wishes[rare].least)]
            if hosts:
                host = min(hosts, key=lambda bucket: (_distance(bucket, Source(*rare)), bucket))
                wishes[host] = wishes[host].joined(wishes.pop(rare))
                break
        else:
            break
    rule = json.dumps({"auto": list(native), "max_buckets": max_buckets})
    return AutoBuckets(buckets=tuple(sorted(wishes)), rule=rule)


class _Wish(NamedTuple):
    """The clips that ask for one bucket."""

    count: int
    least: Source
    """The fewest frames and the smallest picture among them."""

    def joined(self, other: "_Wish") -> "_Wish":
        smaller = min(self.least, other.least, key=lambda source: source.height * source.width)
        frames = min(self.least.num_frames, other.least.num_frames)
        return _Wish(self.count + other.count, smaller._replace(num_frames=frames))


def _wish(source: Source, native: Bucket) -> Bucket | None:
    shorter = {max(9, int(native.num_frames * part) // 8 * 8 + 1) for part in (0.75, 0.5, 0.25)}
    lengths = {1} if source.num_frames == 1 else {n for n in shorter if n < native.num_frames} | {native.num_frames}
    fitting = [n for n in lengths if n <= source.num_frames]
    if not fitting:
        return None
    ratio = min(max(source.height / source.width, RATIOS[0]), 1 / RATIOS[0])
    area = min(native.height * native.width, source.height * source.width)
    bucket = Bucket(max(fitting), rounded(sqrt(area * ratio)), rounded(sqrt(area / ratio)))
    if _fits(bucket, source):
        return bucket
    sides = (max(MULTIPLE, int(side) // MULTIPLE * MULTIPLE) for side in (sqrt(area * ratio), sqrt(area / ratio)))
    bucket = Bucket(bucket.num_frames, *sides)
    return bucket if _fits(bucket, source) else None


def _fits(bucket: Bucket, source: Source) -> bool:
    large_enough = source.height * source.width >= FILLS * (bucket.height * bucket.width)  # exact at the very border
    long_enough = source.num_frames == 1 if bucket.num_frames == 1 else source.num_frames >= bucket.num_frames
    return long_enough and large_enough


def _distance(bucket: Bucket, source: Source) -> float:
    """Return how much of the clip is lost: by cropping, by shrinking, and (for shapes) by shortening."""
    ratio = abs(log(bucket.height / bucket.width) - log(source.height / source.width))
    area = abs(log(bucket.height * bucket.width) - log(source.height * source.width))
    return ratio + 0.5 * area + abs(log(bucket.num_frames) - log(max(source.num_frames, 1)))


def step_cost(num_tokens: int, *, width: int) -> float:
    """Return the multiplications of a transformer layer on `num_tokens`: 24 d^2 S in products, 4 S^2 d in attention."""
    return 24.0 * width**2 * num_tokens + 4.0 * num_tokens**2 * width


def balanced_batches(costs: Mapping[Bucket, float], *, batch_size: int, native_cost: float) -> dict[Bucket, int]:
    """Return the clips a step of each bucket such that no step costs more than `batch_size` native clips do.

    They are multiples of `batch_size`, so any number of processes that can share the one can share the others.
    """
    return {bucket: max(1, int(native_cost / cost)) * batch_size for bucket, cost in costs.items()}
