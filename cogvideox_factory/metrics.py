"""What a run says about itself: one console line, one JSONL row and one tensorboard point a logged step."""

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cogvideox_factory.errors import StorageError
from cogvideox_factory.publish import publish_text

if TYPE_CHECKING:
    from cogvideox_factory.tracker import Tracker

console = Console(highlight=False, soft_wrap=True)
_QUIET_SECONDS = 30


class StepRows:
    """An append-only JSONL file whose rows have a `step`.

    After a resume from step N the rows beyond N, written by the run that died, are removed first, so the file tells of
    one run. A file that cannot be written is said once, and the run goes on without it.
    """

    def __init__(self, path: Path, *, resume_step: int | None = None) -> None:
        self.path = path
        self._last_kept: int | None = -1 if resume_step is None else resume_step
        """Step beyond which rows are to be removed before any is added; None once they are."""
        self._is_failing = False
        self._file: TextIO | None = None
        with self._surviving():
            self._keep()

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append `rows`; the file is made with the first."""
        text = "".join(json.dumps(finite_json(row)) + "\n" for row in rows)
        if not text:
            return
        with self._surviving():
            self._keep()
            self._file = self._file or self.path.open("a", encoding="utf-8")
            self._file.write(text)
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file:
            self._file.close()

    def steps(self) -> list[int]:
        """Return the steps that have a row, in order, each once."""
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        return sorted({int(step) for step in map(_step_of, lines) if math.isfinite(step)})

    def _keep(self) -> None:
        if self._last_kept is not None and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            rows = [line for line in lines if _step_of(line) <= self._last_kept]
            publish_text(self.path, "".join(f"{row}\n" for row in rows))
        self._last_kept = None

    @contextmanager
    def _surviving(self) -> Iterator[None]:
        """Say, once, what goes wrong with the file: a run is worth more than its log."""
        try:
            yield
        except (StorageError, OSError) as error:
            if not self._is_failing:
                why = error.strerror if isinstance(error, OSError) else error
                say(f"{self.path} cannot be written ({why}); training goes on without it")
            self._is_failing = True


class MetricsLog:
    """`metrics.jsonl` and tensorboard events of one run folder, and a tracker where one is given.

    Of several processes one `writes`.
    """

    def __init__(
        self, folder: Path, *, resume_step: int | None = None, writes: bool = True, tracker: "Tracker | None" = None
    ) -> None:
        self._writes = writes
        if not writes:
            return
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._rows = StepRows(Path(folder) / "metrics.jsonl", resume_step=resume_step)
        self._events = EventFileWriter(str(Path(folder) / "tensorboard"))
        self._tracker = tracker

    def write(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` (numbers, or lists and strings that only the JSONL row keeps) for `step`."""
        if not self._writes:
            return
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]

        self._rows.write([{"step": step, **values}])
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        self._events.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=scalars)))
        if self._tracker:
            self._tracker.log(step, numbers)

    def close(self) -> None:
        """Flush and close all."""
        if not self._writes:
            return
        self._rows.close()
        self._events.close()
        if self._tracker:
            self._tracker.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # the torn last line of a killed writer


def finite_json(value: Any) -> Any:
    """Return `value` with NaN and infinities as strings, all the way down: JSON has none."""
    if isinstance(value, Mapping):
        return {key: finite_json(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite_json(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def say(text: str) -> None:
    """Print one line for the user."""
    console.print(text, markup=False)


@contextmanager
def speaking(aloud: bool) -> Iterator[None]:
    """Say nothing for the duration unless `aloud`: of several processes one speaks."""
    before, console.quiet = console.quiet, console.quiet or not aloud
    try:
        yield
    finally:
        console.quiet = before


def duration(seconds: float) -> str:
    """Return `seconds` as 1:02:03 or 2:03."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


@contextmanager
def progress_bar(what: str, total: int, *, done: int = 0, lines: bool = True) -> Iterator[Callable[[], None]]:
    """Show how far `total` items are, of which some are `done`; yields what to call after each.

    Without a terminal: a line every 30 s, but for who writes `lines` of its own.
    """
    if console.is_terminal:
        columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=total, completed=done)
            yield lambda: bar.advance(task)
        return
    if not lines:
        yield lambda: None
        return
    started = said = time.monotonic()
    before = done

    def advance() -> None:
        nonlocal done, said
        done += 1
        now = time.monotonic()
        if now - said >= _QUIET_SECONDS:
            said = now
            rate = (done - before) / (now - started)
            say(f"{what}: {done}/{total}, {rate:.3g}/s, left {duration((total - done) / rate)}")

    yield advance
