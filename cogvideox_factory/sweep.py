"""Training runs for all combinations of some settings, one after the other, and what came out.

Every run is a process of its own, so one that fails, or leaks, harms no other. What is finished is known by `final/`
and by `NAME.done`, the recipe it was made with, so the same sweep again does what is left.
"""

import csv
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say
from cogvideox_factory.publish import publish_text
from cogvideox_factory.report import sweep_page
from cogvideox_factory.stopping import StoppedError, StopRequest, stop_requests

_SHORT = {"train.schedule": "lr-schedule"}
"""What the older trainers' folders call a setting, where that is not its own name."""
_STOPPED = (75, 128 + signal.SIGINT, 128 + signal.SIGTERM)
_LAST_SECONDS = (1.5, 1.5, 15.0)
"""After each request to end at once. The first two lie further apart than a signal that is the same request."""


class SweepError(FactoryError):
    """Runs of a sweep that failed; the exit code is theirs if they agree, else 1."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """A setting and the values it takes, as they were typed."""

    setting: str
    values: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "train.learning-rate=1e-5,2e-5".

        Raises:
            FactoryError: not of that form, or a value twice.
        """
        name, equals, values = text.partition("=")
        words = tuple(value.strip() for value in values.split(","))
        if not equals or "." not in name or not all(words):
            raise FactoryError(f"--grid {text}: write SECTION.SETTING=VALUE,VALUE, as in train.learning-rate=1e-5,2e-5")
        if twice := sorted({word for word in words if words.count(word) > 1}):
            raise FactoryError(f"--grid {text}: {', '.join(twice)} is there twice")
        return cls(setting=name.strip().replace("-", "_"), values=words)


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One combination."""

    folder: Path
    values: dict[str, str]
    """What it has of each setting of the grid, as typed."""

    @property
    def recipe(self) -> Path:
        """The complete recipe of the run, beside its folder."""
        return self.folder.with_name(f"{self.folder.name}.yaml")

    @property
    def done(self) -> Path:
        """The recipe that the run came to its end with; not there before that."""
        return self.folder.with_name(f"{self.folder.name}.done")


def combinations(axes: Sequence[Axis]) -> list[tuple[str, ...]]:
    """Return every combination, the last setting changing first.

    Raises:
        FactoryError: a setting twice.
    """
    names = [axis.setting for axis in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise FactoryError(f"--grid {twice[0]} is given twice; give all its values at once")
    return list(itertools.product(*(axis.values for axis in axes)))


def name_of(axes: Sequence[Axis], point: Sequence[str], *, method: str) -> str:
    """Return a run's folder name, made as the older trainers' scripts made it.

    `cogvideox-sft__optimizer_adamw__steps_3000__lr-schedule_cosine__learning-rate_1e-5`.
    """
    short = [_SHORT.get(axis.setting, axis.setting.rpartition(".")[2].replace("_", "-")) for axis in axes]
    names = [
        name if short.count(name) == 1 else axis.setting.replace("_", "-")
        for name, axis in zip(short, axes, strict=True)
    ]
    words = [re.sub(r"[^\w.+-]", "-", value) for value in point]
    parts = [f"__{name}_{word}" for name, word in zip(names, words, strict=True)]
    return f"cogvideox-{method}{''.join(parts)}"


def require_distinct(runs: Sequence[Run]) -> None:
    """Refuse two combinations that would share a folder.

    Raises:
        FactoryError: there are some.
    """
    folders = [run.folder for run in runs]
    if twice := [folder for folder in folders if folders.count(folder) > 1]:
        raise FactoryError(f"two combinations would both be called {twice[0].name}; give values that differ in letters")


def carry_out(
    folder: Path, runs: Sequence[Run], write_recipe: Callable[[Run, Path], None], *, num_processes: int = 1
) -> None:
    """Train every run that is not finished, and write table and page after each.

    Args:
        folder: of the sweep.
        runs: in order.
        write_recipe: writes the complete recipe of a run to a path.
        num_processes: of each run.

    Raises:
        SweepError: some runs failed, after all were tried.
        StoppedError: stopped on request; the run in hand saved a checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes: dict[Path, int] = {}
    with stop_requests() as stop:
        for number, run in enumerate(runs, start=1):
            was_finished = _is_finished(run, write_recipe)
            say(f"run {number}/{len(runs)}: {run.folder}" + (" is finished" if was_finished else ""))
            codes[run.folder] = 0 if was_finished else _train(run, num_processes, stop)
            report(folder, runs, codes)
            if stop.name or codes[run.folder] in _STOPPED:
                raise StoppedError(f"stopped in run {number} of {len(runs)}, {run.folder}. The same command goes on.")
    for line in table(runs, codes):
        say(line)
    say(f"{folder / 'index.html'}")
    failed = {run.folder.name: codes[run.folder] for run in runs if codes[run.folder]}
    if failed:
        listed = "\n  ".join(f"{name} (exit code {code})" for name, code in failed.items())
        kinds = set(failed.values())
        raise SweepError(
            f"{len(failed)} of {len(runs)} runs failed; the same command tries them again:\n  {listed}",
            exit_code=kinds.pop() if len(kinds) == 1 else 1,
        )


