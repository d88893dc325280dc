"""Writing clips: MP4 that plays everywhere, GIF, WebP, a folder of PNG, or the bare array.

A text (`note`) can go into an MP4, GIF or WebP, so that a video says how it was made; `read_note` finds it again.
"""

import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from cogvideox_factory.data.picture import encode_png, to_uint8
from cogvideox_factory.errors import FactoryError, MissingError, StorageError
from cogvideox_factory.publish import publish_file, replace_folder

log = logging.getLogger(__name__)

FORMATS = ("mp4", "gif", "webp", "npy", "png")
"""By the ending of the name; a name without an ending is a folder of PNG."""
CODECS = {"h264": "libx264", "h265": "libx265"}
# Without no-mbtree x264 gives other bytes for the same frames in one of ten calls (or so), whatever its threads do.
# swscale averages chroma over 2 x 2 pixels, so it sits in their centre; decoders assume the left edge if
# not told (worth 1.6 dB on a real clip and 2.8 dB on a gradient).
_ENCODER = {
    "h264": {
        "crf": "17", "preset": "medium", "chroma_sample_location": "center", "x264-params": "no-mbtree=1",
    },
    "h265": {"crf": "19", "preset": "medium", "chroma_sample_location": "center", "x265-params": "log-level=error"},
}  # fmt: skip
_FILTER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_BT709 = 1  # AVCOL_SPC_BT709
_H265_LEAST = 64
"""x265 4.2 writes past its buffers where a picture is smaller than its largest block."""


def export_to_video(
    frames: Any, path: Path | str, fps: float = 8, *, codec: str = "h264", note: str | None = None
) -> Path:
    """Write `frames` in the format that the name's ending says, and return the path; complete or not at all.

    .mp4 is H.264 or H.265 (yuv420p, BT.709); a picture of odd height or width is padded by one row or column there,
    which 4:2:0 needs, and a line in the log says so. .webp is lossless. .gif has 256 colours a frame and times in
    hundredths of a second. .npy is the array, exact. A name without an ending is a folder of PNG, exact.

    Args:
        frames: uint8 [F, H, W, 3], or floats in [0, 1] of that shape, or a list of arrays or PIL images.
        path: of the file or folder.
        fps: frames a second.
        codec: of an .mp4, "h264" or "h265" (half the size, slower, plays in fewer places).
        note: text to put into the file (.mp4, .gif, .webp); see `read_note`.

    Raises:
        FactoryError: no frames, other shapes or values, or another ending.
        MissingError: the codec is not in this build of PyAV.
        StorageError: the disk is full or cannot be written.
    """
    path = Path(path)
    kind = path.suffix.lower().removeprefix(".") or "png"
    if kind not in FORMATS or (kind == "png" and path.suffix):
        raise FactoryError(
            f"{path}: videos are written as .mp4, .gif, .webp or .npy, or into a folder of PNG (a name without an "
            "ending); end the name so."
        )
    if not 0.01 <= fps <= 1000:
        raise FactoryError(f"fps={fps:g}: a frame rate is 0.01 to 1000 a second.")
    pictures = [to_uint8(picture) for picture in frames]
    if not pictures:
        raise FactoryError(f"{path}: there are no frames to write.")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise FactoryError(f"{path}: frames of one video have one size; these have {sorted(shapes)}.")
    if kind == "png":
        _write_folder(pictures, path)
    elif kind == "npy":
        with publish_file(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.stack(pictures), allow_pickle=False)
    elif kind == "mp4":
        _write_mp4(pictures, path, Fraction(fps).limit_denominator(1001), codec, note)
    else:
        _write_animation(pictures, path, kind, fps, note)
    return path


def require_codec(path: Path, codec: str, height: int, width: int) -> None:
    """Check that an .mp4 of this codec and size can be written here.

    Raises:
        FactoryError: the codec cannot take pictures so small.
        MissingError: it is not in this build of PyAV.
    """
    if codec not in CODECS or CODECS[codec] not in av.codecs_available:
        here = [name for name, encoder in CODECS.items() if encoder in av.codecs_available]
        raise MissingError(f"codec {codec!r} cannot be written here; this build of PyAV has {', '.join(here)}.")
    if codec == "h265" and min(height, width) < _H265_LEAST:
        raise FactoryError(
            f"{path}: {height}x{width} is too small for h265, which takes {_H265_LEAST} pixels a side or more. "
            "Use h264."
        )


