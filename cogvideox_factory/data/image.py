"""Reading one picture: PNG, JPEG, WebP or BMP, upright, in RGB, covered and cropped to a size; and as a clip of one
frame."""

import io
import struct
from pathlib import Path
from typing import Literal

import av
import av.error
import numpy as np
from av.container import InputContainer
from av.video.frame import VideoFrame

from cogvideox_factory.data.container import has_alpha, orientation, refuse_hdr
from cogvideox_factory.data.reasons import ClipError, printable
from cogvideox_factory.data.resize import Fit, Resizer
from cogvideox_factory.data.saliency import smart_fit
from cogvideox_factory.data.video_info import VideoInfo
from cogvideox_factory.errors import DataError

_FORMATS = "png_pipe,jpeg_pipe,webp_pipe,bmp_pipe"
_MAX_BYTES = 256 * 2**20
_MAX_PIXELS = 120_000_000
_HEAD = 1 << 16
# EXIF orientation (tag 0x0112) -> (degrees counter-clockwise, mirrored first).
_EXIF = {1: (0, False), 2: (0, True), 3: (180, False), 4: (180, True), 5: (90, True), 6: (270, False),
         7: (270, True), 8: (90, False)}  # fmt: skip


def read_image(
    path: Path | str,
    height: int,
    width: int,
    *,
    crop: Literal["center", "random", "smart", "stretch"] = "center",
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
        frame, rotation, mirrored = load_picture(path)
    except ClipError as error:
        raise DataError(f"{shown}: {error.message}.") from error
    size = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    fit = Fit.of(*size, height, width, crop=crop, rng=rng)
    if crop == "smart":
        fit = smart_fit(fit, height, width, lambda see: [see(frame)], rotation=rotation, mirrored=mirrored)
    return np.ascontiguousarray(Resizer(fit, height, width, rotation=rotation, mirrored=mirrored)(frame))


def is_picture(path: Path) -> bool:
    """Tell whether a file begins as a PNG, JPEG or WebP does; its name says nothing."""
    try:
        with path.open("rb") as file:
            head = file.read(12)
    except OSError:  # whoever opens it next says what is wrong
        return False
    return head.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (head[:4], head[8:]) == (b"RIFF", b"WEBP")


def probe_picture(path: Path) -> VideoInfo:
    """Describe a picture as a clip of one frame that lasts a second.

    Raises:
        ClipError: it cannot be read, or moves.
    """
    frame, rotation, mirrored = load_picture(path)
    refuse_hdr(frame, path.name)
    height, width = (frame.width, frame.height) if rotation % 180 else (frame.height, frame.width)
    return VideoInfo(
        path=path, codec="picture", pixel_format=frame.format.name, width=width, height=height, fps=1.0,
        num_frames=1, duration_seconds=1.0, rotation=rotation, mirrored=mirrored, sample_aspect_ratio=1.0,
        bit_depth=max(component.bits for component in frame.format.components), has_alpha=has_alpha(frame),
        interlaced=False, variable_rate=False, times=np.zeros(1), tick_seconds=0.0, pts=None, still=True,
    )  # fmt: skip


def load_picture(path: Path) -> tuple[VideoFrame, int, bool]:
    """Decode a picture; return (frame, degrees counter-clockwise that bring it upright, mirrored before that).

    Raises:
        ClipError: gone, too large, damaged, animated, or no picture.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ClipError("video.too_large", f"it has more than {_MAX_BYTES >> 20} MiB; give a smaller picture")
        data = path.read_bytes()
    except OSError as error:
        raise ClipError("path.missing", f"it cannot be read: {error.strerror or error}; check the name") from error
    if _is_animated(data):
        raise ClipError("video.codec", "it is an animated picture; convert it to MP4")
    try:
        frame = _decode(data)
    except av.error.FFmpegError as error:
        raise ClipError("video.unreadable", "it is no picture that can be read (PNG, JPEG, WebP, BMP)") from error
    rotation, mirrored = _orientation(data, frame, path.name)
    return frame, rotation, mirrored


def _is_animated(data: bytes) -> bool:
    """Look for APNG's control chunk before the pixels and for the flag of an animated WebP."""
    if data[8:16] == b"WEBPVP8X":
        return bool(data[20:21] and data[20] & 2)
    return data[:4] == b"\x89PNG" and 0 <= data.find(b"acTL", 0, _HEAD) < data.find(b"IDAT")


def _decode(data: bytes) -> VideoFrame:
    with av.open(io.BytesIO(data), options={"format_whitelist": _FORMATS, "protocol_whitelist": ""}) as container:
        assert isinstance(container, InputContainer)
        stream = container.streams.video[0]
        context = stream.codec_context
        if context.width * context.height > _MAX_PIXELS:
            raise ClipError("video.too_large", f"{context.width}x{context.height} pixels are more than {_MAX_PIXELS}")
        # Without crccheck a flipped bit in a PNG's pixels can pass.
        context.options = {"err_detect": "crccheck+explode", "max_pixels": str(_MAX_PIXELS)}
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