def _is_finished(run: Run, write_recipe: Callable[[Run, Path], None]) -> bool:
    """Write the run's recipe, and tell whether the run was finished with the very same one."""
    write_recipe(run, run.recipe)
    is_same = run.done.is_file() and run.done.read_bytes() == run.recipe.read_bytes()
    return is_same and (run.folder / "final").is_dir()


def _train(run: Run, num_processes: int, stop: StopRequest) -> int:
    """Train one run to its end and return its exit code; a request to stop is handed on."""
    recipe = run.recipe.read_text(encoding="utf-8")
    run.done.unlink(missing_ok=True)  # from here on `final/` may become another recipe's
    words = ["train", str(run.recipe)]
    if num_processes > 1:  # torchrun alone would answer 1 whatever happened, and leave no time to save
        words = ["launch", "--nproc", str(num_processes), "--restarts", "0", "--", *words]
    # A session of its own: Ctrl-C reaches it through us, once, and not twice.
    process = subprocess.Popen([sys.executable, "-m", "cogvideox_factory", *words], start_new_session=True)
    is_told = False
    try:
        while process.poll() is None:
            if stop.name and not is_told:
                process.send_signal(signal.SIGTERM)
                is_told = True
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=0.5)
    finally:
        _end(process)
    if process.returncode == 0:
        publish_text(run.done, recipe)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a run that still lives: by requests that each leave it less time, the last of which `launch` kills at."""
    try:
        for seconds in _LAST_SECONDS:
            if process.poll() is not None:
                return
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def results(runs: Sequence[Run], codes: dict[Path, int]) -> list[dict[str, Any]]:
    """Return a row a run: its settings, what became of it, and its last numbers."""
    rows = []
    for run in runs:
        metrics = _metrics(run.folder)
        code = codes.get(run.folder)
        state = "to do" if code is None else "done" if code == 0 else "stopped" if code in _STOPPED else "failed"
        rows.append(
            {
                "run": run.folder.name, **run.values, "state": state, "exit_code": code,
                "step": max((row["step"] for row in metrics), default=None), "loss": _last(metrics, "loss"),
                "validation_loss": _last(metrics, "validation_loss"),
                "seconds_per_step": _last(metrics, "seconds_per_step"),
            }
        )  # fmt: skip
    return rows


def report(folder: Path, runs: Sequence[Run], codes: dict[Path, int]) -> None:
    """Write sweep.json, sweep.csv and index.html."""
    rows = results(runs, codes)
    publish_text(folder / "sweep.json", json.dumps(rows, indent=1) + "\n")
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    publish_text(folder / "sweep.csv", text.getvalue())
    curves = {
        name: {run.folder.name: _curve(_metrics(run.folder), name) for run in runs}
        for name in ("loss", "validation_loss")
    }
    publish_text(folder / "index.html", sweep_page.page(folder.name, rows, curves))


def table(runs: Sequence[Run], codes: dict[Path, int]) -> list[str]:
    """Return the results as aligned lines, the best validation loss (or loss) first."""
    columns = [*runs[0].values, "state", "step", "loss", "validation_loss", "seconds_per_step"]
    key = sweep_page.rank
    cells = [columns, *([_shown(row[name]) for name in columns] for row in sorted(results(runs, codes), key=key))]
    widths = [max(len(line[place]) for line in cells) for place in range(len(columns))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]


def _shown(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = []
    for line in lines:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:  # the torn last line of a run that was killed
            continue
    return rows


def _curve(rows: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if isinstance(row.get(name), int | float)]


def _last(rows: Iterable[dict[str, Any]], name: str) -> float | None:
    curve = _curve(rows, name)
    return curve[-1][1] if curve else None
