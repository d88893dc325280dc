"""Which size and length a clip is trained at, when a run has more than one.

Two ways to a table of buckets. A file in the format of the older trainers,

    bucket_config:
      480p:                    # a resolution by name, see `resolution_shapes`
        49: [1.0, 4]           # frames: [keep_prob, batch_size]
        81: [0.5, 2]

is read with their rules: a clip goes to the largest resolution it fills (at least 0.8 of its pixels) and there to the
longest length it has frames for. If the draw against keep_prob fails it falls to the next smaller *resolution*, not to
a shorter length, so `[0.0, 0]` sends long clips down. Within a resolution the shape nearest to the clip's own
height / width is taken. Unlike there, the draw belongs to the clip, so it has one bucket in a run, every shape whose
sides are multiples of 16 is kept, and frames are counted after resampling.

`auto` takes the shapes the clips have: that is `auto_buckets.py`.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from math import sqrt
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.draws import generator
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.strict_yaml import read_yaml

MULTIPLE = 16
FILLS = 0.8
"""Share of a resolution's pixels a clip must have to be shown at it."""
_PIXELS = {
    "144p": 36864, "240p": 102240, "360p": 230400, "480p": 409920, "720p": 921600, "1080p": 2073600, "2k": 3686400,
    "4k": 8294400, "256": 65536, "512": 262144, "1024": 1048576, "2048": 4194304, "2880": 8294400,
}  # fmt: skip
RATIOS = (0.38, 0.43, 0.48, 0.5, 0.53, 0.5625, 0.625, 0.67, 0.75, 0.89, 1.0)
_NATIVE = {"480p": ((480, 720), (720, 480))}
"""Sizes the models were trained at that no rule of areas gives (768 x 1360 comes out of 1024 by itself)."""


class Bucket(NamedTuple):
    """A shape clips are brought to: frames, height and width in pixels."""

    num_frames: int
    height: int
    width: int

    @property
    def key(self) -> str:
        """Name in reports and batches."""
        return f"{self.num_frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, key: str) -> "Bucket":
        """Return the bucket of a key."""
        return cls(*map(int, key.split("x")))


class Source(NamedTuple):
    """What counts of a clip: frames at the run's rate, height and width as a player shows it."""

    num_frames: int
    height: int
    width: int


class Buckets(Protocol):
    """A rule that gives each clip its bucket."""

    def choose(self, content: str, source: Source) -> Bucket:
        """Return the bucket of the clip with this content hash.

        Raises:
            ClipError: `bucket.none`, it fits into none.
        """
        ...

    @property
    def all(self) -> tuple[Bucket, ...]:
        """Every bucket there is."""
        ...

    def to_json(self) -> str:
        """Return what decides which clip goes where."""
        ...


@cache
def resolution_shapes(name: str) -> tuple[tuple[int, int], ...]:
    """Return the (height, width) of a resolution, by height / width.

    "480p" and the like have 21 shapes between 0.38 and 2.6, numbers such as "1024" one for every shorter side (in
    steps of a 32nd of the number, at least 16) between 0.25 and 4; sides are multiples of 16, the area is the nearest.

    Raises:
        FactoryError: no such resolution.
    """
    if name not in _PIXELS:
        raise FactoryError(
            f"{name!r} is no resolution{nearest(name, list(_PIXELS))}. Use one of: {', '.join(_PIXELS)}."
        )
    area = _PIXELS[name]
    if name.isdecimal():
        step = max(MULTIPLE, rounded(sqrt(area) / 32))
        shorter = range(rounded(sqrt(area) / 2), int(sqrt(area)) + 1, step)
        shapes = {shape for side in shorter for shape in ((side, rounded(area / side)), (rounded(area / side), side))}
    else:
        ratios = {*RATIOS, *(1 / ratio for ratio in RATIOS)}
        shapes = {(rounded(sqrt(area * ratio)), rounded(sqrt(area / ratio))) for ratio in ratios}
    return tuple(sorted(shapes | set(_NATIVE.get(name, ())), key=lambda shape: shape[0] / shape[1]))


