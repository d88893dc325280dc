import json
import shutil
import subprocess
import sys

import numpy as np
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
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


@pytest.mark.parametrize("flag", ["--strict", "--data.strict"])
def test_strict_lets_no_caption_be_cut(clips, capsys, flag):
    next(clips.glob("*.txt")).write_text("a large red circle " * 20)
    assert doctor("--data.root", clips, "--model.path", "tiny-t2v") == 0
    assert doctor("--data.root", clips, "--model.path", "tiny-t2v", flag, "True") == 3
    assert "1 captions are longer than 24 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--strict", "--data.strict"])
def test_strict_turns_a_loss_into_exit_code_3(clips, capsys, flag):
    assert doctor("--data.root", clips, *SIZE, flag, "True") == 0
    (clips / "3.mp4").write_bytes(b"no video")
    assert doctor("--data.root", clips, *SIZE) == 0
    assert doctor("--data.root", clips, *SIZE, flag, "True") == 3
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


def test_the_report_tells_what_the_clips_are_like(clips, tmp_path, capsys, tiny_model):
    export_to_video(render(random_scene(5, 0), num_frames=9, height=32, width=32, fps=8), clips / "copy.mp4")
    (clips / "copy.txt").write_text("clip " * 40)
    (clips / "1.txt").write_text("clip\x02 0")
    words = ("--data.root", clips, "--model.path", tiny_model("cogvideox-2b"), *SIZE)
    assert doctor(*words, "--json", tmp_path / "r.json", "--html", tmp_path / "r.html") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report)[:4] == ["source", "total", "counts", "clips"]
    assert report["same_bytes"] == [[1, 6]]
    assert report["captions"]["max_tokens"] == 16
    assert list(report["captions"]["too_long"]) == ["6"]
    assert report["captions"]["replaced"] == {"2": 1}
    assert {"motion", "black_frames", "scene_cuts", "tokens"} <= set(report["clips"][0])
    assert report["statistics"]["motion"]["clips"] == 6
    assert report["skipped"] == []
    printed = capsys.readouterr().out
    for word in ("same bytes, other caption", "tokens beyond 16", "motion, widths/s", "32x32 (6)"):
        assert word in printed, word
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg") == 6


