"""The small run that training's faults are made in: its recipe, its processes, and how what is left is judged."""

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path
from typing import Any

import yaml

from cogvideox_factory.checkpoints import list_checkpoints, verify_checkpoint
from cogvideox_factory.supervise import free_port
from cogvideox_factory.tensors import open_tensors
from cogvideox_factory.tiny.build import build_tiny_model
from tests.faults import engine
from tests.faults.boundaries import Boundaries
from tests.faults.makers import good_set
from tests.faults.trial import Child, Outcome, Verdict, folder_of_this_run, in_child

STEPS = 6
SAVE_EVERY = 2
LONGER = {"steps": 12, "save_every": 4}
"""For faults at random times."""
_PATIENCE_SECONDS = 150.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Wanted:
    """What an undisturbed run comes to."""

    final: str
    """Digest of the exported weights."""
    losses: dict[int, float]
    checkpoints: dict[int, str]
    """Digest of the state after every step."""
    seconds: float


def recipe(
    run: Path, *, method: str = "lora", parallel: dict | None = None, cache: Path | None = None, **train: Any
) -> Path:
    """Write the recipe of a run and return where it lies; without flags nothing but it has to be parsed."""
    work, own = bench(), engine.run_settings()
    adapter = {"rank": 4, "alpha": 8.0} | own.get("lora", {})
    values = {
        "engine": engine.chosen(), "model": {"path": str(work / "model")}, "run": {"device": "cpu", "dtype": "float32"},
        "data": {"root": str(work / "set"), "num_frames": 9, "height": 64, "width": 64, "fps": 8.0},
        "cache": {"dir": str(cache or work / "cache")}, "lora": adapter if method == "lora" else {},
        "parallel": {"timeout_seconds": 30.0} | (parallel or {}),
        "train": {
            "dir": str(run), "method": method, "steps": STEPS, "batch_size": 2, "log_every": 1, "learning_rate": 1e-2,
            "save_every": SAVE_EVERY, "keep_checkpoints": 2, "checkpointing": "none", "num_workers": 1,
        } | own.get("train", {}) | train,
    }  # fmt: skip
    run.parent.mkdir(parents=True, exist_ok=True)
    path = run.with_name(f"{run.name}.yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def command(verb: str, path: Path, before: Callable[[], object] | None = None) -> int:
    """Do what `cogvideox VERB RECIPE` does, in this process, and return its exit code; `before` breaks something."""
    from cogvideox_factory.cli import main

    if before:
        before()
    return main([verb, str(path)])


def counted(path: Path, boundaries: Boundaries) -> list[str]:
    """Train, and return the boundaries that were passed."""
    assert command("train", path, boundaries.install) == 0
    return boundaries.seen


@once
def bench() -> Path:
    """Return a folder with a model, a data set and its cache."""
    engine.warm()
    work = folder_of_this_run("training")
    build_tiny_model(work / "model", "cogvideox1.5-5b")
    good_set(work / "set", 12)
    values = yaml.safe_load(_prepare_recipe(work))
    (work / "prepare.yaml").write_text(yaml.safe_dump(values))
    ended = in_child(command, "prepare", work / "prepare.yaml", limit=_PATIENCE_SECONDS)
    assert ended.value == 0, ended.output
    return work


def _prepare_recipe(work: Path) -> str:
    return (
        f"engine: {engine.chosen()}\n"
        f"model: {{path: {work / 'model'}}}\ncache: {{dir: {work / 'cache'}}}\nrun: {{device: cpu, dtype: float32}}\n"
        f"data: {{root: {work / 'set'}, num_frames: 9, height: 64, width: 64, fps: 8.0}}\n"
    )


@once
def finished() -> Path:
    """Return a folder with a finished run of either method, lora/ and full/."""
    work = folder_of_this_run("finished")
    for method in ("lora", "full"):
        ended = in_child(command, "train", recipe(work / method, method=method), limit=_PATIENCE_SECONDS)
        assert ended.value == 0, ended.output
    return work


@once
def wanted(size: int = 1, zero: int = 0, **settings: Any) -> Wanted:
    """Return what a run of `size` processes comes to when nothing disturbs it."""
    run = folder_of_this_run("wanted") / "run"
    together = {"save_every": 1, "keep_checkpoints": 1000}
    path = recipe(run, parallel={"zero": zero}, **settings | together)
    outcomes = in_children(size, command, "train", path)
    assert [outcome.value for outcome in outcomes] == [0] * size, outcomes
    return Wanted(
        final=digest(run / "final"), losses=losses(run), seconds=max(outcome.seconds for outcome in outcomes),
        checkpoints={step: digest(folder(run, step)) for step in list_checkpoints(run)},
    )  # fmt: skip


class Together:
    """Processes of one run, each a fork of this one."""

    def __init__(self, size: int, function: Callable[..., Any], *args: Any) -> None:
        port = free_port()
        self.children = [Child(_as_rank, rank, size, port, function, args) for rank in range(size)]

    def wait(self) -> list[Outcome]:
        """Return how each ended."""
        return [child.wait(_PATIENCE_SECONDS) for child in self.children]


def in_children(size: int, function: Callable[..., Any], *args: Any) -> list[Outcome]:
    """Run `function` in as many processes, that can find each other, and return how each ended."""
    return Together(size, function, *args).wait()


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple) -> Any:
    if size > 1:
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
    return function(*args)


