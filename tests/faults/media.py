"""F11, F12, F14, F27: damaged clips, the catalogue of clips, hostile names and links, and clips that are good."""

import os
import resource
from collections.abc import Iterator
from fractions import Fraction
from functools import cache as once
from pathlib import Path
from tempfile import mkdtemp

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.look import look_at
from cogvideox_factory.data.manifest import Clip, read_manifest
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from tests.faults.caches import settings
from tests.faults.catalogue import problems, through, write_table
from tests.faults.guard import watched
from tests.faults.makers import SPEC, damaged, good_clip, make_video, moving
from tests.faults.trial import Outcome, Trial, Verdict, folder_of_this_run, in_child, spread
from tests.faults.videos import VIDEOS

_CONTAINERS = (("mp4", "libx264"), ("mkv", "libx264"), ("webm", "libvpx-vp9"))
_KINDS = ("cut", "flip", "zero block")
_FRAMES = ClipSpec(num_frames=24, height=64, width=64, fps=8)
_CHUNK = 60
HASH_ONLY = "only its hash, on a later run"
"""What tells a damaged clip that decodes without a complaint."""
_MAX_SECONDS, _MAX_MIB = 10.0, 600


@once
def _originals() -> dict[str, bytes]:
    work = folder_of_this_run("media")
    return {
        suffix: make_video(
            work / f"a.{suffix}", pictures=moving(24), height=64, width=64, codec=codec,
            options={"movflags": "faststart"} if suffix == "mp4" else {},
            more={"preset": "medium", "crf": "20", "g": "12"},
        ).read_bytes()
        for suffix, codec in _CONTAINERS
    }  # fmt: skip


