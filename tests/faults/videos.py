"""The catalogue of video bytes, V1 to V28."""

import os
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.stream import Disposition

from cogvideox_factory import draws
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.manifest import Manifest
from cogvideox_factory.data.timing import ClipSpec
from tests.faults.catalogue import Row, write_table
from tests.faults.makers import good_clip, grey, make_video, moving

GOOD = ("good.mp4", "used", None)
SMALL = {"height": 64, "width": 64}


def files(*makers):
    """Return a maker of a data set: a good clip, then one row for each (name, writer of that file)."""

    def make(root: Path) -> None:
        good_clip(root / "good.mp4", seed=5)
        for name, write in makers:
            write(root / name)
        write_table(root, [(name, f"caption of {name}") for name in ("good.mp4", *(name for name, _ in makers))])

    return make


def video(*args, **kwargs):
    return lambda path: make_video(path, *args, **kwargs)


def cut(share: float, **options):
    """Write a clip and keep a share of its bytes, or all but -share of them."""

    def write(path: Path) -> None:
        data = make_video(path, pictures=moving(12), **SMALL, **options).read_bytes()
        path.write_bytes(data[: int(len(data) * share) if share > 0 else int(share)])

    return write


def flipped(count: int):
    def write(path: Path) -> None:
        data = bytearray(make_video(path, pictures=moving(12), **SMALL).read_bytes())
        start, end = data.index(b"mdat") + 64, data.index(b"moov") - 8
        for place in draws.generator(3, "flips", count).integers(start, end, count):
            data[place] ^= 0x10
        path.write_bytes(data)

    return write


def spoilt_index(path: Path) -> None:
    """Point every chunk of the index somewhere else."""
    data = bytearray(make_video(path, pictures=moving(12), **SMALL).read_bytes())
    place = data.index(b"stco") + 12
    data[place : place + 4] = bytes(4)
    path.write_bytes(data)


def sound(*, cover: bool):
    def write(path: Path) -> None:
        with av.open(str(path), "w") as container:
            audio = container.add_stream("aac", rate=16000)
            picture = container.add_stream("mjpeg", rate=1) if cover else None
            if picture:
                picture.width, picture.height, picture.pix_fmt = 48, 32, "yuvj420p"
                picture.disposition = Disposition.attached_pic
                frame = av.VideoFrame.from_ndarray(grey(0, 32, 48), format="rgb24")
                container.mux(picture.encode(frame))
                container.mux(picture.encode(None))
            samples = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            samples.sample_rate = 16000
            container.mux(audio.encode(samples))
            container.mux(audio.encode(None))

    return write


def see_through(codec: str, pix_fmt: str):
    picture = np.full((64, 64, 4), 200, np.uint8)
    picture[:, 32:, 3] = 51
    return video(pictures=[picture] * 9, codec=codec, pix_fmt=pix_fmt, **SMALL)


