"""Clips made on the spot: each frame is a flat grey that tells its number."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cogvideox_factory.data.container import VideoInfo

STEP = 4


def grey(number: int, height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 20 + STEP * number, np.uint8)


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Read back which source frame each frame of a clip is."""
    return [round((float(frame.mean()) - 20) / STEP) for frame in pixels]


@pytest.fixture(scope="session")
def numbers():
    return frame_numbers


@pytest.fixture(scope="session")
def make_video():
    def make(
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
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w", options=options or {}) as container:
            stream = container.add_stream(codec, rate=fps)
            stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
            if codec == "libx264":
                stream.options = {"crf": "10", "preset": "ultrafast", "g": "6"}
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

    return make


@pytest.fixture
def dataset(tmp_path, make_video):
    """Three good clips in two lists."""
    root = tmp_path / "set"
    for number in range(3):
        make_video(root / f"videos/{number}.mp4", 9, pictures=[grey(i + 3 * number, 32, 48) for i in range(9)])
    (root / "prompts.txt").write_text("a first clip\na second clip\na third clip\n")
    (root / "videos.txt").write_text("videos/0.mp4\nvideos/1.mp4\nvideos/2.mp4\n")
    return root


@pytest.fixture(scope="session")
def source():
    """Make the description of a source whose frames appear at `times` (seconds)."""

    def make(times, tick: float = 1e-4, *, last: float | None = None) -> VideoInfo:
        times = np.asarray(times, dtype=np.float64)
        gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.125
        return VideoInfo(
            path=Path("x.mp4"), codec="h264", pixel_format="yuv420p", width=48, height=32, fps=1 / gap,
            num_frames=len(times), duration_seconds=float(times[-1]) + (last or gap), rotation=0, mirrored=False,
            sample_aspect_ratio=1.0, bit_depth=8, has_alpha=False, interlaced=False, variable_rate=False, times=times,
            tick_seconds=tick, pts=None,
        )  # fmt: skip

    return make
