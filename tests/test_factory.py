"""The commands as a user types them, on real clips where they are at hand and on drawn ones everywhere."""

import io
import json
import os
import shlex
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path

import av
import numpy as np
import pytest

from cogvideox_factory.cli import COMMANDS, main
from cogvideox_factory.cli.demo import own_commands
from cogvideox_factory.cli.settings import parse
from cogvideox_factory.config import Config
from cogvideox_factory.data.picture import write_png
from tests.browser import shown
from tests.clips import draw_lists

ROOT = Path(__file__).parents[1]
REAL_CLIPS = os.environ.get("COGVIDEOX_REAL_CLIPS", "")
VARIANT = {"t2v": "cogvideox1.5-5b", "i2v": "cogvideox1.5-5b-i2v"}
PROMPT = "a hiker on a mountain"
# Adapters on attention alone can do little with a random model, so the test trains them on every linear layer.
EVERYWHERE = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_out"]


def run(*words: object) -> int:
    return main([str(word) for word in words])


@pytest.fixture(scope="module")
def drawn_clips(tmp_path_factory) -> Path:
    return draw_lists(tmp_path_factory.mktemp("drawn"), [(20, 48, 80)] * 5, seed=2, prompts="prompts.txt")


@pytest.fixture(params=["drawn", "real"])
def clips(request, drawn_clips) -> Path:
    if request.param == "drawn":
        return drawn_clips
    if not Path(REAL_CLIPS, "videos.txt").is_file():
        pytest.skip("COGVIDEOX_REAL_CLIPS names no folder of real clips")
    return Path(REAL_CLIPS)


def read(path: Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)]), float(stream.average_rate)


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("task", ["t2v", "i2v"])
def test_clips_become_a_model_and_the_model_makes_video(tiny_model, tmp_path, capsys, clips, task, method):
    model = [
        "--task",
        task,
        "--model.path",
        tiny_model(VARIANT[task]),
        "--run.device",
        "cpu",
        "--run.dtype",
        "float32",
    ]
    data = [
        "--data.root",
        clips,
        "--data.fps",
        "8",
        "--data.num-frames",
        "9",
        "--cache.dir",
        tmp_path / "cache",
    ]
    assert run("prepare", *model, *data) == 0
    assert f"{6 if clips == Path(REAL_CLIPS) else 5} clips: " in capsys.readouterr().out
    training = [
        "--train.dir", tmp_path / "run", "--train.method", method, "--train.steps", "150", "--train.batch-size", "2",
        "--train.learning-rate", "5e-3", "--train.log-every", "10", "--train.checkpointing", "none",
        "--train.schedule", "cosine", "--train.warmup-steps", "5",
    ]  # fmt: skip
    if method == "lora":
        training += ["--lora.rank", "32", "--lora.alpha", "32", "--lora.target-modules", *EVERYWHERE]
    assert run("train", *model, *data, *training) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    first, last = rows[1]["loss"], np.mean([row["loss"] for row in rows[-4:]])
    assert last <= 0.7 * first, f"overfitting: {first:.3f} -> {last:.3f}"

    image = write_png(tmp_path / "first.png", np.full((64, 96, 3), 200, np.uint8))
    ask = ["--generate.prompt", PROMPT, "--generate.out", tmp_path / "out.mp4", "--sampling.steps", "3"]
    ask += ["--generate.num-frames", "9", "--generate.fps", "8"]
    ask += ["--generate.image", image] if task == "i2v" else []
    trained = ["--generate.lora", tmp_path / "run"] if method == "lora" else ["--model.transformer", tmp_path / "run"]
    assert run("generate", *model, *ask, *trained) == 0
    frames, fps = read(tmp_path / "out.mp4")
    assert frames.shape == (9, 64, 96, 3)
    assert fps == 8
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["prompt"] == PROMPT
    written = (tmp_path / "out.mp4").stat().st_mtime_ns
    assert run("generate", *model, *ask, *trained) == 0, "it is there already"
    assert run("generate", *model, *ask, *trained, "--run.seed", "7") == 6, "another is not overwritten"
    assert (tmp_path / "out.mp4").stat().st_mtime_ns == written
    again = ["--generate.prompt", PROMPT, "--generate.out", tmp_path / "two.mp4", "--sampling.steps", "2"]
    again += ["--generate.image", image] if task == "i2v" else []
    assert run("generate", tmp_path / "run", *again) == 0, "a run folder says model, size and what was learned"
    assert read(tmp_path / "two.mp4")[0].shape == (9, 64, 96, 3)


