"""Drawn clips with captions, each of its own."""

from pathlib import Path

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.tiny.world import random_scene, render


def draw_clips(folder: Path, *, num_clips: int, num_frames: int, size: int) -> None:
    """Write `0.mp4`, `1.mp4`, … of `num_frames` x `size` x `size` at 8 fps, with captions beside them."""
    for index in range(num_clips):
        scene = random_scene(1, index)
        frames = render(scene, num_frames=num_frames, height=size, width=size, fps=8)
        export_to_video(frames, folder / f"{index}.mp4", fps=8)
        (folder / f"{index}.txt").write_text(f"{scene.caption}, clip {index}")
