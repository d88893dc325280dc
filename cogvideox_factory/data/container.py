"""Opening video files safely, and what their headers and packets tell before a frame is decoded.

Only real containers are opened and only as files: a playlist, an address or a text file named `.mp4` is
refused before FFmpeg follows it anywhere. Packet times come from one pass over the file without decoding;
they are exact where an average frame rate is not.
"""

import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import av
import av.error
import numpy as np
from av.codec import CodecContext, codecs_available
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video_info import DEFAULT_LIMITS, Limits, VideoInfo

_OPEN = {
    "protocol_whitelist": "file",
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts",
}
_WITH_ALPHA = {"vp9": "libvpx-vp9"}
_HDR_TRANSFERS = {16: "PQ", 18: "HLG"}  # AVCOL_TRC_SMPTE2084, AVCOL_TRC_ARIB_STD_B67
_MP4_BOXES = {
    b"ftyp",
    b"moov",
    b"mdat",
    b"free",
    b"skip",
    b"wide",
    b"pnot",
    b"moof",
    b"sidx",
    b"styp",
    b"uuid",
}


@contextmanager
def open_video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open `path` and its main video stream for careful decoding.

    Raises:
        ClipError: `video.unreadable`, `.truncated`, `.no_stream`, `.codec`, or `path.*` when it is gone.
    """
    try:
        container = av.open(f"file:{os.path.abspath(path)}", options=dict(_OPEN), metadata_errors="replace")
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise ClipError("path.missing", f"{path} cannot be opened: {error.strerror}") from error
    except av.error.FFmpegError as error:
        _require_whole(path)
        raise ClipError("video.unreadable", f"{path.name} is no video file that can be read") from error
    with container:
        assert isinstance(container, InputContainer)
        _require_whole(path)
        stream = _main_stream(container, path)
        stream.thread_type = "NONE"
        stream.codec_context.options = {"err_detect": "explode"}
        yield container, stream


def decoder(stream: VideoStream) -> Callable[[Packet], list[VideoFrame]]:
    """Return what makes frames of a stream's packets; an empty packet at the end brings out the last ones.

    FFmpeg's own decoder of VP9 drops the transparency that WebM carries beside the colours; libvpx's keeps it.
    """
    name = _WITH_ALPHA.get(stream.codec_context.name)
    if stream.metadata.get("alpha_mode") != "1" or name not in codecs_available:
        return lambda packet: list(packet.decode())
    context = CodecContext.create(name, "r")
    assert isinstance(context, VideoCodecContext)
    return lambda packet: context.decode(packet if packet.size else None)


def _require_whole(path: Path) -> None:
    cut = missing_end(path)
    if cut:
        raise ClipError("video.truncated", f"{path.name} is cut off: {cut}")


def _main_stream(container: InputContainer, path: Path) -> VideoStream:
    """Return the default video stream, else the largest; cover pictures do not count."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        raise ClipError("video.no_stream", f"{path.name} has no video in it")
    if any(stream.codec_context is None for stream in streams):
        raise ClipError("video.codec", f"{path.name}: no decoder for its video here; convert it to H.264")
    defaults = [s for s in streams if s.disposition & Disposition.default]
    return max(defaults or streams, key=lambda s: s.codec_context.width * s.codec_context.height)


def probe(path: Path, *, limits: Limits = DEFAULT_LIMITS) -> VideoInfo:
    """Read the header, all packet times and one frame of a clip.

    Raises:
        ClipError: with the reason the clip cannot be used.
    """
    path = Path(path)
    with open_video(path) as (container, stream):
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > limits.max_pixels:
            raise ClipError(
                "video.too_large",
                f"{path.name} is {width}x{height}; frames may have at most {limits.max_pixels} pixels",
            )
        stamps, durations, frame = _packets(container, stream, path, limits)
        times, end, tick, pts = _times(stream, stamps, durations)
        if end > limits.max_seconds:
            raise ClipError(
                "video.too_long", f"{path.name} lasts {end:.1f} s; at most {limits.max_seconds:g} s are read"
            )
        return _describe(path, stream, frame, times, end, tick, pts)


