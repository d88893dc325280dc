"""Writing single pictures: PNG, and JPEG for thumbnails."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.publish import publish_file

_FILTER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT


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
    data = encode_png(pixels)
    with publish_file(path) as temporary:
        temporary.write_bytes(data)
    return path


def encode_png(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] (or floats in [0, 1]) as a PNG."""
    return _encode(to_uint8(pixels), "png", "rgb24", {})


def encode_jpeg(pixels: np.ndarray) -> bytes:
    """Return uint8 [H, W, 3] (or floats in [0, 1]) as a JPEG of middling quality, for thumbnails."""
    return _encode(to_uint8(pixels), "mjpeg", "yuvj420p", {"qmin": "5", "qmax": "5"})


def _encode(picture: np.ndarray, codec: str, pixel_format: str, options: dict[str, str]) -> bytes:
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