def two_sizes(path: Path) -> None:
    """Mux what two encoders give into one stream."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        other = av.CodecContext.create("libx264", "w")
        other.width, other.height, other.pix_fmt, other.time_base = 32, 32, "yuv420p", Fraction(1, 8)
        for encoder, size, start in ((stream, 64, 0), (other, 32, 5)):
            encoder.options = {"preset": "ultrafast", "tune": "zerolatency"}
            pictures = [av.VideoFrame.from_ndarray(grey(n, size, size), format="rgb24") for n in range(5)]
            for number, frame in enumerate([*pictures, None]):
                if frame:
                    frame.pts, frame.time_base = start + number, Fraction(1, 8)
                for packet in encoder.encode(frame):
                    packet.stream = stream
                    packet.time_base = Fraction(1, 8)
                    container.mux(packet)


def two_streams(path: Path) -> None:
    """A small stream first, then a large one that is the default."""
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("libx264", rate=8) for _ in range(2)]
        for stream, size in zip(streams, (32, 96)):
            stream.width, stream.height, stream.pix_fmt = size, size, "yuv420p"
        streams[0].disposition, streams[1].disposition = Disposition(0), Disposition.default
        for number in range(9):
            for stream, size in zip(streams, (32, 96)):
                frame = av.VideoFrame.from_ndarray(grey(number, size, size), format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, 8)
                container.mux(stream.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))


def other_codec(path: Path) -> None:
    data = make_video(path, 9, **SMALL).read_bytes()
    path.write_bytes(data.replace(b"avc1", b"zzzz"))


def _odd_sizes_are_padded(manifest: Manifest, root: Path) -> None:
    path = export_to_video(np.full((3, 33, 47, 3), 90, np.uint8), root / "odd.mp4")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert (stream.height, stream.width) == (34, 48)


def _playlist(text: str):
    return lambda path: path.write_text(text.replace("GOOD", "good.mp4"))


def _touched(root: Path) -> None:
    os.utime(root / "changed.mp4", ns=(0, 0))
    (root / "gone.mp4").unlink()
    (root / "link.mp4").unlink()
    (root / "link.mp4").symlink_to(root / "good.mp4")


HLS = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nGOOD\n#EXT-X-ENDLIST\n"
UNREADABLE, TRUNCATED, CORRUPT = (("corrupt", f"video.{kind}") for kind in ("unreadable", "truncated", "corrupt"))
NO_STREAM, CODEC = ("unsupported", "video.no_stream"), ("unsupported", "video.codec")
CRASHED = ("failed", "video.decoder_crash")
USED, RETIMED, SHORT = ("used", None), ("retimed", None), ("too_short", "video.too_short")
LARGE, LONG = ("too_large", "video.too_large"), ("too_large", "video.too_long")
VFR = [0, 125, 250, 300, 500, 625, 900, 1000, 1100]


def row(id: str, fault: str, *parts: tuple, **more) -> Row:
    """Build a row from (name, writer, (state, reason)) of each file."""
    ends = (GOOD, *((name, *end) for name, _, end in parts))
    return Row(id=id, fault=fault, make=files(*((name, write) for name, write, _ in parts)), ends=ends, **more)


VIDEOS = [
    row("V1", "no video at all: zero bytes, random bytes, text", ("zero.mp4", Path.touch, UNREADABLE),
        ("random.mp4", lambda p: p.write_bytes(draws.generator(0, "bytes").bytes(5000)), UNREADABLE),
        ("text.mp4", lambda p: p.write_text("hello world\n" * 99), UNREADABLE)),
    row("V2", "cut, index at the end", ("a.mp4", cut(0.5), TRUNCATED), ("b.mp4", cut(-3), TRUNCATED)),
    row("V3", "cut, index in front", *[
        (f"{n}.mp4", cut(share, options={"movflags": "faststart"}), TRUNCATED)
        for n, share in enumerate((0.1, 0.5, 0.9, -3))], ("k.mkv", cut(0.7), TRUNCATED),
        differs="the good head of a cut file is not salvaged"),
    row("V4", "bits flipped in the pictures", ("a.mp4", flipped(20), CORRUPT), ("b.mp4", flipped(200), CORRUPT)),
    row("V5", "a damaged index", ("a.mp4", spoilt_index, CORRUPT)),
    row("V6", "sound only", ("a.mp4", sound(cover=False), NO_STREAM)),
    row("V7", "sound with a cover picture", ("a.mp4", sound(cover=True), NO_STREAM)),
    row("V8", "one frame", ("a.mp4", video(1, **SMALL), SHORT), says=("9 need more than",)),
    row("V9", "fewer frames than asked for", ("a.mp4", video(8, **SMALL), SHORT), says=("gives 8 frames at 8 fps",)),
    row("V9b", "fewer frames, and repeating the last was asked for", ("a.mp4", video(8, **SMALL), ("padded", None)),
        spec=ClipSpec(num_frames=9, height=64, width=64, fps=8, short_policy="repeat_last"),
        facts=(("a.mp4", "num_padded", 1),)),
    row("V10", "a variable frame rate; and a constant one that milliseconds round",
        ("vfr.mkv", video(9, pts=VFR, time_base=Fraction(1, 1000), **SMALL), RETIMED),
        ("cfr.mkv", video(27, fps=24, **SMALL), RETIMED),
        facts=(("vfr.mkv", "variable_rate", True), ("cfr.mkv", "variable_rate", None),
               ("vfr.mkv", "frames", "0,1,2,3,4,5,5,5,7"))),
    row("V11", "the first frame comes at 100 s",
        ("late.mkv", video(9, pts=[100_000 + 125 * n for n in range(9)], time_base=Fraction(1, 1000), **SMALL), USED),
        facts=(("late.mkv", "frames", "0:8:1"),)),
    row("V12", "turned by its header", ("r.mp4", video(9, rotation=90, height=64, width=96), USED),
        facts=(("r.mp4", "rotation", 90), ("r.mp4", "source_height", 96), ("r.mp4", "source_width", 64))),
    row("V12b", "turned by an angle that is no quarter turn", ("r.mp4", video(9, rotation=45, **SMALL),
        ("unsupported", "video.rotation")), says=("turned by 45 degrees", "turn it upright first")),
    row("V13", "pixels that are not square", ("w.mp4", video(9, aspect=Fraction(4, 3), **SMALL), USED),
        facts=(("w.mp4", "sample_aspect_ratio", 1.3333), ("w.mp4", "source_width", 85))),
    row("V14", "odd sizes", ("a.mp4", video(9, height=127, width=191, pix_fmt="yuv444p"), USED),
        ("b.webm", video(9, height=127, width=191, codec="libvpx-vp9"), USED),
        ("c.mkv", video(9, height=127, width=191, codec="ffv1", pix_fmt="bgr0"), USED), check=_odd_sizes_are_padded),
    row("V15", "10 bits", ("a.mp4", video(9, pix_fmt="yuv420p10le", **SMALL), USED),
        facts=(("a.mp4", "bit_depth", 10),)),
    row("V16", "HDR: PQ and HLG", ("pq.mp4", video(9, color_trc=16, **SMALL), ("unsupported", "video.hdr")),
        ("hlg.mp4", video(9, color_trc=18, **SMALL), ("unsupported", "video.hdr")), says=("(PQ)", "(HLG)"),
        differs="no tone mapping: it is refused"),
    row("V17", "transparency: laid on black; VP9's by the decoder that keeps it",
        ("a.mov", see_through("qtrle", "argb"), USED), ("b.webm", see_through("libvpx-vp9", "yuva420p"), USED),
        facts=(("a.mov", "alpha", True), ("b.webm", "alpha", True))),
    row("V18", "interlaced", ("a.mp4", video(9, more={"flags": "+ildct+ilme", "x264-params": "tff=1"}, **SMALL), USED),
        facts=(("a.mp4", "interlaced", True),), differs="recorded, and not deinterlaced"),
    row("V19", "another size from the sixth frame on", ("a.ts", two_sizes, ("corrupt", "video.resolution_change")),
        says=("changes from 64x64 to 32x32 at frame 6",)),
    row("V20", "two video streams: the default one is taken", ("a.mkv", two_streams, USED),
        facts=(("a.mkv", "source_height", 96),)),
    row("V21", "MPEG-TS", ("a.ts", video(9, **SMALL), USED)),
    row("V22", "far too many frames in few bytes", ("a.mp4", video(pictures=[grey(0, 16, 16)] * 10_001, height=16,
        width=16, fps=120), LONG), says=("more than 10000 frames",)),
    row("V23", "far too many pixels", ("a.mp4", video(1, height=2176, width=4112), LARGE),
        says=("4112x2176", "at most 8847360 pixels")),
    row("V24", "a playlist named .mp4", ("a.mp4", _playlist("ffconcat version 1.0\nfile GOOD\n"), UNREADABLE)),
    row("V25", "HLS named .mp4 and .m3u8", ("a.mp4", _playlist(HLS), UNREADABLE),
        ("b.m3u8", _playlist(HLS), UNREADABLE)),
    row("V26", "a decoder that crashes or hangs", ("crash.mp4", good_clip, CRASHED),
        ("hang.mp4", lambda p: good_clip(p, seed=6), CRASHED), says=("crashed (SIGSEGV)", "did not come to an end"),
        spoilt=True),
    row("V27", "a codec that is not built in", ("a.mp4", other_codec, CODEC), says=("no decoder",)),
    row("V28", "a file that changes, vanishes or becomes a link between look and decoding",
        ("changed.mp4", lambda p: good_clip(p, seed=8), ("corrupt", "video.changed")),
        ("gone.mp4", lambda p: good_clip(p, seed=9), ("missing", "path.missing")),
        ("link.mp4", lambda p: good_clip(p, seed=10), ("corrupt", "video.changed")), meanwhile=_touched),
]  # fmt: skip