def _packets(
    container: InputContainer, stream: VideoStream, path: Path, limits: Limits
) -> tuple[list[int | None], list[int], VideoFrame]:
    """Return stamps and durations of all packets in file order, and the first frame."""
    stamps: list[int | None] = []
    durations: list[int] = []
    frame: VideoFrame | None = None
    decode = decoder(stream)
    try:
        for packet in container.demux(stream):
            if frame is None:
                frame = next(iter(decode(packet)), None)
            if packet.size == 0 or packet.is_discard:
                continue
            if packet.is_corrupt:
                raise ClipError("video.corrupt", f"{path.name}: packet {len(stamps) + 1} is damaged")
            stamps.append(packet.pts)
            durations.append(packet.duration or 0)
            if len(stamps) > limits.max_frames:
                raise ClipError("video.too_long", f"{path.name} has more than {limits.max_frames} frames")
    except av.error.FFmpegError as error:
        raise ClipError("video.corrupt", f"{path.name} is damaged near frame {len(stamps) + 1} ({error})") from error
    if frame is None or frame.is_corrupt or not stamps:
        raise ClipError("video.corrupt", f"{path.name}: its first frame cannot be decoded")
    return stamps, durations, frame


def _times(
    stream: VideoStream, stamps: list[int | None], durations: list[int]
) -> tuple[np.ndarray, float, float, tuple[int, ...] | None]:
    """Return (seconds from the first frame, end of the last in seconds, tick in seconds, sorted stamps)."""
    known = sorted({stamp for stamp in stamps if stamp is not None})
    rate = float(stream.average_rate or stream.guessed_rate or 0) or 25.0
    if len(known) < len(stamps) or stream.time_base is None:
        times = np.arange(len(stamps)) / rate
        return times, float(times[-1] + 1 / rate), 0.0, None
    tick = float(stream.time_base)
    times = (np.array(known, dtype=np.int64) - known[0]) * tick
    last = next((d for s, d in zip(stamps, durations) if s == known[-1]), 0) * tick
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 1 / rate
    # A last duration of 0 or of many frames is a muxer's guess; the usual gap is the better one.
    end = float(times[-1]) + (last if 0 < last <= 2 * gap else gap)
    return times, end, tick, tuple(known)


def _describe(
    path: Path,
    stream: VideoStream,
    frame: VideoFrame,
    times: np.ndarray,
    end: float,
    tick: float,
    pts: tuple[int, ...] | None,
) -> VideoInfo:
    refuse_hdr(frame, path.name)
    if stream.metadata.get("alpha_mode") == "1" and not has_alpha(frame):  # in WebM, beside the colours
        raise ClipError(
            "video.codec",
            f"{path.name} has transparency that its decoder drops, which would show what lies under it; lay it on a "
            "colour, or convert it to ProRes 4444",
        )
    rotation, mirrored = orientation(frame, path.name)
    aspect = float(stream.sample_aspect_ratio or 1)
    size = (round(frame.width * aspect), frame.height)
    width, height = size[::-1] if rotation % 180 else size
    gaps = np.diff(times)
    # Millisecond containers round constant rates to gaps one tick apart on either side.
    variable = len(gaps) > 0 and float(np.abs(gaps - np.median(gaps)).max()) > 1.5 * tick + 1e-9
    return VideoInfo(
        path=path, codec=stream.codec_context.name, pixel_format=frame.format.name,
        width=width, height=height, rotation=rotation, mirrored=mirrored, sample_aspect_ratio=aspect,
        fps=float((len(times) - 1) / times[-1]) if len(times) > 1 else 1 / end,
        num_frames=len(times), duration_seconds=end, variable_rate=variable,
        bit_depth=max(component.bits for component in frame.format.components),
        has_alpha=has_alpha(frame), interlaced=bool(frame.interlaced_frame),
        times=times, tick_seconds=tick, pts=pts,
    )  # fmt: skip