def test_buckets_are_counted_on_the_terminal_in_the_report_and_on_the_page(clips, tmp_path, capsys):
    for name, (num_frames, width) in {"wide": (9, 64), "wide again": (9, 64), "short": (3, 32)}.items():
        frames = render(random_scene(5, 9), num_frames=num_frames, height=32, width=width, fps=8)
        export_to_video(frames, clips / f"{name}.mp4")
        (clips / f"{name}.txt").write_text(name)
    files = ("--json", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert doctor("--data.root", clips, *SIZE, "--data.buckets", "auto", *files) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["buckets"] == {"9x32x32": 5, "9x16x48": 2}
    assert report["counts"] == {"used": 7, "no_bucket": 1}
    assert [clip.get("bucket") for clip in report["clips"]] == [*["9x32x32"] * 5, None, *["9x16x48"] * 2]
    printed = capsys.readouterr().out
    table = printed[printed.index("bucket (frames x height x width)") :].splitlines()
    assert [line.replace("│", " ").split() for line in table[2:4]] == [["9x32x32", "5"], ["9x16x48", "2"]]
    assert "9x16x48" in (tmp_path / "r.html").read_text()
    assert doctor("--data.root", clips, *SIZE, "--json", tmp_path / "r.json") == 0
    assert json.loads((tmp_path / "r.json").read_text())["buckets"] == {}


def test_a_caption_that_is_not_utf8_is_told_apart(clips, tmp_path, capsys):
    (clips / "1.txt").write_bytes("café".encode("latin-1"))
    (clips / "2.txt").write_bytes("café".encode("utf-16"))
    words = ("--data.root", clips, *SIZE, "--json", tmp_path / "r.json", "--data.max-bad", "0.5")
    assert doctor(*words) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["captions"]["not_utf8"] == [2, 3]
    assert [clip["reason"] for clip in report["clips"]] == [None, "text.encoding", "text.encoding", None, None]
    assert "byte 3 (line 1) is 0xe9" in report["clips"][1]["detail"]
    assert "captions: not UTF-8: 2 clips (rows 2, 3)" in capsys.readouterr().out


def damage_inside(path):
    """Zero a stretch of the pixels of a clip whose header and index stay good."""
    noise = np.random.default_rng(0).integers(0, 255, (9, 32, 32, 3), dtype=np.uint8)
    data = bytearray(export_to_video(noise, path).read_bytes())
    data[len(data) // 2 : len(data) // 2 + 600] = bytes(600)
    path.write_bytes(data)


def test_quick_decodes_nothing_and_says_so(clips, tmp_path, capsys):
    damage_inside(clips / "3.mp4")
    words = ("--data.root", clips, *SIZE, "--json", tmp_path / "r.json")
    assert doctor(*words, "--quick", "True", "--html", tmp_path / "r.html") == 0
    assert json.loads((tmp_path / "r.json").read_text())["counts"] == {"used": 5}
    assert "--quick" in capsys.readouterr().out
    assert doctor(*words, "--data.max-bad", "0.5") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"used": 4, "corrupt": 1}
    assert report["clips"][3]["reason"] == "video.corrupt"


def test_the_clean_list_gives_only_usable_clips(clips, tmp_path, capsys):
    damage_inside(clips / "3.mp4")
    (clips / "4.txt").write_text("  ")
    shutil.copy(clips / "0.mp4", clips / "9.mp4")
    shutil.copy(clips / "0.txt", clips / "9.txt")
    before = {path: path.read_bytes() for path in clips.iterdir()}
    words = ("--data.root", clips, *SIZE, "--data.trigger-word", "sks", "--json", tmp_path / "r.json")
    assert doctor(*words, "--fix", clips / "clean.jsonl") == 3  # three of six lost is too much, but mended
    assert f"--data.root {clips} --data.table clean.jsonl" in capsys.readouterr().out
    assert doctor(*words, "--data.table", "clean.jsonl", "--data.strict", "True") == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"used": 3}
    assert [clip["caption"] for clip in report["clips"]] == ["sks clip 0", "sks clip 1", "sks clip 2"]
    assert {path: path.read_bytes() for path in before} == before
    assert doctor(*words, "--fix", clips / "clean.jsonl") == 6
    assert doctor(*words, "--fix", clips / "clean.csv") == 2


def test_nothing_usable_leaves_no_clean_list(clips, tmp_path, capsys):
    for text in clips.glob("*.txt"):
        text.unlink()
    assert doctor("--data.root", clips, *SIZE, "--fix", tmp_path / "clean.jsonl") == 3
    assert "not written" in capsys.readouterr().out
    assert not (tmp_path / "clean.jsonl").exists()


def test_a_hub_folder_of_pictures(tmp_path, capsys):
    for index in range(3):
        frame = render(random_scene(5, index), num_frames=1, height=48, width=64, fps=8)[0]
        write_png(tmp_path / f"{index}.png", frame)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.png,a\n1.png,b\n2.png,c\n")
    words = ("--data.root", tmp_path, "--model.path", "tiny-t2v", "--data.num-frames", "1")
    files = ("--html", tmp_path / "r.html", "--json", tmp_path / "r.json", "--fix", tmp_path / "clean.jsonl")
    assert doctor(*words, *files) == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["counts"] == {"used": 3}
    assert not {"motion", "duration", "fps"} & set(report["statistics"])
    assert "'file_name'" in capsys.readouterr().out
    assert (tmp_path / "r.html").read_text().count("data:image/jpeg") == 3
    assert doctor(*words, "--data.table", "clean.jsonl", "--data.strict", "True") == 0
    assert doctor("--data.root", tmp_path, *SIZE, "--json", tmp_path / "r.json") == 3
    assert json.loads((tmp_path / "r.json").read_text())["counts"] == {"too_short": 3}
