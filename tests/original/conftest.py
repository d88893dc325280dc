"""Drawn clips with the two lists of old, once a session."""

from pathlib import Path

import pytest

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.tiny.world import random_scene, render


@pytest.fixture(scope="session")
def old_clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old-clips")
    (folder / "videos").mkdir()
    scenes = [random_scene(3, index) for index in range(4)]
    for index, scene in enumerate(scenes):
        frames = render(scene, num_frames=16, height=48, width=80, fps=8)
        export_to_video(frames, folder / "videos" / f"{index}.mp4", fps=8)
    (folder / "prompt.txt").write_text("".join(f"{scene.caption}\n" for scene in scenes))
    (folder / "videos.txt").write_text("".join(f"videos/{index}.mp4\n" for index in range(4)))
    return folder
