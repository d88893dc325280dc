"""Writing pictures and clips: H.264 MP4 that plays everywhere, and PNG."""

import logging
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import av.error
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation

from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.publish import publish_file

log = logging.getLogger(__name__)
# swscale averages chroma over 2 x 2 pixels, so it sits in their centre; decoders assume the left edge if
# not told (worth 1.6 dB on a real clip and 2.8 dB on a gradient).
_ENCODER = {"crf": "17", "preset": "medium", "chroma_sample_location": "center"}
_FILTER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_BT709 = 1  # AVCOL_SPC_BT709


def export_to_video(frames: Any, path: Path | str, fps: float = 8) -> Path:
    """Write `frames` as H.264 (yuv420p, BT.709) MP4 and return its path.

    A picture of odd height or width is padded by one row or column, which H.264 in 4:2:0 needs; a line in the
    log says so. The file appears complete or not at all.

    Args:
        frames: uint8 [F, H, W, 3], or floats in [0, 1] of that shape, or a list of arrays or PIL images.
        path: ends in .mp4.
        fps: frames a second.

    Raises:
        FactoryError: no frames, other shapes or values, or another ending.
        StorageError: the disk is full or cannot be written.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise FactoryError(f"{path}: videos are written as .mp4; end the name so.")
    if not 0 < fps <= 1000:
        raise FactoryError(f"fps={fps:g}: a frame rate is above 0 and at most 1000.")
    pictures = [to_uint8(picture) for picture in frames]
    if not pictures:
        raise FactoryError(f"{path}: there are no frames to write.")
    shapes = {picture.shape for picture in pictures}
    if len(shapes) > 1:
        raise FactoryError(f"{path}: frames of one video have one size; these have {sorted(shapes)}.")
    height, width, _ = pictures[0].shape
    if height % 2 or width % 2:
        log.warning("%s: %dx%d padded to %dx%d, H.264 needs even sizes", path, height, width, *_even(height, width))
    with publish_file(path) as temporary:
        try:
            _encode(pictures, temporary, Fraction(fps).limit_denominator(1001))
        except av.error.FFmpegError as error:
            raise StorageError(f"could not write {path}: {error}. Make room or choose another folder.") from error
    return path


def _even(height: int, width: int) -> tuple[int, int]:
    return height + height % 2, width + width % 2


def _encode(pictures: Sequence[np.ndarray], path: Path, rate: Fraction) -> None:
    height, width = _even(*pictures[0].shape[:2])
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate, options=_ENCODER)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
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


def to_uint8(picture: Any) -> np.ndarray:
    """Return a picture (PIL image, or array of uint8 or of floats in [0, 1]) as uint8 [H, W, 3].

    Raises:
        FactoryError: another shape, or floats out of range.
    """
    array = np.asarray(picture.convert("RGB") if hasattr(picture, "convert") else picture)
    if array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise FactoryError(f"a frame has shape {array.shape}; it must be [height, width, 3].")
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise FactoryError(f"a frame holds {array.dtype}; it must be uint8, or floats in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # NaN fails this too
        raise FactoryError(f"frame values go from {low:g} to {high:g}; floats must be in [0, 1].")
    return (array.clip(0, 1) * 255).round().astype(np.uint8)


def write_png(path: Path | str, pixels: np.ndarray) -> Path:
    """Write uint8 [H, W, 3] (or floats in [0, 1]) as PNG and return the path."""
    path = Path(path)
    data = _encode_picture(to_uint8(pixels), "png", "rgb24", {})
    with publish_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] (or floats in [0, 1]) as a JPEG of middling quality, for thumbnails."""
    return _encode_picture(to_uint8(pixels), "mjpeg", "yuvj420p", {"qmin": "5", "qmax": "5"})


def _encode_picture(picture: np.ndarray, codec: str, pixel_format: str, options: dict[str, str]) -> bytes:
    encoder = av.CodecContext.create(codec, "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height, encoder.pix_fmt = picture.shape[1], picture.shape[0], pixel_format
    encoder.time_base, encoder.options = Fraction(1), options
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
    if pixel_format != "rgb24":  # a JPEG without a profile is BT.601 at full range
        frame = frame.reformat(
            format=pixel_format, dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.JPEG,
            interpolation=_FILTER, threads=1,
        )  # fmt: skip
        frame.pts = 0
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
