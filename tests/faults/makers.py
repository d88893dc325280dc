"""Clips and data sets made on the spot: by PyAV, by bytes."""

from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from unittest.mock import patch

import av
import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.data import apart
from cogvideox_factory.data.timing import ClipSpec

STEP = 4
SPEC = ClipSpec(num_frames=9, height=64, width=64, fps=8)
"""What every clip of this package is brought to."""


def grey(number: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 20 + STEP * number, np.uint8)


def make_video(
    path: Path,
    num_frames: int = 12,
    *,
    height: int = 32,
    width: int = 48,
    fps: int = 8,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    pictures: list | None = None,
    pts: list[int] | None = None,
    time_base: Fraction | None = None,
    rotation: int | None = None,
    hflip: bool = False,
    aspect: Fraction | None = None,
    color_trc: int | None = None,
    options: dict | None = None,
    more: dict | None = None,
) -> Path:
    """Write a clip; without `pictures` each frame is a flat grey that tells its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        if codec == "libx264":
            stream.options = {"crf": "10", "preset": "ultrafast", "g": "6"} | (more or {})
        if time_base is not None:
            stream.codec_context.time_base = time_base
        if rotation is not None:
            stream.set_display_rotation(rotation, hflip=hflip)
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if color_trc is not None:
            stream.codec_context.color_trc = color_trc
        pictures = pictures or [grey(i, height, width) for i in range(num_frames)]
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
            frame.pts = pts[number] if pts else number
            frame.time_base = time_base or Fraction(1, fps)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def moving(num_frames: int, height: int = 64, width: int = 64, *, seed: int = 0) -> list[np.ndarray]:
    """Return noisy pictures that move, so that every part of the file counts."""
    noise = draws.generator(seed, "fault pictures").integers(40, 215, (height, width, 3), dtype=np.uint8)
    return [np.roll(noise, 3 * number, axis=1) for number in range(num_frames)]


def good_clip(path: Path, *, seed: int = 0, num_frames: int = 9) -> Path:
    """Write a clip that `SPEC` uses as it is."""
    return make_video(path, pictures=moving(num_frames, seed=seed), height=64, width=64)


def good_set(root: Path, count: int = 3, *, seed: int = 0) -> Path:
    """Write `count` good clips with captions beside them."""
    for number in range(count):
        good_clip(root / f"{number}.mp4", seed=1000 * seed + number)
        (root / f"{number}.txt").write_text(f"a clip with the number {number}\n")
    return root


def damaged(data: bytes, *, kind: str, rng: np.random.Generator) -> bytes:
    """Return `data` cut at a random byte, with random bits flipped, or with a block zeroed."""
    if kind == "cut":
        return data[: int(rng.integers(1, len(data)))]
    spoilt = bytearray(data)
    if kind == "flip":
        for place in rng.integers(0, len(data), int(rng.choice([1, 3, 10, 50]))):
            spoilt[place] ^= 1 << int(rng.integers(8))
    else:
        size = min(int(rng.choice([64, 512, 4096])), len(data) - 1)
        start = int(rng.integers(0, len(data) - size))
        spoilt[start : start + size] = bytes(size)
    return bytes(spoilt)


_SPOILT = """
import os, time, numpy
from cogvideox_factory.data import container, decoder, video
decoder.LEAST_SECONDS = 3
sound = container.decoder

def spoilt(stream):
    name = os.path.basename(stream.container.name)
    if name == "crash.mp4":
        os.kill(os.getpid(), 11)
    if name == "hang.mp4":
        time.sleep(600)
    if name == "greed.mp4":
        numpy.ones(1 << 34, numpy.uint8)
    return sound(stream)

container.decoder = video.decoder = spoilt
"""


@contextmanager
def spoilt_decoder() -> Iterator[None]:
    """Put a decoder into the processes `apart` that crashes, hangs or takes all memory for files of these names."""
    start, imported, main = apart.PROGRAM.partition("from ")
    program = f"{start}\n{_SPOILT}\n{imported}{main}"
    with patch.object(apart, "PROGRAM", program), patch.object(apart, "_pool", apart._Pool()):
        yield
        apart._pool.end()