def read_note(path: Path) -> str | None:
    """Return the text that `export_to_video` put into an .mp4, .gif or .webp, or None.

    Raises:
        FactoryError: the file cannot be read as what its ending says.
    """
    path = Path(path)
    kind = path.suffix.lower()
    try:
        if kind == ".mp4":
            with av.open(str(path), options={"protocol_whitelist": "file"}) as container:
                return container.metadata.get("comment")
        if kind in (".gif", ".webp"):
            from PIL import Image

            with Image.open(path) as image:
                found = image.info.get("comment") if kind == ".gif" else image.info.get("xmp")
            return found.decode("utf-8") if found else None
    except (av.error.FFmpegError, OSError, UnicodeDecodeError) as error:
        raise FactoryError(f"{path} cannot be read: {error}. Give a video made by `cogvideox generate`.") from error
    return None


def _write_folder(pictures: Sequence[np.ndarray], path: Path) -> None:
    with replace_folder(path) as folder:
        for number, picture in enumerate(pictures):
            (folder / f"{number:05}.png").write_bytes(encode_png(picture))


def _write_animation(pictures: Sequence[np.ndarray], path: Path, kind: str, fps: float, note: str | None) -> None:
    from PIL import Image

    text = (note or "").encode("utf-8")
    options: dict[str, Any] = {"lossless": True, "xmp": text} if kind == "webp" else {"comment": text, "disposal": 1}
    first, *rest = [Image.fromarray(picture) for picture in pictures]
    # Times are whole milliseconds (GIF: hundredths of a second), so each is the difference of two rounded moments.
    unit = 1000 if kind == "webp" else 100
    moments = [round(unit * number / fps) for number in range(len(pictures) + 1)]
    duration = [(b - a) * 1000 // unit for a, b in pairwise(moments)]
    try:
        with publish_file(path) as temporary:
            first.save(
                temporary, format=kind, save_all=True, append_images=rest, duration=duration, loop=0, **options
            )  # fmt: skip
    except OSError as error:
        raise StorageError(f"could not write {path}: {error}. Make room or choose another folder.") from error


def _write_mp4(pictures: Sequence[np.ndarray], path: Path, rate: Fraction, codec: str, note: str | None) -> None:
    height, width, _ = pictures[0].shape
    require_codec(path, codec, height, width)
    if height % 2 or width % 2:
        log.warning("%s: %dx%d padded to %dx%d, 4:2:0 needs even sizes", path, height, width, *_even(height, width))
    with publish_file(path) as temporary:
        try:
            _encode(pictures, temporary, rate, codec, note)
        except av.error.FFmpegError as error:
            raise StorageError(f"could not write {path}: {error}. Make room or choose another folder.") from error


def _even(height: int, width: int) -> tuple[int, int]:
    return height + height % 2, width + width % 2


def _encode(pictures: Sequence[np.ndarray], path: Path, rate: Fraction, codec: str, note: str | None) -> None:
    height, width = _even(*pictures[0].shape[:2])
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        if note is not None:
            container.metadata["comment"] = note
        stream = container.add_stream(CODECS[codec], rate=rate, options=_ENCODER[codec])
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        if codec == "h265":
            context.codec_tag = "hvc1"  # without it Apple's players show nothing
        context.colorspace, context.color_range = _BT709, ColorRange.MPEG
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in _frames(pictures, height, width):
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _frames(pictures: Sequence[np.ndarray], height: int, width: int) -> Iterator[av.VideoFrame]:
    for number, picture in enumerate(pictures):
        rows, columns = height - picture.shape[0], width - picture.shape[1]
        if rows or columns:
            picture = np.pad(picture, ((0, rows), (0, columns), (0, 0)), mode="edge")
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=_FILTER,
            threads=1,
        )
        frame.pts = number
        yield frame
