"""Sweeps, with a stand-in for the training: a program that leaves what a run leaves."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cogvideox_factory import sweep
from cogvideox_factory.cli import main
from cogvideox_factory.recipe import read_recipe

# Called as `python -m cogvideox_factory train RECIPE.yaml`; a rate of 0.5 fails, one of 0.25 waits to be stopped.
STAND_IN = """#!{python}
import json, os, pathlib, signal, sys, time
recipe = pathlib.Path(sys.argv[-1])
folder = recipe.with_suffix("")
folder.mkdir(exist_ok=True)
with open(recipe.parent / "calls", "a") as file:
    file.write(folder.name + "\\n")
rate = float(folder.name.rpartition("_")[2])
rows = [{{"step": step, "loss": 1 / step + rate, "seconds_per_step": 0.5}} for step in (1, 2)]
rows.append({{"step": 2, "validation_loss": 1 - rate}})
(folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows) + "torn")
if rate == 0.5 and not (recipe.parent / "mended").exists():
    sys.exit(7)
if rate == 0.25:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(75))
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(60)
(folder / "final").mkdir(exist_ok=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> None:
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(program))


def start(folder: Path, rates: str) -> int:
    words = ["--model.path", "m", "--cache.dir", "c", "--train.dir", str(folder)]
    return main(["sweep", *words, "--grid", f"train.learning-rate={rates}"])


