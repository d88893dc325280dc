"""Drawn clips of the tiny world on disk, with their captions."""

import os
from collections.abc import Iterable
from pathlib import Path

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.tiny.world import random_scene, render

Shape = tuple[int, int, int]
"""Frames, height, width."""


def draw_clips(folder: Path, shapes: Iterable[Shape], *, seed: int = 1) -> Path:
    """Write `0.mp4`, `1.mp4`, … of these shapes at 8 fps, each with its caption beside it; return the folder."""
    for index, (num_frames, height, width) in enumerate(shapes):
        scene = random_scene(seed, index)
        frames = render(scene, num_frames=num_frames, height=height, width=width, fps=8)
        export_to_video(frames, folder / f"{index}.mp4", fps=8)
        (folder / f"{index}.txt").write_text(scene.caption)
    return folder


def draw_lists(folder: Path, shapes: Iterable[Shape], *, seed: int, prompts: str) -> Path:
    """Write clips into `videos/`, and the two lists `prompts` and `videos.txt`; return the folder."""
    videos = draw_clips(folder / "videos", shapes, seed=seed)
    captions = sorted(videos.glob("*.txt"))
    (folder / prompts).write_text("".join(f"{file.read_text()}\n" for file in captions))
    (folder / "videos.txt").write_text("".join(f"videos/{file.stem}.mp4\n" for file in captions))
    for file in captions:
        file.unlink()
    return folder


def real_lists() -> Path | None:
    """Return the folder of real clips that COGVIDEOX_REAL_CLIPS names, if it has the two lists of old."""
    real = Path(os.environ.get("COGVIDEOX_REAL_CLIPS", ""))
    return real if (real / "prompt.txt").is_file() and (real / "videos.txt").is_file() else None
