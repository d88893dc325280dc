from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest

from cogvideox_factory.data import scenes as scenes_module
from cogvideox_factory.data.container import probe
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.scenes import find_scenes
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.windows import Windows
from cogvideox_factory.tiny.world import random_scene, render

pytest.importorskip("scenedetect", reason="PySceneDetect is not installed (the extra `scenes`)")
SPEC = ClipSpec(num_frames=9, height=64, width=96, fps=8)


def drawn(*lengths, first=0) -> list[np.ndarray]:
    """Scenes of the world of moving shapes, one after another."""
    return [
        frame
        for index, length in enumerate(lengths, first)
        for frame in render(random_scene(5, index), num_frames=length, height=64, width=96, fps=8)
    ]


@pytest.mark.parametrize("rotation", [None, 90])
@pytest.mark.parametrize("suffix", [".mp4", ".avi", ".mkv"])
def test_cuts_are_found_at_their_frames_and_nowhere_else(tmp_path, make_video, suffix, rotation):
    if rotation and suffix != ".mp4":
        pytest.skip("only MP4 keeps a turn")
    path = make_video(tmp_path / f"a{suffix}", pictures=drawn(20, 7, 30), height=64, width=96, rotation=rotation)
    assert find_scenes(probe(path)) == [(0, 20), (20, 27), (27, 57)]


def test_most_pairs_of_drawn_scenes_are_told_apart_and_no_cut_is_made_up(tmp_path, make_video):
    found = 0
    pairs = list(combinations(range(6), 2))
    for one, other in pairs:
        pictures = drawn(12, first=one) + drawn(12, first=other)
        scenes = find_scenes(probe(make_video(tmp_path / f"{one}{other}.mp4", pictures=pictures, height=64, width=96)))
        assert scenes in ([(0, 12), (12, 24)], [(0, 24)])
        found += len(scenes) == 2
    assert found >= 12  # of 15: some scenes have nearly the same background


def test_windows_stay_in_their_scene_and_what_gives_none_is_counted(tmp_path, make_video):
    make_video(tmp_path / "a.mp4", pictures=drawn(20, 7, 30), height=64, width=96)
    (tmp_path / "a.txt").write_text("three scenes")
    manifest = survey(read_manifest(tmp_path), SPEC, windows=Windows(policy="scenes"))
    assert [clip.facts["frames"] for clip in manifest.usable] == ["0:8:1", "9:17:1", "27:35:1", "36:44:1", "45:53:1"]
    assert manifest.about_windows()[1] == "3 scenes, 1 of them too short for a clip or fit for no bucket"
    slow = replace(SPEC, short_policy="slow")
    windows = [clip.window for clip in survey(read_manifest(tmp_path), slow, windows=Windows(policy="scenes")).usable]
    assert windows == ["", "@9", "@20-27", "@27", "@36", "@45"]


def test_a_source_is_looked_at_once_while_it_does_not_change(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "a.mp4", pictures=drawn(12, 12), height=64, width=96)
    first = find_scenes(probe(path))
    monkeypatch.setattr(scenes_module, "decode_frames", lambda *_: pytest.fail("decoded again"))
    assert find_scenes(probe(path)) == first


def test_damage_is_said_as_everywhere(tmp_path, make_video):
    noise = np.random.default_rng(0).integers(0, 255, (24, 64, 96, 3), dtype=np.uint8)
    path = make_video(tmp_path / "a.mkv", pictures=list(noise), height=64, width=96)
    info = probe(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ClipError, match=r"video\.corrupt"):
        find_scenes(info)
