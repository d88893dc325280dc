"""The cache that `prepare` writes and `train` reads.

    CACHE/cache.json                     what made it, the checksum of the list, and its own
    CACHE/clips.jsonl                    one row a clip (a row of the input, or each of its windows), lost ones included
    CACHE/clips/ab/abcdef….safetensors   moments of a clip, unscaled and unsampled: mean, logvar
                                         [F, C, h, w]; of its first frame, clean then noised:
                                         image_mean, image_logvar [K, C, h, w]; all bf16
    CACHE/images/ab/abcdef….safetensors  image_mean, image_logvar of an image of the clip's own, in place of its first
                                         frame's
    CACHE/text/ab/abcdef….safetensors    prompt_embeds [S, E] bf16 of a caption; the empty one is always there

Entries are named by what went in (settings and content), written atomically and never changed, so runs can
be stopped, repeated and run side by side; `cache.json` and `clips.jsonl` are written last, from a look at
what is there.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.cache_index import CacheIndex, belongs, locked, read_unlocked, seal, text_hash
from cogvideox_factory.data.entry import Header, read_header, write_entry
from cogvideox_factory.data.fingerprint import CacheSettings, entry_key, fingerprint
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.reasons import PENDING
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.publish import publish_text

EMPTY_CAPTION = ""
Stamp = tuple[int, int, int] | None
"""Inode, size and time of the last write of an entry, which changes none of them."""
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Cache:
    """A cache folder seen through one run's settings: what is missing, and writing it.

    Args:
        folder: the cache; made when the first entry is written.
        settings: what entries are made with.
    """

    def __init__(self, folder: Path, settings: CacheSettings) -> None:
        self.folder = Path(folder)
        self.settings = settings
        self._text = fingerprint(settings.text)
        self._video: dict[tuple[str, Bucket | None], str] = {}
        self._headers: dict[str, tuple[Stamp, Header]] = {}

    def clip_file(self, clip: Clip) -> str:
        """Return the entry of a surveyed clip, relative to the folder; its caption does not matter."""
        assert clip.content is not None, f"{clip.name} has not been surveyed"
        return _entry_file("clips", entry_key(self._made_with(clip), clip.footage))

    def image_file(self, clip: Clip) -> str:
        """Return the entry of a surveyed clip's own image; where crops are drawn, the clip decides the place."""
        return _entry_file("images", entry_key(self._image_made_with(clip), _image_content(clip, self.settings)))

    def _made_with(self, clip: Clip) -> str:
        return self._fingerprint("image apart" if clip.image_content else "", clip)

    def _image_made_with(self, clip: Clip) -> str:
        return self._fingerprint("image", clip)

    def _fingerprint(self, part: str, clip: Clip) -> str:
        """Return the fingerprint of what makes a clip, one without its own image, or that image: one a shape."""
        video, spec = self.settings.video, clip.spec
        shape = Bucket(spec.num_frames, spec.height, spec.width) if spec and video.buckets else None
        if (part, shape) not in self._video:
            made = video.of_image(spec) if part == "image" else video.of(spec)
            self._video[part, shape] = fingerprint(made.without_images() if part == "image apart" else made)
        return self._video[part, shape]

    def caption_file(self, caption: str) -> str:
        """Return the entry of a caption, relative to the folder."""
        return _entry_file("text", entry_key(self._text, text_hash(caption)))

    def missing_clips(self, clips: Iterable[Clip]) -> list[Clip]:
        """Return the usable clips without a complete entry, one an entry."""
        wanted: dict[str, Clip] = {}
        for clip in clips:
            if clip.usable:
                assert clip.content is not None, f"{clip.name} has not been surveyed"
                wanted.setdefault(self.clip_file(clip), clip)
        return [clip for clip in wanted.values() if not self.has_clip(clip)]

    def missing_images(self, clips: Iterable[Clip]) -> list[Clip]:
        """Return the usable clips with an image of their own that has no complete entry, one an entry."""
        wanted: dict[str, Clip] = {}
        for clip in clips:
            if clip.usable and clip.image_content:
                wanted.setdefault(self.image_file(clip), clip)
        return [clip for clip in wanted.values() if not self.has_image(clip)]

    def missing_captions(self, clips: Iterable[Clip]) -> list[str]:
        """Return the usable clips' distinct captions, and the empty one, that have no complete entry."""
        wanted = dict.fromkeys([EMPTY_CAPTION, *(clip.caption for clip in clips if clip.usable)])
        return [caption for caption in wanted if not self.has_caption(caption)]

    def has_clip(self, clip: Clip) -> bool:
        """Tell whether a surveyed clip has a complete entry now."""
        return self._header(self.clip_file(clip)) is not None

    def has_image(self, clip: Clip) -> bool:
        """Tell whether a surveyed clip's own image has a complete entry now."""
        return self._header(self.image_file(clip)) is not None

    def has_caption(self, caption: str) -> bool:
        """Tell whether a caption has a complete entry now."""
        return self._header(self.caption_file(caption)) is not None

    def _header(self, file: str) -> Header | None:
        try:
            header = self._read_header(file)
        except UnfitError:  # absent or cut: both mean it is to be made
            return None
        return header if belongs(header, file) else None

    def _read_header(self, file: str) -> Header:
        """Return the header of an entry, read again only if the file is another than the one read before."""
        path = os.path.join(self.folder, file)
        stamp = _stamp(path)
        if file not in self._headers or self._headers[file][0] != stamp:
            self._headers[file] = stamp, read_header(Path(path))
        return self._headers[file][1]

    def write_clip(
        self,
        clip: Clip,
        *,
        mean: np.ndarray,
        logvar: np.ndarray,
        image_mean: np.ndarray | None = None,
        image_logvar: np.ndarray | None = None,
        image_sigmas: Sequence[float] = (),
        crop: Mapping[str, int] | None = None,
    ) -> None:
        """Write the moments of a clip.

        Args:
            clip: a surveyed clip.
            mean: [F, C, h, w], unscaled.
            logvar: like `mean`.
            image_mean: [K, C, h, w] of the first frame for image-to-video: index 0 clean, the others noised.
            image_logvar: like `image_mean`.
            image_sigmas: noise of each of the K, 0 first.
            crop: where the pixels were cut from (`Fit.to_json`), for the record.

        Raises:
            UnfitError: NaN or infinity in them.
            StorageError: the disk is full or cannot be written.
        """
        assert clip.content is not None, f"{clip.name} has not been surveyed"
        assert mean.ndim == 4, mean.shape
        assert mean.shape == logvar.shape, logvar.shape
        arrays = {"mean": mean, "logvar": logvar}
        variants = 0 if clip.image_content else self.settings.video.image_variants
        assert (image_mean is not None) == (variants > 0), "image moments go with image_variants"
        if image_mean is not None and image_logvar is not None:
            assert image_mean.shape == image_logvar.shape == (variants, *mean.shape[1:]), image_mean.shape
            assert len(image_sigmas) == variants, image_sigmas
            assert image_sigmas[0] == 0, image_sigmas
            arrays |= {"image_mean": image_mean, "image_logvar": image_logvar}
        metadata = {"content": clip.footage, "layout": "FCHW, unscaled moments"}
        if variants:
            metadata["image_sigmas"] = json.dumps([float(sigma) for sigma in image_sigmas])
        if crop:
            metadata["crop"] = json.dumps(dict(crop))
        self._write(self.clip_file(clip), arrays, metadata | {"fingerprint": self._made_with(clip)}, clip.name)

    def write_image(
        self, clip: Clip, *, image_mean: np.ndarray, image_logvar: np.ndarray, image_sigmas: Sequence[float]
    ) -> None:
        """Write the moments [K, C, h, w] of a clip's own image, clean then noised; see `write_clip`."""
        assert image_mean.shape == image_logvar.shape, image_logvar.shape
        assert len(image_mean) == len(image_sigmas) == self.settings.video.image_variants, image_mean.shape
        metadata = {
            "content": _image_content(clip, self.settings),
            "layout": "FCHW, unscaled moments",
            "image_sigmas": json.dumps([float(sigma) for sigma in image_sigmas]),
            "fingerprint": self._image_made_with(clip),
        }
        arrays = {"image_mean": image_mean, "image_logvar": image_logvar}
        self._write(self.image_file(clip), arrays, metadata, f"{clip.name}: {clip.image_name}")

    def write_caption(self, caption: str, prompt_embeds: np.ndarray) -> None:
        """Write the embedding [S, E] of a caption.

        Raises:
            UnfitError: NaN or infinity in it.
            StorageError: the disk is full or cannot be written.
        """
        assert prompt_embeds.shape[:-1] == (self.settings.text.max_sequence_length,), prompt_embeds.shape
        metadata = {"content": text_hash(caption), "layout": "SE", "fingerprint": self._text}
        self._write(self.caption_file(caption), {"prompt_embeds": prompt_embeds}, metadata, f"caption {caption!r}")

    def _write(self, file: str, arrays: dict[str, np.ndarray], metadata: dict[str, str], name: str) -> None:
        halves = {key: value.astype(_BFLOAT16) for key, value in arrays.items()}
        for key, value in halves.items():
            if not np.isfinite(value).all():
                raise UnfitError(
                    f"{name}: {key} has values that are not finite, so it was not written. The encoder "
                    "overflowed; run it in float32 or bfloat16 (float16 is too narrow for some models)."
                )
        if self._header(file) is None:  # another process may have finished it: entries never change
            write_entry(self.folder / file, halves, metadata)

    def publish(
        self,
        manifest: Manifest,
        source: Mapping[str, Any] | None = None,
        *,
        imported: Mapping[str, Any] | None = None,
    ) -> "CacheIndex":
        """Write `clips.jsonl` and `cache.json` for `manifest` from the entries that are there, and read them back.

        `source` says where the clips came from, so that a run can tell that it asks for others; `imported` what is
        known of entries that were made elsewhere.

        Raises:
            UnfitError: a usable clip of the manifest has no entry.
        """
        with locked(self.folder, exclusive=True):
            rows = [self._row(clip) for clip in manifest.clips]
            text = "".join(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n" for row in rows)
            text = text.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair becomes its JSON escape
            empty = self.caption_file(EMPTY_CAPTION)
            described = self.settings.to_json() | {
                "total": len(rows),
                "counts": manifest.counts(),
                "rows": {"total": len(manifest.rows), "counts": manifest.row_counts()},
                "source": dict(source or {}),
                "empty_caption": {"file": empty, "checksum": self._read_header(empty).checksum},
                "clips": {"file": "clips.jsonl", "sha256": text_hash(text)},
            }
            if imported is not None:
                described["imported"] = dict(imported)
            described["checksum"] = seal(described)
            _publish_changed(self.folder / "clips.jsonl", text)
            _publish_changed(self.folder / "cache.json", json.dumps(described, indent=2, ensure_ascii=False) + "\n")
            return read_unlocked(self.folder, "cogvideox prepare")

    def _row(self, clip: Clip) -> dict[str, Any]:
        row: dict[str, Any] = {
            "id": clip.id if clip.content else None,
            "content": clip.content,
            **clip.to_json(),
        }
        if not clip.usable:
            return row
        assert clip.state != PENDING, f"{clip.name} has not been surveyed"
        assert clip.content is not None, f"{clip.name} has not been read"
        files = {"clip": self.clip_file(clip), "text": self.caption_file(clip.caption)}
        if clip.image_content:
            files["image"] = self.image_file(clip)
        headers = {part: self._read_header(file) for part, file in files.items()}
        video = self.settings.video.of(clip.spec)
        if crop := headers["clip"].metadata.get("crop"):
            row["crop"] = json.loads(crop)
        return row | {
            "bucket": Bucket(video.num_frames, video.height, video.width).key,
            **{
                part: {"file": files[part], "checksum": header.checksum, "shapes": _lists(header.shapes)}
                for part, header in headers.items()
            },
        }


def _publish_changed(path: Path, text: str) -> None:
    """Write `text` unless it stands there already."""
    try:
        if path.read_bytes() == text.encode():
            return
    except OSError:
        pass
    publish_text(path, text)


def _stamp(path: Path | str) -> Stamp:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _image_content(clip: Clip, settings: CacheSettings) -> str:
    assert clip.image_content is not None, f"{clip.name} has no image of its own"
    return text_hash(f"{clip.image_content} {clip.footage if settings.video.crop == 'random' else ''}")


def _entry_file(kind: str, key: str) -> str:
    return f"{kind}/{key[:2]}/{key}.safetensors"


def _lists(shapes: dict[str, tuple[int, ...]]) -> dict[str, list[int]]:
    return {name: list(shape) for name, shape in sorted(shapes.items())}
