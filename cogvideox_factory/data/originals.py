"""Folders that the older trainers' `prepare_dataset` wrote (mindone's cogvideox_factory and its PyTorch ancestor).

    ROOT/prompts.txt, videos.txt              paired line by line; a table (their data.jsonl) will do as well
    ROOT/videos/<stem>.mp4, <stem>.txt        the clip encoded again; {"num_frames", "height", "width"}
    ROOT/prompts/<stem>.txt                   the caption as it was encoded
    ROOT/video_latents/<stem>.npy or .pt      moments [2C, F, h, w] (mean, then log-variance), unscaled, unsampled
    ROOT/image_latents/<stem>.npy or .pt      the same of the clean first frame, [2C, 1, h, w]
    ROOT/prompt_embeds/<stem>.npy or .pt      [S, E]

A stem is a file name up to its last dot, or, as the originals cut it, up to its first. The folders lie beside the
clip's own folder. Nothing in them says what made them, so all that can be checked is: names, shapes, types, numbers.
Frames first ([F, 2C, h, w]) is read too, and so are samples ([C, F, h, w]): a sample is a posterior without spread.

C latent channels, F latent frames, h w latent height and width; S text tokens, E text width.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.manifest import Clip, Manifest, Source, clean_caption, read_rows
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.paths import PathResolver
from cogvideox_factory.data.reasons import IMPORTED, ClipError, printable
from cogvideox_factory.data.rows import Row, read_text
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION, num_latent_frames
from cogvideox_factory.errors import DataError

VIDEO_LATENTS, IMAGE_LATENTS, PROMPT_EMBEDS = "video_latents", "image_latents", "prompt_embeds"
SUFFIXES = (".npy", ".pt")
NO_SPREAD = -30.0
"""Log-variance of a latent that is a sample already: where every trainer cuts it off (a deviation of 3e-7)."""
_MAX_BYTES = 2 * 2**30
_DTYPES = (np.dtype(np.float32), np.dtype(np.float16))


class Latents(NamedTuple):
    """What a latent file holds, as the cache keeps it."""

    mean: np.ndarray
    """[F, C, h, w], unscaled."""
    logvar: np.ndarray
    kind: str
    """`moments` or `samples`, and the layout it was stored in."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What the model of a recipe takes."""

    spec: ClipSpec
    buckets: frozenset[Bucket] | None = None
    """Shapes that are taken; None takes that of `spec` alone, an empty set every one."""
    latent_channels: int
    text_length: int
    text_width: int
    image: bool
    """Whether first frames are needed (image-to-video)."""


