"""Clips made on the spot: each frame is a flat grey that tells its number."""

from pathlib import Path

import numpy as np
import pytest

from cogvideox_factory.data.video_info import VideoInfo
from tests.faults import makers
from tests.faults.makers import STEP, grey


def frame_numbers(pixels: np.ndarray) -> list[int]:
    """Read back which source frame each frame of a clip is."""
    return [round((float(frame.mean()) - 20) / STEP) for frame in pixels]


@pytest.fixture(scope="session")
def numbers():
    return frame_numbers


@pytest.fixture(scope="session")
def make_video():
    return makers.make_video


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