def folder(run: Path, step: int) -> Path:
    """Return where a checkpoint lies."""
    return run / f"checkpoint-{step:06}"


def losses(run: Path) -> dict[int, float]:
    """Return the logged loss of every step; a step that stands twice fails."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    found = {row["step"]: row["loss"] for row in rows if "loss" in row}
    assert len(found) == sum("loss" in row for row in rows), rows
    return found


def digest(folder: Path) -> str:
    """Return a digest of every tensor below `folder`, by file and name; headers may differ in order."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*.safetensors")):
        with open_tensors(path) as file:
            for name in sorted(file.names):
                array = file.read(name)
                total.update(f"{path.relative_to(folder)} {name} {array.dtype} {array.shape}".encode())
                total.update(array.tobytes())
    return total.hexdigest()


def left_intact(run: Path, want: Wanted) -> tuple[Verdict, str]:
    """Judge what stands under final names in a folder whose run ended somehow."""
    from cogvideox_factory.errors import UnfitError

    for step in list_checkpoints(run):
        try:
            verify_checkpoint(folder(run, step))
        except UnfitError as error:
            return Verdict.LOST, f"checkpoint {step} has its final name: {error}"
        if digest(folder(run, step)) != want.checkpoints[step]:
            return Verdict.SILENT, f"checkpoint {step} verifies and holds other numbers"
    return Verdict.OK, ""


def redone(run: Path) -> int:
    """Return how many logged steps have to be done again; to be asked before the run goes on."""
    return max(0, max(losses(run), default=0) - max(list_checkpoints(run), default=0))


def goes_on(run: Path, want: Wanted, size: int = 1, *, logged: bool = True, **settings: Any) -> tuple[Verdict, str]:
    """Give the same command again and hold what it comes to against the undisturbed run.

    `logged` says whether each step stands in the log, or only the mean of several.
    """
    outcomes = in_children(size, command, "train", recipe(run, **settings))
    if [outcome.value for outcome in outcomes] != [0] * size:
        broke = next((o.broke for o in outcomes if o.broke), Verdict.LOST)
        return broke, "again: " + "".join(o.output + o.error for o in outcomes)
    return same(run, want, logged=logged)


def same(run: Path, want: Wanted, *, logged: bool = True) -> tuple[Verdict, str]:
    """Hold a finished run against the undisturbed one: weights, losses, nothing left over."""
    if digest(run / "final") != want.final:
        return Verdict.SILENT, "the exported weights differ from the undisturbed run's"
    if logged and losses(run) != want.losses:
        return Verdict.SILENT, f"losses {losses(run)}, undisturbed {want.losses}"
    if left := [path.name for path in run.rglob(".tmp-*")]:
        return Verdict.LOST, f"left behind: {left}"
    kept = sorted(path.name for path in run.iterdir() if path.name.startswith("checkpoint-"))
    if kept != [folder(run, step).name for step in list_checkpoints(run)]:
        return Verdict.LOST, f"left behind, a part of a checkpoint: {kept}"
    return left_intact(run, want)


def empty(run: Path) -> Path:
    """Return `run`, with nothing there."""
    shutil.rmtree(run, ignore_errors=True)
    return run


KILLED = -int(signal.SIGKILL)


def codes(outcomes: list[Outcome]) -> list[int | None]:
    """Return the exit code of each process; negative: the signal that ended it."""
    return [-o.signal if o.signal else o.value if o.exit_code == 0 else o.exit_code for o in outcomes]