def test_prepare_again_makes_only_what_is_missing(tiny_model, tmp_path, drawn_clips, capsys):
    model = [
        "--model.path",
        tiny_model("cogvideox-2b"),
        "--run.device",
        "cpu",
        "--cache.dir",
        tmp_path / "cache",
    ]
    data = ["--data.root", drawn_clips, "--data.fps", "8", "--data.num-frames", "9"]
    assert run("prepare", *model, *data) == 0
    first = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert len(first) == 5 + 6, "a clip each, a caption each, and the empty caption"
    assert run("prepare", *model, *data) == 0
    assert "0 to encode; 0 captions to encode" in capsys.readouterr().out
    next((tmp_path / "cache" / "clips").rglob("*.safetensors")).unlink()
    assert run("prepare", *model, *data, "--data.height", "32") == 0
    assert "5 to encode; 0 captions to encode" in capsys.readouterr().out, "captions outlive a change of size"
    assert run("prepare", *model, *data) == 0
    assert "1 to encode; 0 captions to encode" in capsys.readouterr().out, "both sizes live side by side"
    second = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.safetensors")}
    assert sum(second.get(path) == stamp for path, stamp in first.items()) == len(first) - 1


def test_a_damaged_clip_is_named_and_the_others_go_on(tiny_model, tmp_path, drawn_clips, capsys):
    data = tmp_path / "data"
    data.mkdir()
    for index in range(4):
        source = (drawn_clips / "videos" / f"{index}.mp4").read_bytes()
        (data / f"{index}.mp4").write_bytes(source[: len(source) // 2] if index == 2 else source)
        (data / f"{index}.txt").write_text(f"clip {index}")
    words = ["--model.path", tiny_model("cogvideox-2b"), "--run.device", "cpu", "--data.root", data]
    words += ["--data.num-frames", "9", "--cache.dir", tmp_path / "cache"]
    assert run("prepare", *words) == 0
    out = capsys.readouterr().out
    assert "2.mp4" in out
    assert "video.truncated" in out
    assert run("prepare", *words, "--data.strict", "True") == 3


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["trane"], 2, "did you mean 'train'"),
        (["train", "nowhere.yaml"], 2, "no such recipe"),
        (["train", "--task", "t2v", "stray"], None, ""),
        (["generate", "--train.steps", "4"], None, ""),
        (["train"], 2, "train on what"),
        (["train", "--cache.dir", "CACHE"], 2, "which model"),
        (["train", "--cache.dir", "CACHE", "--model.path", "/nowhere/at/all"], 4, "/nowhere/at/all"),
        (["generate", "--model.path", "MODEL"], 2, "no prompt"),
        (["train", "--cache.dir", "CACHE", "--model.path", "MODEL", "--task", "i2v"], 2, "which is a model for t2v"),
        (["prepare", "--model.path", "MODEL", "--cache.dir", "CACHE"], 2, "which clips"),
        (
            ["prepare", "--model.path", "MODEL", "--cache.dir", "CACHE", "--data.root", "/nowhere"],
            3,
            "/nowhere",
        ),
        (["prepare", "--model.path", "MODEL", "--data.root", "CLIPS"], 2, "--cache.dir"),
        (["train", "--model.path", "MODEL", "--cache.dir", "CACHE"], 5, "is no finished cache"),
        (
            ["generate", "--model.path", "MODEL", "--generate.prompt", "x", "--generate.lora", "/nowhere"],
            2,
            "no LoRA",
        ),
        (
            ["generate", "--model.path", "MODEL", "--generate.prompt", "x", "--run.device", "cuda:7"],
            4,
            "cuda:7",
        ),
        (
            ["generate", "--model.path", "MODEL", "--generate.prompt", "x", "--generate.width", "100"],
            2,
            "64x96",
        ),
    ],
)
def test_wrong_words_get_one_clear_line(tiny_model, tmp_path, drawn_clips, capsys, words, code, says):
    names = {"MODEL": tiny_model("cogvideox-2b"), "CACHE": tmp_path / "cache", "CLIPS": drawn_clips}
    words = [str(names.get(word, word)) for word in words]
    if code is None:
        with pytest.raises(SystemExit) as left:
            main(words)
        assert left.value.code == 2
        return
    assert main(words) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error


def test_caption_list_one_line_short_is_refused_before_any_decoding(tiny_model, tmp_path, drawn_clips, capsys):
    (tmp_path / "videos").symlink_to(drawn_clips / "videos")
    (tmp_path / "videos.txt").write_text((drawn_clips / "videos.txt").read_text())
    (tmp_path / "prompts.txt").write_text("".join((drawn_clips / "prompts.txt").read_text().splitlines(True)[:-1]))
    words = [
        "--model.path",
        tiny_model("cogvideox-2b"),
        "--data.root",
        tmp_path,
        "--cache.dir",
        tmp_path / "cache",
    ]
    assert run("prepare", *words) == 3
    error = capsys.readouterr().err
    assert "4" in error
    assert "5" in error
    assert not (tmp_path / "cache").exists()


