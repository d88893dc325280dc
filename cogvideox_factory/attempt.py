"""One attempt of a supervised run, as its folder tells it: what each process printed, and how it ended.

```
RUN/logs/attempt-1/
  rank-3.log     what process 3 printed
  rank-3.json    its id while it runs, its exit code when it has ended by itself
  node-0.log     the launcher's own words
```
torchrun and msrun answer 1 whoever failed and why; the exit codes of a run's own processes are kept here. Which signal
ended a process is known from what the launcher says alone.
"""

import json
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import PeerError, StorageError
from cogvideox_factory.launcher import only_introduces, rank_of
from cogvideox_factory.publish import publish_text

FOLDER = "COGVIDEOX_ATTEMPT"
"""Variable that tells a process where its attempt is recorded."""
STARTED = "COGVIDEOX_STARTED"
"""Variable that tells a process when the first attempt began, by the machine's monotonic clock."""
_FAILURE = re.compile(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)")
_FAILURE_OF_MSRUN = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


def run_started() -> float:
    """Return when the run began, by `time.monotonic`: its first attempt, if it is supervised, otherwise now."""
    return float(os.environ.get(STARTED, time.monotonic()))


def record(main: Callable[[], int]) -> int:
    """Run `main` and return its exit code; as one process of a supervised run, end with it, and leave word of it."""
    if FOLDER not in os.environ or only_introduces(os.environ):
        return main()
    folder, rank = Path(os.environ[FOLDER]), rank_of(os.environ)
    log = os.open(folder / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(log, descriptor)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    note = folder / f"rank-{rank}.json"
    publish_text(note, json.dumps({"pid": os.getpid()}))
    try:
        code = main()
    except SystemExit as leaving:  # a parser's
        code = 0 if leaving.code is None else leaving.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 - whatever it is, the process ends with it, and its log has it
        traceback.print_exc()
        code = 1
    with suppress(StorageError):  # on a full disk the launcher still hears the code
        publish_text(note, json.dumps({"pid": os.getpid(), "code": code}))
    if code:  # threads that a broken connection has left waiting must not keep the process from ending
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@dataclass(kw_only=True, slots=True)
class Processes:
    """This machine's processes of an attempt, held by handles, because the system gives a number again."""

    folder: Path
    ranks: Iterable[int]
    put_down: set[int] = field(default_factory=set)
    """Those that were ended from here."""
    _handles: dict[int, int | None] = field(default_factory=dict)

    def look(self) -> None:
        """Take hold of processes that have begun since."""
        for rank in self.ranks:
            if rank not in self._handles and (told := _read(self.folder / f"rank-{rank}.json")):
                try:
                    self._handles[rank] = os.pidfd_open(told["pid"])
                except ProcessLookupError:
                    self._handles[rank] = None

    @property
    def begun(self) -> set[int]:
        """Those that have begun."""
        return set(self._handles)

    @property
    def alive(self) -> set[int]:
        """Those that have begun and not ended."""
        held = {handle: rank for rank, handle in self._handles.items() if handle is not None}
        ended = select.select(list(held), [], [], 0)[0]  # a handle can be read from when its process has ended
        return {rank for handle, rank in held.items() if handle not in ended}

    def crashed(self) -> bool:
        """Tell whether one has ended, and not because it was done."""
        return any(_read(self.folder / f"rank-{r}.json").get("code") != 0 for r in self.begun - self.alive)

    def send(self, number: int) -> None:
        """Send a signal to all that live."""
        for rank in self.alive:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handles[rank], number)  # type: ignore[arg-type]

    def kill(self) -> None:
        """End all that live, whatever they do, and wait until they are gone (not for long: a disk may hold them)."""
        self.put_down |= self.alive
        self.send(signal.SIGKILL)
        handles = [self._handles[rank] for rank in self.put_down]
        for handle in handles:
            if handle is not None:
                select.select([handle], [], [], 10)

    def close(self) -> None:
        """Let go of the handles."""
        for handle in self._handles.values():
            if handle is not None:
                os.close(handle)
        self._handles.clear()


@dataclass(frozen=True, kw_only=True, slots=True)
class Ends:
    """How the processes of an attempt ended, on all machines that share the folder."""

    folder: Path
    codes: dict[int, int | None]
    """Exit code; negative: the signal that ended it; None: it said nothing."""
    put_down: set[int]
    """Those that were ended from outside after another had crashed."""

    @property
    def causes(self) -> list[int]:
        """The processes that failed by themselves, as far as that can be told from those they took with them."""
        led = {r: code for r, code in self.codes.items() if r not in self.put_down and code != -signal.SIGTERM}
        for wanted in (
            lambda code: code not in (None, 0, PeerError.exit_code),
            lambda code: code is None or (code == 0 and set(self.codes.values()) != {0}),
            lambda code: code == PeerError.exit_code,
        ):
            if found := sorted(rank for rank, code in led.items() if wanted(code)):
                return found
        return []

    def told(self, rank: int) -> str:
        """Return one line on how a process ended, with the place of its output."""
        code = self.codes[rank]
        how = {None: "ended without a word", 0: "ended before the run was done"}.get(
            code, f"ended with exit code {code}"
        )
        if code is not None and code < 0:
            how = f"was ended by {signal.Signals(-code).name}"
        return f"rank {rank} {how} ({self.folder / f'rank-{rank}.log'})"

    def last_words(self, rank: int, num_lines: int) -> str:
        """Return the end of what a process printed."""
        return last_lines(self.folder / f"rank-{rank}.log", num_lines)


def read_ends(folder: Path, *, put_down: set[int]) -> Ends:
    """Return how the processes of the attempt in `folder` ended."""
    notes = {int(path.stem.removeprefix("rank-")): _read(path) for path in folder.glob("rank-*.json")}
    codes = {rank: note.get("code") for rank, note in notes.items()}
    rank_of_process = {note.get("pid"): rank for rank, note in notes.items()}
    for path in folder.glob("node-*.log"):
        text = path.read_text(encoding="utf-8", errors="replace")
        told = [(int(rank), int(code)) for rank, code in _FAILURE.findall(text)]
        told += [(rank_of_process.get(int(pid)), int(code)) for pid, code in _FAILURE_OF_MSRUN.findall(text)]
        for rank, code in told:
            if rank is not None and codes.get(rank) is None:
                codes[rank] = code
    return Ends(folder=folder, codes=dict(sorted(codes.items())), put_down=put_down)


def last_lines(path: Path, num_lines: int) -> str:
    """Return the last lines of a log, indented; empty if there is none."""
    if not path.is_file():
        return ""
    lines = path.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-num_lines:]
    return "".join(f"\n  | {line}" for line in lines)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
