import json
import subprocess
import sys

import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.tiny.world import random_scene, render

SIZE = ("--data.num-frames", "9", "--data.height", "32", "--data.width", "32", "--data.fps", "8")


@pytest.fixture
def clips(tmp_path):
    folder = tmp_path / "clips"
    for index in range(5):
        export_to_video(
            render(random_scene(5, index), num_frames=9, height=32, width=32, fps=8), folder / f"{index}.mp4"
        )
        (folder / f"{index}.txt").write_text(f"clip {index}")
    return folder


def doctor(*words):
    return main(["doctor", *(str(word) for word in words)])


def test_counts_add_up_and_the_report_names_every_clip(clips, tmp_path, capsys):
    (clips / "3.mp4").write_bytes(b"no video")
    (clips / "4.txt").write_text("  ")
    assert doctor("--data.root", clips, *SIZE, "--json", tmp_path / "r.json", "--data.max-bad", "0.5") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["total"] == 5 == sum(report["counts"].values()) == len(report["clips"])
    assert [clip["reason"] is None for clip in report["clips"]] == [True, True, True, False, False]
    printed = capsys.readouterr().out
    assert "3.mp4" in printed
    assert "total" in printed


def test_strict_turns_a_loss_into_exit_code_3(clips, capsys):
    assert doctor("--data.root", clips, *SIZE, "--data.strict", "True") == 0
    (clips / "3.mp4").write_bytes(b"no video")
    assert doctor("--data.root", clips, *SIZE, "--data.strict", "True") == 3
    assert "strict allows no loss" in capsys.readouterr().err


def test_a_model_says_the_size(clips, tiny_model):
    assert doctor("--data.root", clips, "--model.path", tiny_model("cogvideox-5b"), "--data.fps", "8") == 0


def test_a_published_model_is_not_downloaded_for_a_look(clips, tmp_path):
    words = ("--data.root", clips, "--model.path", "THUDM/CogVideoX-5b", "--json", tmp_path / "r.json")
    assert doctor(*words) == 3  # 9 frames are too short for 49
    assert json.loads((tmp_path / "r.json").read_text())["counts"] == {"too_short": 5}


@pytest.mark.parametrize(("words", "law"), [((), "--data.root"), (("--data.root", "."), "to what size")])
def test_what_is_missing_is_said(words, law, capsys):
    assert doctor(*words) == 2
    assert law in capsys.readouterr().err


def test_no_framework_is_loaded(clips):
    code = f"import sys; from cogvideox_factory.cli import main; main({['doctor', '--data.root', str(clips), *SIZE]})"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip().endswith("False")