def test_a_lora_of_other_dimensions_is_refused_before_the_model_loads(tiny_model, tmp_path, monkeypatch, capsys):
    from cogvideox_factory.lora_files import save_lora
    from cogvideox_factory.torch_engine import pipeline

    arrays = {
        "transformer_blocks.0.attn1.to_q.lora_A.weight": np.zeros((4, 999), np.float32),
        "transformer_blocks.0.attn1.to_q.lora_B.weight": np.zeros((128, 4), np.float32),
    }
    save_lora(tmp_path / "other.safetensors", arrays, rank=4, alpha=4, target_modules=["to_q"])
    monkeypatch.setattr(pipeline.CogVideoXPipeline, "from_pretrained", lambda *a, **k: pytest.fail("model was loaded"))
    words = ["--generate.prompt", "x", "--generate.lora", tmp_path / "other.safetensors"]
    assert run("generate", "--model.path", tiny_model("cogvideox-2b"), "--generate.out", tmp_path / "o", *words) == 5
    assert "transformer_blocks.0.attn1.to_q" in capsys.readouterr().err


def test_no_room_is_said_before_anything_is_made(tiny_model, tmp_path, drawn_clips, monkeypatch, capsys):
    import shutil
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(100, 100, 100))
    words = ["--model.path", tiny_model("cogvideox-2b"), "--data.root", drawn_clips, "--data.num-frames", "9"]
    assert run("prepare", *words, "--cache.dir", tmp_path / "cache") == 6
    assert "GiB are free" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


@pytest.fixture(scope="module", params=["t2v", "i2v"])
def demonstrated(request, tmp_path_factory):
    """Return a small demo's task, folder and what it printed."""
    out, printed = tmp_path_factory.mktemp("demo") / request.param, io.StringIO()
    few = ("--num-clips", "8", "--num-reminders", "4", "--steps", "4", "--num-prompts", "2")
    with redirect_stdout(printed):
        assert run("demo", "--out", out, "--task", request.param, *few) == 0
    return request.param, out, printed.getvalue()


def test_demo_makes_everything_it_names(demonstrated):
    task, out, printed = demonstrated
    made = ("recipe.yaml", "scores.json", "index.html", "strip.png", "run/final/pytorch_lora_weights.safetensors")
    for name in made:
        assert (out / name).is_file(), name
    scores = json.loads((out / "scores.json").read_text())
    assert {when: set(shares) for when, shares in scores.items()} == {
        "before": {"concept", "known"}, "after": {"concept", "known"},
    }  # fmt: skip
    assert str(out / "index.html") in printed
    assert (out / "index.html").read_text().count("<video") == 2 * 4 + 6
    assert run("demo", "--out", out, "--task", task) == 2


@pytest.mark.parametrize("task", ["t2v", "i2v"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_commands_it_gives_for_own_clips_are_understood(task, method):
    """Parsed as they stand but for the run folder that the fourth of them would make."""
    for _, command in own_commands(task, method):
        program, name, *words = shlex.split(command)
        assert (program, name in COMMANDS) == ("cogvideox", True)
        if words[0].startswith("recipes/"):
            config = parse(
                name, [str(ROOT / words[0]), *words[1:]], sections=tuple(Config.model_fields), description=""
            )
            assert (config.task, config.train.method) == (task, method)


def test_a_browser_shows_its_page_without_a_complaint(demonstrated, tmp_path):
    _, out, _ = demonstrated
    dom, complaints = shown(out / "index.html", tmp_path / "profile")
    assert complaints == []
    assert dom.count("<video") == 2 * 4 + 6
    assert "https://" not in dom.partition("<body")[2].replace("https://www.w3.org", ""), "it fetches nothing"


@pytest.mark.parametrize("words", [("--steps", "0"), ("--num-clips", "2"), ("--concept", "unicorn"), ("--stpes", "5")])
def test_demo_refuses_what_makes_no_sense(tmp_path, words):
    with pytest.raises(SystemExit) as stop:
        run("demo", "--out", tmp_path / "demo", *words)
    assert stop.value.code == 2
    assert not (tmp_path / "demo").exists()


def test_python_interface_of_the_readme(tiny_model, tmp_path):
    from cogvideox_factory import CogVideoXPipeline, export_to_video

    pipe = CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-5b"), device="cpu")
    video = pipe("a red fox", num_inference_steps=2)[0][0]
    export_to_video(video, tmp_path / "fox.mp4", fps=8)
    assert read(tmp_path / "fox.mp4")[0].shape == (9, 64, 96, 3)


def test_help_of_every_command_teaches():
    for command in ("demo", "doctor", "prepare", "train", "sweep", "generate", "evaluate", "train-vae"):
        done = subprocess.run(
            [sys.executable, "-m", "cogvideox_factory", command, "--help"],
            capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
        assert "(default:" in done.stdout, command
    listing = subprocess.run(
        [sys.executable, "-m", "cogvideox_factory"], capture_output=True, text=True, timeout=60, check=False
    )
    assert listing.returncode == 2
    assert "commands:" in listing.stdout


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[1] / "recipes/tiny").glob("*.yaml")), ids=lambda p: p.name
)
def test_every_recipe_of_the_embedded_model_is_valid_and_documented(recipe):
    from cogvideox_factory.recipe import read_recipe

    config = read_recipe(recipe)
    root = Path(__file__).parents[1]
    for named in (config.vae.config, config.model.transformer_config):
        assert named is None or (root / named).is_file()
    assert f"recipes/tiny/{recipe.name}" in (recipe.parent / "README.md").read_text()