def mutants(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F11: clips in three containers, cut, flipped or with a block of zeros, decoded in children."""
    _originals()
    for start in range(0, count, _CHUNK):
        numbers = list(range(start, min(start + _CHUNK, count)))
        ended = in_child(_decode_all, numbers, seed, work)
        found = ended.value or []
        if ended.broke:  # which one it was
            found = [_one(in_child(_decode_all, [number], seed, work)) for number in numbers]
        for number, (verdict, layer, detail) in zip(numbers, found, strict=True):
            suffix, kind = _CONTAINERS[number // 3 % 3][0], _KINDS[number % 3]
            if kind == "cut" and verdict == Verdict.DEGRADED:
                verdict, detail = Verdict.SILENT, "a cut clip was taken"
            name = f"{number}: {suffix} {kind}"
            yield Trial(family="F11", name=name, verdict=Verdict(verdict), layer=layer, detail=detail)


def _one(ended: Outcome) -> list[str]:
    return ended.value[0] if ended.value else [str(ended.broke), "", ended.output + ended.error]


def _decode_all(numbers: list[int], seed: int, work: Path) -> list[list[str]]:
    good = {suffix: _looked_and_read(work / f"good.{suffix}", data) for suffix, data in _originals().items()}
    return [_decode(number, seed, work, *good[_CONTAINERS[number // 3 % 3][0]]) for number in numbers]


def _decode(number: int, seed: int, work: Path, clip: Clip, pixels: np.ndarray) -> list[str]:
    """Return (verdict, what noticed, detail) of one mutant of `clip`, looked at and decoded as `prepare` does."""
    suffix, kind = _CONTAINERS[number // 3 % 3][0], _KINDS[number % 3]
    spoilt = damaged(_originals()[suffix], kind=kind.split()[0], rng=draws.generator(seed, "mutant", number))
    try:
        found, seen = _looked_and_read(work / f"mutant.{suffix}", spoilt)
    except ClipError as error:
        return [Verdict.REFUSED, error.code, ""]
    if np.array_equal(seen, pixels):
        return [Verdict.OK, "", ""]
    cache = Cache(work / "cache", settings())
    if cache.clip_file(found) == cache.clip_file(clip):
        return [Verdict.SILENT, "", "a cache of the undamaged clip would be taken for this one"]
    return [Verdict.DEGRADED, HASH_ONLY, "other pixels, which no layer of the file tells"]


def _looked_and_read(path: Path, data: bytes) -> tuple[Clip, np.ndarray]:
    path.write_bytes(data)
    clip = look_at(Clip(row=1, name=path.name, caption="x", path=Path(os.path.realpath(path))), _FRAMES)[0]
    if clip.reason:
        raise ClipError(clip.reason, clip.detail)
    assert clip.path is not None
    return clip, read_clip(clip.path, _FRAMES, stamp=clip.stamp).pixels


def catalogue(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F12: every row of the catalogue of clips, in a child, within 10 s and 600 MiB."""
    for row in VIDEOS:
        root = Path(mkdtemp(dir=work)) / "set"
        root.mkdir()
        row.make(root)

        def look(row=row, root=root) -> list:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            found = problems(row, through(root, row.spec, meanwhile=row.meanwhile, spoilt=row.spoilt), root)
            return [found, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024]

        ended = in_child(look)
        verdict, detail = Verdict.REFUSED, ""
        if ended.exit_code != 0:
            verdict, detail = ended.broke or Verdict.SILENT, ended.output + ended.error
        elif ended.value[0]:
            verdict, detail = Verdict.SILENT, "; ".join(ended.value[0])
        elif ended.seconds > _MAX_SECONDS or ended.value[1] > _MAX_MIB:
            verdict, detail = Verdict.HANG, f"{ended.seconds:.1f} s, {ended.value[1]} MiB more"
        elif all(reason is None for _, _, reason in row.ends):
            verdict = Verdict.OK
        yield Trial(family="F12", name=f"{row.id}: {row.fault}", verdict=verdict, detail=detail)


_NAMES = (
    "../outside/secret.mp4", "sub/../../outside/secret.mp4", "{outside}/secret.mp4", "link.mp4", "links/secret.mp4",
    "chain.mp4", "/etc/passwd", "/proc/self/mem", "/dev/zero", "~/secret.mp4", "a\0.mp4", "\\\\host\\share\\a.mp4",
)  # fmt: skip
_ADDRESSES = (
    "http://127.0.0.1:{port}/a.mp4", "https://127.0.0.1:{port}/a.mp4", "tcp://127.0.0.1:{port}",
    "rtmp://127.0.0.1:{port}/a", "concat:{outside}/secret.mp4", "subfile,,start,0,end,99,,:{outside}/secret.mp4",
    "async:file:{outside}/secret.mp4", "crypto:{outside}/secret.mp4",
)  # fmt: skip
_PLAYLISTS = (
    "ffconcat version 1.0\nfile {outside}/secret.mp4\n",
    "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nhttp://127.0.0.1:{port}/a.mp4\n#EXT-X-ENDLIST\n",
    "#EXTM3U\n#EXTINF:9,\nfile://{outside}/secret.mp4\n",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video {port} RTP/AVP 96\na=rtpmap:96 H264/90000\n",
)  # fmt: skip


def hostile_names(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F14: names, addresses, playlists and links swapped meanwhile; nothing outside is opened, nobody is called."""
    names = [("name", text) for text in _NAMES] + [("address", text) for text in _ADDRESSES]
    tries = names + [("playlist", text) for text in _PLAYLISTS] + [("swap", str(n)) for n in range(20)]
    for kind, text in spread(tries, count):
        verdict, detail = _try_hostile(Path(mkdtemp(dir=work)), kind, text)
        yield Trial(family="F14", name=f"{kind} {text!r}", verdict=verdict, detail=detail)


def _try_hostile(work: Path, kind: str, text: str) -> tuple[Verdict, str]:
    work = Path(os.path.realpath(work))
    root, outside = work / "set", work / "outside"
    for folder in (root, outside, root / "sub"):
        folder.mkdir()
    good_clip(outside / "secret.mp4", seed=1)
    good_clip(root / "good.mp4", seed=2)
    good_clip(root / "sub" / "victim.mp4", seed=3)
    (root / "link.mp4").symlink_to(outside / "secret.mp4")
    (root / "links").symlink_to(outside)
    (root / "chain.mp4").symlink_to(root / "link.mp4")
    with watched(root, outside) as watch:
        places = {"outside": str(outside), "port": watch.port}
        entry = {"playlist": "list.mp4", "swap": "sub/victim.mp4"}.get(kind) or text.format(**places)
        if kind == "playlist":
            (root / "list.mp4").write_text(text.format(**places))
        write_table(root, [("good.mp4", "x"), (entry, "y")])
        swap = (lambda root: _swap(root, outside, int(text))) if kind == "swap" else None
        clips = _through_swapped(root, swap) if swap and int(text) % 2 else through(root, meanwhile=swap).clips
    if watch.opened or watch.connected:
        return Verdict.SILENT, f"opened {watch.opened}, reached {watch.connected}"
    if clips[0].state != "used" or clips[1].usable:
        return Verdict.SILENT, f"{clips[0].state}, {clips[1].state}"
    return Verdict.REFUSED, ""


def _through_swapped(root: Path, swap) -> tuple[Clip, ...]:
    """Swap between reading the list and the first look at clips."""
    manifest = read_manifest(root)
    swap(root)
    return manifest.map_usable(lambda clip: look_at(clip, SPEC)[0]).clips


def _swap(root: Path, outside: Path, number: int) -> None:
    """Put a link in the place of the clip, or of its folder."""
    if number // 2 % 2:
        (root / "sub").rename(root / "was")
        (outside / "victim.mp4").hardlink_to(outside / "secret.mp4")
        (root / "sub").symlink_to(outside)
    else:
        (root / "sub" / "victim.mp4").unlink()
        (root / "sub" / "victim.mp4").symlink_to(outside / "secret.mp4")


_FORMATS = (
    ("mp4", "libx264", "yuv420p"), ("mov", "libx264", "yuv444p"), ("mkv", "libx264", "yuv420p"),
    ("webm", "libvpx-vp9", "yuv420p"), ("avi", "mpeg4", "yuv420p"), ("ts", "libx264", "yuv420p"),
    ("mp4", "libx264", "yuv420p10le"), ("mkv", "ffv1", "bgr0"), ("m4v", "mpeg4", "yuv420p"),
)  # fmt: skip
_CAPTIONS = (
    "a red fox",
    "一只红狐狸",
    "ثعلب أحمر",
    'red\tfox, "quoted"',
    "🦊 in the snow",
    "e\u0301te\u0301",
    "a\u2028b",
    "1e-5",
)


def controls(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F27: good clips of many formats, sizes, rates and captions; none may be refused."""
    for number in range(count):
        draw = draws.generator(seed, "control", number)
        suffix, codec, pix_fmt = _FORMATS[number % len(_FORMATS)]
        height, width = (2 * int(n) for n in draw.integers(16, 80, 2))
        fps = int(draw.choice([8, 12, 15, 24, 25, 30, 60]))
        root = Path(mkdtemp(dir=work))
        name = f"{_CAPTIONS[number % 7][:4].strip()} {number}.{suffix}"
        make_video(
            root / name, pictures=moving(int(1.2 * fps) + 2, height, width, seed=number), height=height, width=width,
            fps=fps, codec=codec, pix_fmt=pix_fmt, time_base=Fraction(1, fps) if suffix == "mp4" else None,
        )  # fmt: skip
        caption = _CAPTIONS[number % len(_CAPTIONS)]
        write_table(root, [(name, caption)])
        ended = in_child(lambda root=root: [[c.state, c.reason, c.caption] for c in through(root).clips])
        state, reason, kept = ended.value[0] if ended.value else ("", ended.error, "")
        good = state in ("used", "trimmed", "retimed") and kept == caption
        verdict = ended.broke or (Verdict.OK if good else Verdict.REFUSED)
        yield Trial(
            family="F27", name=f"{number}: {suffix} {codec} {width}x{height} at {fps}", verdict=verdict,
            detail="" if good else f"{state} {reason} {kept!r}", is_control=True,
        )  # fmt: skip