def refuse_hdr(frame: VideoFrame, name: str) -> None:
    """Raise `video.hdr` for a frame in a transfer curve that needs tone mapping.

    Raises:
        ClipError: it is PQ or HLG.
    """
    if curve := _HDR_TRANSFERS.get(frame.color_trc or 0):
        raise ClipError("video.hdr", f"{name} is HDR ({curve}) and would look washed out; convert it to SDR first")


def has_alpha(frame: VideoFrame) -> bool:
    """Tell whether the frame's pixels carry transparency."""
    return any(component.is_alpha for component in frame.format.components)


def orientation(frame: VideoFrame, name: str) -> tuple[int, bool]:
    """Return (degrees counter-clockwise, mirrored first) that bring the coded picture upright.

    Raises:
        ClipError: `video.rotation`, an angle that is no quarter turn.
    """
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # side data of a kind PyAV has no name for; the angle alone can still be had
        matrix = None
    if matrix is None:
        angle, mirrored = frame.rotation, False
    else:
        a, b, _, c, d = struct.unpack("<5i", bytes(matrix)[:20])
        mirrored = a * d - b * c < 0
        a, b = (-a, -b) if mirrored else (a, b)
        angle = float(np.degrees(np.arctan2(-b, a)))
    turns = round(angle / 90)
    if abs(angle - 90 * turns) > 1:
        raise ClipError("video.rotation", f"{name} is to be shown turned by {angle:.0f} degrees; turn it upright first")
    return turns % 4 * 90, mirrored


def upright(pixels: np.ndarray, *, rotation: int, mirrored: bool) -> np.ndarray:
    """Mirror and turn [H, W, 3] as `orientation` says (a view)."""
    return np.rot90(pixels[:, ::-1] if mirrored else pixels, k=rotation // 90)


def missing_end(path: Path) -> str | None:
    """Return what a cut MP4, Matroska or AVI file lacks by the sizes it declares, or None."""
    size = os.stat(path).st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(0)
        if head[4:8] in _MP4_BOXES:
            return _missing_boxes(file, size)
        if head[:4] == b"RIFF" and head[8:] == b"AVI ":
            declared = 8 + int.from_bytes(head[4:8], "little")
            return _shortage(declared, size)
        if head[:4] == b"\x1a\x45\xdf\xa3":
            return _missing_segment(file, size)
    return None


def _shortage(declared: int, size: int) -> str | None:
    return f"{declared - size} of {declared} bytes are missing" if declared > size else None


def _missing_boxes(file: BinaryIO, size: int) -> str | None:
    """Walk the top-level boxes of ISO/IEC 14496-12."""
    position, names = 0, set()
    while position + 8 <= size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8))
        if length == 1:
            length = int.from_bytes(file.read(8), "big")
        if length == 0:
            length = size - position
        names.add(name)
        if position + length > size and name in _MP4_BOXES:
            return _shortage(position + length, size)
        if length < 8 or position + length > size:
            break  # junk after the last box is nobody's loss
        position += length
    return None if b"moov" in names else "the index (moov) that stands at its end is missing"


def _missing_segment(file: BinaryIO, size: int) -> str | None:
    """Read the EBML header's length, then the segment's (RFC 8794)."""
    position = 4
    for _ in range(2):
        file.seek(position)
        first = file.read(1)
        if not first or first[0] == 0:
            return None
        width = 9 - first[0].bit_length()
        rest = file.read(width - 1)
        length = int.from_bytes(bytes([first[0] & (0xFF >> width)]) + rest, "big")
        if length == (1 << 7 * width) - 1:  # "unknown": a live recording
            return None
        end = position + width + length
        if end > size:
            return _shortage(end, size)
        position = end + 4
    return None