def rounded(length: float) -> int:
    """Return the side nearest to `length` pixels that a model takes."""
    return max(MULTIPLE, round(length / MULTIPLE) * MULTIPLE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One line of a bucket file: a resolution at a length."""

    resolution: str
    num_frames: int
    keep_prob: float
    length_prob: float
    """Chance that this length is considered at all; the undocumented second number of a keep_prob of two."""
    batch_size: int

    @property
    def num_pixels(self) -> int:
        """Nominal pixels of the resolution."""
        return _PIXELS[self.resolution]


@dataclass(frozen=True, kw_only=True, slots=True)
class ListedBuckets:
    """The buckets of a file, largest resolution first and in each the longest length first."""

    options: tuple[Option, ...]
    seed: int

    @property
    def all(self) -> tuple[Bucket, ...]:
        """Every bucket a clip can fall into."""
        return tuple(
            Bucket(option.num_frames, *shape)
            for option in self.options
            if option.keep_prob > 0
            for shape in resolution_shapes(option.resolution)
        )

    def choose(self, content: str, source: Source) -> Bucket:
        """Return the bucket of a clip; the same clip gets the same one whatever else is in the data set.

        Raises:
            ClipError: `bucket.none`.
        """
        refused = set()
        for option in self.options:
            if option.resolution in refused or source.height * source.width < FILLS * option.num_pixels:
                continue
            # One frame means an image: a clip is no image, and an image no clip.
            fits = source.num_frames == 1 if option.num_frames == 1 else source.num_frames >= option.num_frames
            if not fits or self._draw("length", option, content) >= option.length_prob:
                continue
            if self._draw("keep", option, content) < option.keep_prob:
                return Bucket(option.num_frames, *_nearest_shape(option.resolution, source.height / source.width))
            refused.add(option.resolution)
        raise ClipError("bucket.none", self._why(source))

    def batch_size(self, bucket: Bucket) -> int:
        """Return the clips a step of `bucket`: the smallest count where two lines make the same shape."""
        sizes = [
            option.batch_size
            for option in self.options
            if option.keep_prob > 0
            and option.num_frames == bucket.num_frames
            and (bucket.height, bucket.width) in resolution_shapes(option.resolution)
        ]
        assert sizes, bucket
        return min(sizes)

    def to_json(self) -> str:
        """Return what decides which clip goes where, for a fingerprint: no batch sizes, and a seed where it draws."""
        rows = [[o.resolution, o.num_frames, o.keep_prob, o.length_prob] for o in self.options]
        drawn = any(0 < chance < 1 for o in self.options for chance in (o.keep_prob, o.length_prob))
        return json.dumps({"listed": rows} | ({"seed": self.seed} if drawn else {}))

    def _draw(self, what: str, option: Option, content: str) -> float:
        if (option.keep_prob if what == "keep" else option.length_prob) >= 1:
            return 0.0
        return float(generator(self.seed, "bucket", what, option.resolution, option.num_frames, content).random())

    def _why(self, source: Source) -> str:
        found = f"{source.num_frames} frames of {source.height}x{source.width}"
        filled = [o for o in self.options if source.height * source.width >= FILLS * o.num_pixels]
        if not filled:
            least = self.options[-1]
            return f"{found} fill no resolution of the bucket file; the smallest, {least.resolution}, needs " + (
                f"{FILLS:g} of {least.num_pixels} pixels"
            )
        lengths = [option.num_frames for option in filled]
        shortest = min((n for n in lengths if n > 1), default=1) if source.num_frames > 1 else min(lengths)
        if source.num_frames < shortest:
            return f"{found} are too few for every length of the bucket file at that size; the shortest is {shortest}"
        return f"{found} fit, but keep_prob sent the clip below the smallest resolution it fits"


def read_buckets(path: Path, *, seed: int) -> ListedBuckets:
    """Read a bucket file, with or without the key `bucket_config` around it.

    Args:
        path: the YAML file.
        seed: of the keep_prob draws.

    Raises:
        FactoryError: not readable, a key twice, an unknown resolution, or a line that is not
            frames: [keep_prob, batch_size].
    """
    content = read_yaml(path)
    table = content.get("bucket_config", content)
    if not isinstance(table, dict) or not table:
        raise FactoryError(f"{path} holds no buckets; write `480p: {{49: [1.0, 4]}}` under bucket_config.")
    lines = [(str(name), *line) for name, row in table.items() for line in _lines(path, name, row)]
    options = [_option(path, *line) for line in lines]
    if not any(option.keep_prob > 0 for option in options):
        raise FactoryError(f"{path}: every keep_prob is 0, so no clip has a bucket.")
    return ListedBuckets(options=tuple(sorted(options, key=lambda o: (-o.num_pixels, -o.num_frames))), seed=seed)


def _lines(path: Path, name: Any, row: Any) -> Iterable[tuple[Any, Any]]:
    if not isinstance(row, dict):
        raise FactoryError(f"{path}, {name}: {row!r} is no table of frames: [keep_prob, batch_size].")
    return row.items()


def _option(path: Path, name: str, frames: Any, value: Any) -> Option:
    resolution_shapes(name)
    keep, size = value if isinstance(value, list) and len(value) == 2 else (None, None)
    chances = keep if isinstance(keep, list) and len(keep) == 2 else [keep, 1.0]
    if not (_is_count(frames, 1) and _is_count(size, 0) and all(_is_share(chance) for chance in chances)):
        raise FactoryError(f"{path}, {name}, {frames}: {value!r} is not [keep_prob between 0 and 1, batch_size].")
    if chances[0] > 0 and size == 0:
        raise FactoryError(f"{path}, {name}, {frames}: batch_size 0 with keep_prob {chances[0]}; use at least 1.")
    return Option(
        resolution=name, num_frames=int(frames), batch_size=int(size or 0), keep_prob=float(chances[0]),
        length_prob=float(chances[1]),
    )  # fmt: skip


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _nearest_shape(resolution: str, ratio: float) -> tuple[int, int]:
    return min(resolution_shapes(resolution), key=lambda shape: abs(shape[0] / shape[1] - ratio))
