"""One trial and its verdict, and the forked child that a fault happens in."""

import atexit
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import FactoryError

LIMIT_SECONDS = 60.0


class Verdict(StrEnum):
    """What became of a fault; the first three pass."""

    OK = "ok-identical"
    REFUSED = "refused"
    DEGRADED = "degraded-reported"
    SILENT = "SILENT"
    CRASH = "CRASH"
    HANG = "HANG"
    LOST = "LOST"


PASSES = (Verdict.OK, Verdict.REFUSED, Verdict.DEGRADED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One fault and its verdict."""

    family: str
    name: str
    """Unique in its family and tier: what `--replay FAMILY:NAME` takes."""
    verdict: Verdict
    detail: str = ""
    layer: str = ""
    """What noticed the fault."""
    is_control: bool = False
    """Nothing was wrong, so a refusal is a false one."""
    steps_redone: int | None = None
    """Logged steps of training that had to be done again."""
    recovery_seconds: float | None = None
    """From the fault to the next step."""

    @property
    def passed(self) -> bool:
        return self.verdict == Verdict.OK if self.is_control else self.verdict in PASSES


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a child ended."""

    value: Any = None
    """What the function returned, when it did."""
    exit_code: int | None = None
    """0, the exit code of a `FactoryError`, 1 for any other exception; None when a signal ended it."""
    signal: int | None = None
    timed_out: bool = False
    output: str = ""
    error: str = ""
    """The message of the exception."""
    seconds: float = 0.0

    @property
    def broke(self) -> Verdict | None:
        """CRASH or HANG where the child ended in a way that no command may."""
        if self.timed_out:
            return Verdict.HANG
        if self.exit_code == 1 or self.signal is not None:
            return Verdict.CRASH
        return None


class Child:
    """A function that runs in a fork of this process; what it prints is kept."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._file = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `wait`
        self._read, write = os.pipe()
        self.started = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(function, args, write)
        os.close(write)

    def _run(self, function: Callable[..., Any], args: tuple, write: int) -> None:
        """Run in the child; never returns."""
        code = 1
        try:
            os.dup2(self._file.fileno(), 1)
            os.dup2(self._file.fileno(), 2)
            sys.stdout = sys.stderr = os.fdopen(os.dup(1), "w", buffering=1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            answer, code = {"value": function(*args)}, 0
        except FactoryError as error:
            answer, code = {"error": str(error)}, error.exit_code
        except BaseException as error:  # noqa: BLE001 - the child must end here, and this is what it ended with
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        try:
            with os.fdopen(write, "w") as pipe:
                json.dump(answer, pipe)
            sys.stdout.flush()
        finally:
            os._exit(code)

    def kill(self) -> None:
        """End it without a warning."""
        os.kill(self.pid, signal.SIGKILL)

    def wait(self, limit: float = LIMIT_SECONDS) -> Outcome:
        """Return how it ended; after `limit` seconds it is killed."""
        timed_out = False
        os.set_blocking(self._read, False)  # what it started and left alive holds the other end as well
        with os.fdopen(self._read, "rb") as pipe:
            while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
                if time.monotonic() - self.started > limit:
                    timed_out = True
                    self.kill()
                time.sleep(0.002)
            answer = pipe.read() or b""
        seconds = time.monotonic() - self.started
        status = ended[1]
        with self._file as file:
            file.seek(0)
            output = file.read()
        said = json.loads(answer) if answer else {}
        return Outcome(
            value=said.get("value"), error=said.get("error", ""), output=output, seconds=seconds, timed_out=timed_out,
            exit_code=os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            signal=os.WTERMSIG(status) if os.WIFSIGNALED(status) else None,
        )  # fmt: skip


def in_child(function: Callable[..., Any], *args: Any, limit: float = LIMIT_SECONDS) -> Outcome:
    """Run `function` in a fork and return how it ended; its result must be JSON."""
    return Child(function, *args).wait(limit)


def folder_of_this_run(what: str) -> Path:
    """Return an empty folder that is there until this process ends."""
    folder = Path(tempfile.mkdtemp(prefix=f"faults-{what}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def spread(items: list, count: int) -> list:
    """Return `count` of the items, evenly spread and in order; all of them when there are no more."""
    if count >= len(items):
        return items
    return [items[round(index * (len(items) - 1) / max(1, count - 1))] for index in range(count)]


def files_of(folder: Path, *, skip: tuple[str, ...] = (".lock", "survey.jsonl")) -> dict[str, bytes]:
    """Return every file of a folder by its relative name, but for a lock and a memo of file times."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in skip
    }
