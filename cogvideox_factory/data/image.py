"""Reading one picture: PNG, JPEG, WebP or BMP, upright, in RGB, covered and cropped to a size."""

import io
import struct
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame

from cogvideox_factory.data.container import orientation
from cogvideox_factory.data.reasons import ClipError, printable
from cogvideox_factory.data.resize import Fit, Resizer
from cogvideox_factory.errors import DataError

_FORMATS = "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
_MAX_BYTES = 256 * 2**20
_MAX_PIXELS = 120_000_000
# EXIF orientation (tag 0x0112) -> (degrees counter-clockwise, mirrored first).
_EXIF = {1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True), 5: (90, True), 6: (270, False),
         7: (270, True), 8: (90, False)}  # fmt: skip


def read_image(
    path: Path | str,
    height: int,
    width: int,
    *,
    crop: Literal["center", "random", "stretch"] = "center",
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Read a picture as uint8 [height, width, 3].

    It is turned as its EXIF data says, scaled to cover the size and cropped (see `resize.Fit`); transparent
    parts are laid on black. The bytes are read here and handed over, so a name is never taken for a pattern
    or an address.

    Raises:
        DataError: no such file, too large, or no picture.
    """
    path = Path(path)
    shown = printable(str(path))
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{shown} has more than {_MAX_BYTES >> 20} MiB; give a smaller picture.")
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{shown} cannot be read: {error.strerror or error}. Check the name and its rights.") from error
    try:
        frame = _decode(data)
        rotation, mirrored = _orientation(data, frame, shown)
    except av.error.FFmpegError as error:
        raise DataError(f"{shown} is no picture that can be read (PNG, JPEG, WebP, BMP).") from error
    except ClipError as error:
        raise DataError(f"{shown}: {error.message}.") from error
    size = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    fit = Fit.of(*size, height, width, crop=crop, rng=rng)
    return np.ascontiguousarray(Resizer(fit, height, width, rotation=rotation, mirrored=mirrored)(frame))


def _decode(data: bytes) -> VideoFrame:
    with av.open(io.BytesIO(data), options={"format_whitelist": _FORMATS, "protocol_whitelist": ""}) as container:
        assert isinstance(container, InputContainer)
        stream = container.streams.video[0]
        context = stream.codec_context
        if context.width * context.height > _MAX_PIXELS:
            raise ClipError("video.too_large", f"{context.width}x{context.height} pixels are more than {_MAX_PIXELS}")
        context.options = {"err_detect": "explode", "max_pixels": str(_MAX_PIXELS)}
        frame = next(container.decode(stream), None)
    if frame is None or frame.is_corrupt:
        raise ClipError("video.corrupt", "the picture is damaged")
    return frame


def _orientation(data: bytes, frame: VideoFrame, name: str) -> tuple[int, bool]:
    """Prefer the EXIF tag of a JPEG: FFmpeg's angle alone does not tell mirrored pictures."""
    tag = exif_orientation(data)
    return _EXIF[tag] if tag in _EXIF else orientation(frame, name)


def exif_orientation(data: bytes) -> int | None:
    """Return the EXIF orientation (1 to 8) of a JPEG, or None."""
    position = 2
    while data[:2] == b"\xff\xd8" and position + 4 <= len(data) and data[position] == 0xFF:
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4], "big")
        if marker == 0xDA:  # the picture starts; EXIF comes before
            return None
        body = data[position + 4 : position + 2 + length]
        if marker == 0xE1 and body[:6] == b"Exif\0\0":
            return _tiff_orientation(body[6:])
        position += 2 + length
    return None


def _tiff_orientation(data: bytes) -> int | None:
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    if order is None or len(data) < 10:
        return None
    start = struct.unpack_from(order + "I", data, 4)[0]
    if start + 2 > len(data):
        return None
    for number in range(struct.unpack_from(order + "H", data, start)[0]):
        entry = start + 2 + 12 * number
        if entry + 10 > len(data):
            return None
        if struct.unpack_from(order + "H", data, entry)[0] == 0x0112:
            return struct.unpack_from(order + "H", data, entry + 8)[0]
    return None