class Originals:
    """One prepared folder, read and checked.

    Args:
        source: its lists.
        wanted: what the model takes.
        read_pt: makes an array of the bytes of a `.pt` file; raises `ValueError` for what is no plain tensor.

    Raises:
        DataError: the lists cannot be read.
    """

    def __init__(self, source: Source, wanted: Wanted, *, read_pt: Callable[[bytes], np.ndarray]) -> None:
        self.source, self.wanted, self._read_pt = source, wanted, read_pt
        self.root = source.root
        self.read = read_rows(source)
        self._resolver = PathResolver(self.root)
        self._kinds = (VIDEO_LATENTS, PROMPT_EMBEDS, *([IMAGE_LATENTS] if wanted.image else []))

    def survey(self, *, num_workers: int = 2, on_clip: Callable[[], None] = lambda: None) -> Manifest:
        """Read every file of every row once and return the rows with their states.

        Raises:
            DataError: there is no prepared folder here.
        """
        read = self.read
        places = [self._folder(row.video) for row in read.rows]
        if not any((self.root / place / VIDEO_LATENTS).is_dir() for place in {PurePosixPath(), *places}):
            raise DataError(
                f"{self.root} holds no {VIDEO_LATENTS}/ folder, so nothing was prepared in it. Give the output folder "
                "of the older prepare_dataset, or use `cogvideox prepare` for raw clips."
            )
        first: dict[tuple[str, str], int] = {}
        for row in read.rows:
            first.setdefault((row.video, row.caption), row.line)
        files = [self._files(row.video) for row in read.rows]
        owners = Counter(
            file
            for row, found in zip(read.rows, files, strict=True)
            if first[row.video, row.caption] == row.line
            for file in found.values()
        )

        def look(row: Row) -> Clip:
            try:
                if (line := first[row.video, row.caption]) != row.line:
                    raise ClipError("row.duplicate", f"the same clip and caption as row {line}")
                for file in self._files(row.video).values():
                    if owners[file] > 1:
                        raise ClipError("import.ambiguous", f"{printable(file)} belongs to {owners[file]} rows")
                return self.look(row)
            except ClipError as error:
                return Clip(row=row.line, name=row.video, caption=row.caption).rejected(error)

        seen = _Seen()
        clips = []
        for clip in ordered_map(look, read.rows, num_workers=num_workers):
            clips.append(seen.check(clip))
            on_clip()
        notes = self.source.notes + read.notes + tuple(self._orphans(places, files))
        return Manifest(source=f"{self.source.description} (prepared elsewhere)", clips=tuple(clips), notes=notes)

    def latents(self, clip: Clip) -> Latents:
        """Read the latents of a surveyed clip.

        Raises:
            ClipError: they are not what they were when they were surveyed.
        """
        array, _ = self._read(self._file(clip.name, VIDEO_LATENTS))
        return split_latents(array, self._shapes(clip.name, array), channels=self.wanted.latent_channels)

    def image_latents(self, clip: Clip) -> Latents:
        """Read the latents of a surveyed clip's first frame; see `latents`."""
        array, _ = self._read(self._file(clip.name, IMAGE_LATENTS))
        assert clip.spec is not None
        shape = (1, clip.spec.height // SPATIAL_COMPRESSION, clip.spec.width // SPATIAL_COMPRESSION)
        return split_latents(array, [shape], channels=self.wanted.latent_channels)

    def prompt_embeds(self, clip: Clip) -> np.ndarray:
        """Read the embedding [S, E] of a surveyed clip's caption; see `latents`."""
        array, _ = self._read(self._file(clip.name, PROMPT_EMBEDS))
        expected = (self.wanted.text_length, self.wanted.text_width)
        if array.shape != expected:
            hint = ""
            if array.ndim == 2 and array.shape[1] == expected[1]:
                hint = f"; they were made with {array.shape[0]} tokens: set text.max_sequence_length={array.shape[0]}"
            raise ClipError("import.shape", f"{PROMPT_EMBEDS} {array.shape} should be {expected} (tokens, width){hint}")
        return array

    def look(self, row: Row) -> Clip:
        """Return the clip of a row with its content (the hash of its latents), size and facts.

        Raises:
            ClipError: the reason it cannot be used.
        """
        if row.code:
            raise ClipError(row.code, row.detail)
        caption = clean_caption(row.caption)
        self._check_caption(row.video, caption)
        clip = Clip(row=row.line, name=row.video, caption=caption)
        latents, digest = self._read(self._file(row.video, VIDEO_LATENTS))
        shapes = self._shapes(row.video, latents)
        found = split_latents(latents, shapes, channels=self.wanted.latent_channels)
        _require_finite(found, VIDEO_LATENTS)
        bucket = self._bucket(row.video, len(found.mean), *found.mean.shape[2:])
        spec = replace(self.wanted.spec, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
        clip = replace(clip, spec=spec, facts={"latents": found.kind, "bucket": bucket.key})
        if self.wanted.image:
            _require_finite(self.image_latents(clip), IMAGE_LATENTS)
            digest += self._read(self._file(row.video, IMAGE_LATENTS))[1]
        embeds = self.prompt_embeds(clip)
        if not np.isfinite(embeds).all():
            raise ClipError("latent.nonfinite", f"{PROMPT_EMBEDS} has values that are not finite")
        facts = {**clip.facts, "embedding": hashlib.sha256(embeds.astype("<f4").tobytes()).hexdigest()[:16]}
        return replace(clip, state=IMPORTED, content=hashlib.sha256(digest.encode()).hexdigest(), facts=facts)

    def _shapes(self, name: str, array: np.ndarray) -> list[tuple[int, int, int]]:
        """Return the (F, h, w) that the latents of a clip may have."""
        wanted = self.wanted
        if wanted.buckets is None:
            return [_latent_shape(Bucket(wanted.spec.num_frames, wanted.spec.height, wanted.spec.width))]
        if wanted.buckets:
            return sorted({_latent_shape(bucket) for bucket in wanted.buckets}, reverse=True)
        stated = self._stated(name)
        if stated is not None:
            return [_latent_shape(stated)]
        return [(frames, *array.shape[2:]) for frames in array.shape[1::-1]] if array.ndim == 4 else []

    def _bucket(self, name: str, frames: int, height: int, width: int) -> Bucket:
        """Return the size in pixels: as stated beside the clip, as the recipe has it, or the least that gives it."""
        shape = (frames, height, width)
        candidates = [
            self._stated(name),
            Bucket(self.wanted.spec.num_frames, self.wanted.spec.height, self.wanted.spec.width),
            *sorted(self.wanted.buckets or ()),
        ]
        for bucket in candidates:
            if bucket is not None and _latent_shape(bucket) == shape and self._takes(bucket):
                return bucket
        pixels = TEMPORAL_COMPRESSION * (frames - 1) + 1
        return Bucket(pixels, height * SPATIAL_COMPRESSION, width * SPATIAL_COMPRESSION)

    def _takes(self, bucket: Bucket) -> bool:
        wanted = self.wanted
        if wanted.buckets is None:
            return bucket == Bucket(wanted.spec.num_frames, wanted.spec.height, wanted.spec.width)
        return not wanted.buckets or bucket in wanted.buckets

    def _stated(self, name: str) -> Bucket | None:
        for stem in _stems(name):
            path = self.root / PurePosixPath(name).parent / f"{stem}.txt"
            try:
                stated = json.loads(path.read_text(encoding="utf-8"))
                return Bucket(*(int(stated[key]) for key in ("num_frames", "height", "width")))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # it was never read by the originals either; sizes follow from the latents then
        return None

    def _check_caption(self, name: str, caption: str) -> None:
        for stem in _stems(name):
            path = self.root / self._folder(name) / "prompts" / f"{stem}.txt"
            if path.is_file():
                try:
                    said = " ".join(read_text(path).split())
                except DataError as error:
                    raise ClipError("import.unreadable", str(error)) from error
                if said != " ".join(caption.split()):
                    raise ClipError(
                        "import.caption",
                        f"the list says {printable(caption[:60])!r}, {path.name} of prompts/ says "
                        f"{printable(said[:60])!r}: the lines of the lists have slipped, or one was edited",
                    )
                return

    def _file(self, name: str, kind: str) -> Path:
        entry = self._files(name).get(kind)
        if entry is None:
            shown = printable(str(self._folder(name) / kind / PurePosixPath(name).stem))
            raise ClipError("import.missing", f"there is no {shown}.npy or .pt")
        if entry == "":
            raise ClipError("import.ambiguous", f"more than one file of {kind}/ could belong to {printable(name)}")
        try:
            return self._resolver.resolve(entry)
        except ClipError as error:
            raise ClipError("import.missing", error.message) from error

    def _files(self, name: str) -> dict[str, str]:
        """Return the file of each kind, relative to the root: none where it is missing, "" where there are several."""
        found: dict[str, str] = {}
        if not name or "\0" in name:
            return found
        for kind in self._kinds:
            folder = self._folder(name) / kind
            entries = [f"{folder / stem}{suffix}" for stem in _stems(name) for suffix in SUFFIXES]
            there = [entry for entry in dict.fromkeys(entries) if os.path.lexists(self.root / entry)]
            if there:
                found[kind] = there[0] if len(there) == 1 else ""
        return found

    @staticmethod
    def _folder(name: str) -> PurePosixPath:
        return PurePosixPath(name).parent.parent

    def _read(self, path: Path) -> tuple[np.ndarray, str]:
        """Return the array of a file and the SHA-256 of its bytes.

        Raises:
            ClipError: `import.unreadable`, `import.dtype`.
        """
        try:
            if path.stat().st_size > _MAX_BYTES:
                raise ValueError(f"it has more than {_MAX_BYTES >> 30} GiB")
            data = path.read_bytes()
            array = self._read_pt(data) if path.suffix == ".pt" else np.load(io.BytesIO(data), allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError(f"it holds a {type(array).__name__}, not one array")
        except (OSError, ValueError, EOFError) as error:
            raise ClipError("import.unreadable", f"{path.parent.name}/{path.name} cannot be read: {error}") from error
        if array.dtype not in _DTYPES:
            raise ClipError(
                "import.dtype", f"{path.parent.name}/{path.name} holds {array.dtype}; float32 and float16 are read"
            )
        return array.astype(np.float32), hashlib.sha256(data).hexdigest()

    def _orphans(self, places: Iterable[PurePosixPath], files: list[dict[str, str]]) -> Iterator[str]:
        taken = {entry for found in files for entry in found.values()}
        for kind in self._kinds:
            for place in sorted({PurePosixPath(), *places}):
                folder = self.root / place / kind
                if not folder.is_dir():
                    continue
                names = sorted(path.name for path in folder.iterdir() if path.suffix in SUFFIXES)
                left = [name for name in names if str(place / kind / name) not in taken]
                if left:
                    yield f"{len(left)} files of {place / kind}/ belong to no row, for example {printable(left[0])}"


class _Seen:
    """What earlier rows held, to tell copies and contradictions."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._embeddings: dict[str, tuple[str, int]] = {}

    def check(self, clip: Clip) -> Clip:
        """Return the clip, rejected where an earlier row holds the same, or another embedding of its caption."""
        if not clip.usable:
            return clip
        if (row := self._rows.setdefault(clip.id, clip.row)) != clip.row:
            return clip.rejected(ClipError("row.duplicate", f"the same latents and caption as row {row}"))
        digest, row = self._embeddings.setdefault(clip.caption, (clip.facts["embedding"], clip.row))
        if digest != clip.facts["embedding"]:
            return clip.rejected(ClipError("import.caption", f"row {row} has the same caption and another embedding"))
        return clip


def split_latents(array: np.ndarray, shapes: Iterable[tuple[int, ...]], *, channels: int) -> Latents:
    """Return the mean and log-variance [F, C, h, w] of a stored array.

    Moments, channels first, is what the originals document, and it wins where a shape could be read in two ways.

    Args:
        array: four axes.
        shapes: (F, h, w) it may have.
        channels: C.

    Raises:
        ClipError: `import.shape`.
    """
    shapes = list(shapes)
    for kind, count in (("moments", 2 * channels), ("samples", channels)):
        for layout, axes in (("channels first", (1, 0, 2, 3)), ("frames first", (0, 1, 2, 3))):
            for frames, height, width in shapes:
                stored = (count, frames) if layout == "channels first" else (frames, count)
                if array.shape == (*stored, height, width):
                    whole = array.transpose(axes)  # [F, count, h, w]
                    mean, logvar = whole[:, :channels], whole[:, channels:]
                    if kind == "samples":
                        logvar = np.full_like(mean, NO_SPREAD)
                    return Latents(mean, logvar, f"{kind}, {layout}")
    wanted = " or ".join(str((2 * channels, *shape)) for shape in shapes[:4]) or "four axes"
    raise ClipError(
        "import.shape",
        f"latents {array.shape} are none of this size; moments are {wanted} (2 x channels, latent frames, height / 8, "
        "width / 8). Set data.num_frames, data.height and data.width to what they were prepared with",
    )


def _latent_shape(bucket: Bucket) -> tuple[int, int, int]:
    height, width = bucket.height // SPATIAL_COMPRESSION, bucket.width // SPATIAL_COMPRESSION
    return num_latent_frames(max(1, bucket.num_frames)), height, width


def _stems(name: str) -> list[str]:
    file = PurePosixPath(name).name
    return list(dict.fromkeys([PurePosixPath(file).stem, file.split(".")[0]]))


def _require_finite(latents: Latents, kind: str) -> None:
    if not (np.isfinite(latents.mean).all() and np.isfinite(latents.logvar).all()):
        raise ClipError("latent.nonfinite", f"{kind} has values that are not finite")


def facts_of(manifest: Manifest) -> dict[str, Any]:
    """Return how the usable clips' latents were stored: clips of each kind and layout."""
    return dict(sorted(Counter(clip.facts["latents"] for clip in manifest.usable).items()))
