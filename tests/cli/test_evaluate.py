import json
from pathlib import Path

import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.tiny.world import random_scene, render

SCENES = [random_scene(4, index, num_things=1) for index in range(3)]
FRAMES = [render(scene, num_frames=9, height=64, width=64, fps=8) for scene in SCENES]


@pytest.fixture
def videos(tmp_path) -> Path:
    """Three clips with the sidecar that `generate` leaves."""
    folder = tmp_path / "videos"
    for index, (scene, frames) in enumerate(zip(SCENES, FRAMES)):
        export_to_video(frames, folder / f"{index}.mp4", fps=8)
        (folder / f"{index}.json").write_text(json.dumps({"prompt": scene.caption, "image": None}))
    return folder


def evaluate(*words: object) -> int:
    return main(["evaluate", *(str(word) for word in words)])


def test_a_folder_is_measured_and_judged(videos, tmp_path, capsys):
    report_path = tmp_path / "report.json"
    assert evaluate(videos, "--judge", "tiny", "--reference", videos, "--json", report_path) == 0
    report = json.loads(report_path.read_text())
    assert (report["num_videos"], report["num_failed"]) == (3, 0)
    assert set(report["mean"]) == {"sharpness", "flicker", "consistency", "motion"}
    assert report["judge"] == {
        "name": "tiny", "colour": 1.0, "shape": 1.0, "motion": 1.0, "background": 1.0, "size": 1.0, "count": 1.0,
    }  # fmt: skip
    assert report["reference"] == {"num_videos": 3, "similarity": 1.0}
    assert [row["prompt"] for row in report["videos"]] == [scene.caption for scene in SCENES]
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("0.mp4", "sharpness", "colour", "100%", "1.000"))


@pytest.mark.parametrize("form", ["lines", "json"])
def test_prompts_may_stand_in_one_file(videos, tmp_path, form):
    captions = [scene.caption for scene in SCENES]
    captions[1] = "a large sks star bounces on a white background"
    file = tmp_path / ("prompts.txt" if form == "lines" else "prompts.json")
    named = {f"{index}.mp4": caption for index, caption in enumerate(captions)}
    file.write_text("\n".join(captions) + "\n" if form == "lines" else json.dumps(named))
    assert evaluate(videos, "--prompts", file, "--judge", "tiny", "--json", tmp_path / "r.json") == 0
    verdicts = [row["verdict"] for row in json.loads((tmp_path / "r.json").read_text())["videos"]]
    assert [verdict["colour"] for verdict in verdicts] == [True, False, True]


def test_the_first_frame_is_compared_with_its_picture(videos, tmp_path):
    for index, frames in enumerate(FRAMES):
        write_png(tmp_path / "images" / f"{index}.png", frames[0])
    assert evaluate(videos, "--image", tmp_path / "images", "--json", tmp_path / "r.json") == 0
    mean = json.loads((tmp_path / "r.json").read_text())["mean"]
    assert mean["first_frame_psnr"] > 30
    assert mean["first_frame_ssim"] > 0.95


def test_a_broken_video_is_named_and_stops_no_other(videos, tmp_path, capsys):
    (videos / "1.mp4").write_bytes(b"no video")
    assert evaluate(videos, "--judge", "tiny", "--json", tmp_path / "r.json") == 3
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["num_failed"], report["judge"]["colour"]) == (1, 1.0)
    assert "1 of 3" in (said := capsys.readouterr().err)
    assert "1.mp4" in said


def fault(videos: Path, name: str) -> tuple[list[object], int, str]:
    """Return (words, exit code, what the message holds) of one wrong request."""
    file = videos.parent / "prompts.txt"
    match name:
        case "no folder":
            return [videos / "nowhere"], 2, "does not exist"
        case "a file":
            return [videos / "0.mp4"], 2, "is a file"
        case "no videos":
            (videos / "empty").mkdir()
            return [videos / "empty"], 3, "holds no video"
        case "fewer prompts":
            file.write_text("one\ntwo\n")
            return [videos, "--prompts", file], 3, "2 line(s)"
        case "an empty prompt":
            file.write_text("one\n\nthree\n")
            return [videos, "--prompts", file], 3, "empty: line 2"
        case "other names":
            file = file.with_suffix(".json")
            file.write_text(json.dumps({"0.mp4": "x", "7.mp4": "y", "1.mp4": 3}))
            return [videos, "--prompts", file], 3, "no prompt for 2.mp4; no video 7.mp4; 1.mp4 has no text"
        case "broken json":
            (videos / "0.json").write_text("{")
            return [videos], 3, "0.json is no JSON"
        case "no prompts file":
            return [videos, "--prompts", file], 2, "does not exist"
        case "foreign prompts":
            file.write_text("a fox\na bear\na wolf\n")
            return [videos, "--prompts", file, "--judge", "tiny"], 3, "2.mp4: 'a wolf'"
        case "no prompt for the judge":
            (videos / "1.json").unlink()
            return [videos, "--judge", "tiny"], 3, "1.mp4 has no prompt"
        case "no picture":
            return [videos, "--image", videos / "x.png"], 2, "x.png does not exist"
        case "no reference":
            return [videos, "--reference", videos / "nowhere"], 2, "nowhere does not exist"
    raise AssertionError(name)


@pytest.mark.parametrize(
    "name",
    [
        "no folder", "a file", "no videos", "fewer prompts", "an empty prompt", "other names", "broken json",
        "no prompts file", "foreign prompts", "no prompt for the judge", "no picture", "no reference",
    ],
)  # fmt: skip
def test_wrong_input_is_refused_with_a_clear_message(videos, capsys, name):
    words, code, message = fault(videos, name)
    assert evaluate(*words) == code
    assert message in capsys.readouterr().err


def test_an_unknown_judge_is_refused(videos, capsys):
    with pytest.raises(SystemExit) as stop:
        evaluate(videos, "--judge", "tall")
    assert stop.value.code == 2