def calls(folder: Path) -> list[str]:
    return [line.rpartition("_")[2] for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.usefixtures("stand_in")
def test_a_failed_run_is_named_and_only_what_is_left_is_run_again(tmp_path, capsys):
    folder = tmp_path / "rates"
    assert start(folder, "0.1,0.5,0.2") == 7, "the code of the run that failed"
    printed = capsys.readouterr()
    assert "1 of 3 runs failed" in printed.err
    assert "cogvideox-lora__learning-rate_0.5 (exit code 7)" in printed.err
    lines = [line.split() for line in printed.out.splitlines()]
    table = lines[
        lines.index(["train.learning_rate", "state", "step", "loss", "validation_loss", "seconds_per_step"]) :
    ]
    assert [line[0] for line in table[1:4]] == ["0.5", "0.2", "0.1"], "the lowest validation loss first"
    assert calls(folder) == ["0.1", "0.5", "0.2"]

    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    assert rows[2] == {
        "run": "cogvideox-lora__learning-rate_0.2", "train.learning_rate": "0.2", "state": "done", "exit_code": 0,
        "step": 2, "loss": 0.7, "validation_loss": 0.8, "seconds_per_step": 0.5,
    }  # fmt: skip
    with (folder / "sweep.csv").open() as file:
        assert [row["train.learning_rate"] for row in csv.DictReader(file)] == ["0.1", "0.5", "0.2"]
    page = (folder / "index.html").read_text()
    assert "Lowest validation loss: cogvideox-lora__learning-rate_0.5" in page
    assert page.count("<polyline") == 6, "two curves a run"
    recipe = read_recipe(folder / "cogvideox-lora__learning-rate_0.2.yaml")
    assert (recipe.train.learning_rate, recipe.train.dir) == (0.2, str(folder / "cogvideox-lora__learning-rate_0.2"))

    (folder / "mended").touch()
    assert start(folder, "0.1,0.5,0.2") == 0
    assert calls(folder) == ["0.1", "0.5", "0.2", "0.5"]
    assert "0.2 is finished" in capsys.readouterr().out


@pytest.mark.usefixtures("stand_in")
def test_a_changed_recipe_is_run_again(tmp_path):
    words = ["sweep", "--model.path", "m", "--cache.dir", "c", "--train.dir", str(tmp_path), "--grid", "run.seed=1"]
    for steps in ("9", "9", "10"):
        assert main([*words, "--train.steps", steps]) == 0
    assert len(calls(tmp_path)) == 2, "the run itself decides whether it can go on with other settings"


@pytest.mark.usefixtures("stand_in")
def test_the_final_of_another_recipe_finishes_no_run(tmp_path):
    words = ["sweep", "--model.path", "m", "--cache.dir", "c", "--train.dir", str(tmp_path)]
    words += ["--grid", "train.learning-rate=0.5", "--train.steps"]
    (tmp_path / "mended").touch()
    assert main([*words, "9"]) == 0
    (tmp_path / "mended").unlink()
    assert [main([*words, "10"]), main([*words, "10"])] == [7, 7], "final/ is that of nine steps"
    assert main([*words, "9"]) == 7, "nor is it known any more to be that"
    (tmp_path / "mended").touch()
    assert [main([*words, "10"]), main([*words, "10"])] == [0, 0]
    assert len(calls(tmp_path)) == 5


def test_runs_of_many_processes_are_launched(tmp_path, monkeypatch):
    """`launch` answers with the run's own exit code and lets it save; torchrun does neither."""
    started = []

    class Done(subprocess.Popen):
        def __init__(self, words: list[str], **options: bool) -> None:
            started.append(words[3:])
            super().__init__(["true"], **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", Done)
    words = ["--model.path", "m", "--cache.dir", "c", "--train.dir", str(tmp_path), "--grid", "run.seed=1"]
    assert main(["sweep", *words, "--sweep.processes", "2"]) == 0
    recipe = str(tmp_path / "cogvideox-lora__seed_1.yaml")
    assert started == [["launch", "--nproc", "2", "--restarts", "0", "--", "train", recipe]]


def test_a_run_to_be_left_at_once_is_asked_as_often_as_launch_takes_to_kill(tmp_path, monkeypatch):
    program = tmp_path / "asked"
    program.write_text(
        "import os, signal, time\ntimes = []\n"
        "signal.signal(signal.SIGTERM, lambda *_: times.append(1) or len(times) == 3 and os._exit(9))\n"
        "print(flush=True)\nwhile True: time.sleep(1)\n"
    )
    monkeypatch.setattr(sweep, "_LAST_SECONDS", (0.2, 0.2, 20.0))
    process = subprocess.Popen([sys.executable, str(program)], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    sweep._end(process)
    process.stdout.close()
    assert process.returncode == 9, "no SIGKILL, which would leave the run's processes behind"


def test_a_request_to_stop_reaches_the_run_and_ends_the_sweep(tmp_path):
    """In a process of its own: the signal is for it."""
    program = tmp_path / "stand-in"
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    code = (
        "import sys; from cogvideox_factory import sweep; from cogvideox_factory.cli import main; "
        f"sweep.sys.executable = {str(program)!r}; sys.exit(main(sys.argv[1:]))"
    )
    words = ["sweep", "--model.path", "m", "--cache.dir", "c", "--train.dir", str(tmp_path / "rates")]
    words += ["--grid", "train.learning-rate=0.1,0.25,0.2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60, check=False, env=os.environ
    )
    assert done.returncode == 75, done.stderr
    assert calls(tmp_path / "rates") == ["0.1", "0.25"]
    assert "stopped in run 2 of 3" in done.stderr
    states = [row["state"] for row in json.loads((tmp_path / "rates/sweep.json").read_text())]
    assert states == ["done", "stopped", "to do"]


def test_names_are_those_of_the_older_scripts():
    axes = [sweep.Axis.parse(text) for text in ("train.optimizer=adamw", "train.steps=10,20", "train.schedule=cosine",
                                                "train.learning-rate=1e-5")]  # fmt: skip
    points = sweep.combinations(axes)
    assert len(points) == 2
    name = "cogvideox-sft__optimizer_adamw__steps_20__lr-schedule_cosine__learning-rate_1e-5"
    assert sweep.name_of(axes, points[1], method="sft") == name
    clash = [sweep.Axis.parse("data.height=1,2"), sweep.Axis.parse("generate.height=3")]
    assert sweep.name_of(clash, ("1", "a/b"), method="lora") == "cogvideox-lora__data.height_1__generate.height_a-b"


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        ([], "which combinations"),
        (["train.steps"], "SECTION.SETTING=VALUE"),
        (["train.steps=1,,2"], "SECTION.SETTING=VALUE"),
        (["train.steps=1,1"], "there twice"),
        (["train.steps=1", "train.steps=2"], "given twice"),
        (["train.stepz=1"], "did you mean 'train.steps'"),
        (["train.steps=many"], "valid integer"),
        (["train.steps=0"], "train.steps=0"),
        (["train.dir=a,b"], "a sweep decides it"),
        (["lora.target-modules=to_q"], "holds a list"),
        (["generate.steps=3"], "no such setting"),
        (["train.schedule=cosin"], "cosine"),
        (["model.revision=a/b,a+b,a_b,a-b"], "letters"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused_before_anything_runs(tmp_path, capsys, grid, says):
    words = [word for text in grid for word in ("--grid", text)]
    assert main(["sweep", "--model.path", "m", "--cache.dir", "c", "--train.dir", str(tmp_path / "s"), *words]) == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
