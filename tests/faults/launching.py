"""F17 to F20: processes of a run that are killed, frozen, fail, leave early, or are told to stop."""

import ctypes
import os
import re
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from cogvideox_factory import draws, supervise
from cogvideox_factory.attempt import FOLDER, record
from cogvideox_factory.errors import DataError
from cogvideox_factory.supervise import Launch, Supervisor
from tests.faults.training import (
    LONGER,
    STEPS,
    Wanted,
    codes,
    command,
    empty,
    goes_on,
    left_intact,
    recipe,
    redone,
    same,
    wanted,
)
from tests.faults.trial import Child, Trial, Verdict, in_child, spread

_PR_SET_PDEATHSIG = 1
_GRACE = 2.0
_APART = 1.1
"""Seconds after which a second signal is no part of the first request any more."""
_STOPPED, _PEER = 75, 8


class ForkedTorchrun:
    """torchrun's own agent in a fork of this process; it forks the ranks, so nothing is imported again."""

    def __init__(self, launch: Launch, folder: Path, port: int, path: Path, before: Callable[[], object]) -> None:
        self._code: int | None = None
        self._pid = os.fork()
        if self._pid == 0:
            _agent(launch, folder, port, path, before)

    def poll(self) -> int | None:
        if self._code is None and (ended := os.waitpid(self._pid, os.WNOHANG))[0]:
            self._code = os.waitstatus_to_exitcode(ended[1])
        return self._code

    def send_signal(self, number: int, /) -> None:
        os.kill(self._pid, number)


def _agent(launch: Launch, folder: Path, port: int, path: Path, before: Callable[[], object]) -> None:
    """Be torchrun, as `supervise.start_torchrun` starts it; never returns."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a supervisor that a trial kills takes it along
        _print_to(folder / "node-0.log")
        os.environ |= {FOLDER: str(folder), "GLOO_SOCKET_IFNAME": "lo"}
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=launch.num_processes, max_restarts=0, start_method="fork",
            rdzv_backend="static", rdzv_endpoint=f"127.0.0.1:{port}", rdzv_configs={"rank": 0, "timeout": 30},
            monitor_interval=0.05,
        )  # fmt: skip
        elastic_launch(config, _rank)(path, before)
        code = 0
    except BaseException:  # noqa: BLE001 - as torchrun does: into its log, and 1
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _rank(path: Path, before: Callable[[], object]) -> None:
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))
    record(lambda: command("train", path, before))


def _print_to(path: Path) -> None:
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", closefd=False) for descriptor in (1, 2))


@dataclass(frozen=True, kw_only=True, slots=True)
class At:
    """What happens in one process at one step; by itself only in the first attempt."""

    rank: int
    step: int
    act: Callable[[], object]
    clock: Path
    """Folder that gets the times of the fault and of the first step after it."""
    always: bool = False

    def __call__(self) -> None:
        from cogvideox_factory.torch_engine import loop

        first = os.environ.get(FOLDER, "attempt-1").endswith("attempt-1")
        original, mine = loop.Loop._step, os.environ.get("RANK", "0") == str(self.rank)

        def step(this: loop.Loop, number: int, batches: Iterator) -> None:
            if not first and not (self.clock / "again").exists():
                (self.clock / "again").write_text(str(time.monotonic()))
            if number == self.step and mine and (first or self.always):
                (self.clock / "fault").write_text(str(time.monotonic()))
                self.act()
            original(this, number, batches)

        loop.Loop._step = step

    @property
    def recovery_seconds(self) -> float | None:
        """From the fault to the next step."""
        times = [self.clock / name for name in ("fault", "again")]
        if not all(path.exists() for path in times):
            return None
        fault, again = (float(path.read_text()) for path in times)
        return again - fault


def send(number: int) -> Callable[[], None]:
    """Return what sends a signal to its own process."""
    return lambda: os.kill(os.getpid(), number)


def supervised(path: Path, run: Path, size: int, before: Callable[[], object], *, restarts: int = 3) -> int:
    """Do what `cogvideox launch` does, with torchrun in a fork, and return the exit code."""
    launch = Launch(words=(), run_folder=run, num_processes=size, restarts=restarts, grace_seconds=_GRACE)
    supervisor = Supervisor(
        launch=launch, pause_seconds=0.05,
        start=lambda launch, folder, port: ForkedTorchrun(launch, folder, port, path, before),
    )  # fmt: skip
    return supervisor.run()


def _fresh(work: Path) -> Path:
    for name in ("fault", "again"):
        (work / name).unlink(missing_ok=True)
    return empty(work / "run")


def _recovered(
    run: Path, size: int, at: At, want: Wanted, *, says: list[str], **settings: Any
) -> tuple[Verdict, str, int | None]:
    """Run with a fault under the supervisor; it must be named, and the run end as if nothing had been.

    Returned with the steps that were done again, by the supervisor's word on where it went on.
    """
    ended = in_child(supervised, recipe(run, **settings), run, size, at, limit=120.0)
    if ended.broke or ended.value != 0:
        return ended.broke or Verdict.LOST, f"exit {ended.value}: {ended.output}{ended.error}", None
    logs = "".join(path.read_text() for path in run.glob("logs/attempt-1/rank-*.log"))
    if missing := [words for words in says if not _tells(ended.output + logs, words)]:
        return Verdict.SILENT, f"not told: {missing}: {ended.output}", None
    went_on = re.search(r"restart 1 of 3, from the (?:checkpoint of step (\d+)|start)", ended.output)
    if went_on is None:
        return Verdict.SILENT, f"not told where it goes on: {ended.output}", None
    return *same(run, want), at.step - 1 - int(went_on[1] or 0)


def _tells(output: str, words: str) -> bool:
    """Tell whether `words` were said; an agent that forks names the signal of one process only, the first it sees."""
    return words in output or re.sub(r"was ended by SIG\w+", "ended without a word", words) in output


def killed_ranks(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F17: one process of two or three killed at a drawn step, under the supervisor."""
    for trial in range(count):
        rng, run = draws.generator(seed, "kill a rank", str(trial)), _fresh(work)
        size = 2 + trial % 2
        settings = {} if size == 2 else {"batch_size": 6}
        at = At(
            rank=int(rng.integers(size)), step=int(rng.integers(1, STEPS + 1)), act=send(signal.SIGKILL), clock=work
        )
        says = [f"rank {at.rank} was ended by SIGKILL"]
        verdict, detail, lost = _recovered(run, size, at, wanted(size, **settings), says=says, **settings)
        name = f"{trial}: rank {at.rank} of {size} at step {at.step}"
        yield Trial(
            family="F17", name=name, verdict=verdict, detail=detail, steps_redone=lost,
            recovery_seconds=at.recovery_seconds,
        )  # fmt: skip


def frozen_ranks(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F18: one process of two stopped (SIGSTOP); the other's watchdog, or the limit of its collectives, notices."""
    for trial in range(count):
        run, rank, step = _fresh(work), trial // 2 % 2, 3 + trial % 3
        at = At(rank=rank, step=step, act=send(signal.SIGSTOP), clock=work)
        if trial % 2 == 0:
            limit, says = {"hang_seconds": 5.0}, ["no step for", "in _step"]
        else:
            limit, says = {"timeout_seconds": 5.0}, ["no longer answers"]
        verdict, detail, lost = _recovered(run, 2, at, wanted(2), says=says, parallel=limit)
        if verdict == Verdict.OK and (at.recovery_seconds or 1e9) > 60:
            verdict, detail = Verdict.HANG, f"noticed after {at.recovery_seconds} s"
        name = f"{trial}: rank {rank} at step {step}, {next(iter(limit))}"
        yield Trial(
            family="F18", name=name, verdict=verdict, detail=detail, steps_redone=lost,
            recovery_seconds=at.recovery_seconds,
        )  # fmt: skip


def _boom() -> None:
    raise RuntimeError("boom")


def _refuse() -> None:
    raise DataError("this clip cannot be used")


FAILURES: dict[str, tuple[Callable[[], object], int, str]] = {
    "raises": (_boom, _PEER, "RuntimeError: boom"),
    "refuses": (_refuse, 3, "this clip cannot be used"),
    "leaves with exit code 0": (lambda: os._exit(0), _PEER, "rank 1 ended without a word"),
    "segfaults": (send(signal.SIGSEGV), _PEER, "rank 1 was ended by SIGSEGV"),
    "calls sys.exit(0)": (lambda: sys.exit(0), _PEER, "rank 1 ended before the run was done"),
    "aborts": (os.abort, _PEER, "rank 1 was ended by SIGABRT"),
}
"""What a process does, what the run ends with, and what must be told."""


def failing_ranks(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F19: a process raises, refuses, leaves early, crashes; a port is taken; the same step fails again and again."""
    kinds = spread([*FAILURES, "its port is taken", "fails every time"], count)
    for trial in range(count):
        kind, step = kinds[trial % len(kinds)], 2 + trial // len(kinds) % 4
        run = _fresh(work)
        if kind == "its port is taken":
            verdict, detail = _port_taken(run)
        elif kind == "fails every time":
            verdict, detail = _fails_every_time(run, At(rank=1, step=step, act=_boom, clock=work, always=True))
        else:
            act, code, says = FAILURES[kind]
            verdict, detail = _ended_with(run, At(rank=1, step=step, act=act, clock=work), code, says)
        yield Trial(family="F19", name=f"{trial}: {kind} at step {step}", verdict=verdict, detail=detail)


def _ended_with(run: Path, at: At, code: int, says: str) -> tuple[Verdict, str]:
    """One attempt; its exit code and the words for it, then the same command again."""
    ended = in_child(lambda: supervised(recipe(run), run, 2, at, restarts=0))
    if ended.broke or ended.value != code:
        return ended.broke or Verdict.SILENT, f"exit {ended.value}, not {code}: {ended.output}{ended.error}"
    if not _tells(ended.output, says):
        return Verdict.SILENT, f"{says!r} is not told: {ended.output}"
    verdict, detail = goes_on(run, wanted(2), 2)
    return (Verdict.REFUSED, "") if verdict == Verdict.OK else (verdict, detail)


def _fails_every_time(run: Path, at: At) -> tuple[Verdict, str]:
    ended = in_child(supervised, recipe(run), run, 2, at)
    if ended.value != _PEER or "3 attempts in a row came to no new checkpoint" not in ended.output:
        return ended.broke or Verdict.SILENT, f"exit {ended.value}: {ended.output}{ended.error}"
    verdict, detail = goes_on(run, wanted(2), 2)
    return (Verdict.REFUSED, "") if verdict == Verdict.OK else (verdict, detail)


def _port_taken(run: Path) -> tuple[Verdict, str]:
    """Let torchrun be given a port that somebody listens at; it gets another one."""

    def with_a_port_taken() -> int:
        free = supervise.free_port
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            ports = iter([taken.getsockname()[1]])
            with mock.patch.object(supervise, "free_port", side_effect=lambda: next(ports, None) or free()):
                return supervised(recipe(run), run, 2, lambda: None)

    ended = in_child(with_a_port_taken)
    if ended.value != 0 or "ended before it started a process" not in ended.output:
        return ended.broke or Verdict.SILENT, f"exit {ended.value}: {ended.output}{ended.error}"
    return same(run, wanted(2))


def signalled(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F20: told to stop at a drawn time, or a second time in the same step, alone and two under the supervisor."""
    kinds = [[signal.SIGTERM], [signal.SIGINT], [signal.SIGUSR1], [signal.SIGINT] * 2, [signal.SIGHUP]]
    for trial in range(count):
        run, size, numbers = _fresh(work), 1 + trial % 2, kinds[trial % len(kinds)]
        want = wanted(size, **LONGER)
        delay = float(draws.generator(seed, "stop", str(trial)).uniform(0.2, 1.0)) * want.seconds
        is_twice, path = len(numbers) == 2, recipe(run, **LONGER)
        long_step = At(rank=0, step=2 + trial % 8, act=lambda: time.sleep(5), clock=work)
        before = long_step if is_twice else lambda: None
        child = Child(command, "train", path, before) if size == 1 else Child(supervised, path, run, 2, before)
        if is_twice:
            _wait_for(work / "fault")
        else:
            time.sleep(delay)
        os.kill(child.pid, numbers[0])
        for number in numbers[1:]:
            time.sleep(_APART)
            os.kill(child.pid, number)
        ended = child.wait()
        code = codes([ended])[0]
        verdict, detail, lost = _stopped(run, size, code, numbers)
        told = "+".join(number.name for number in numbers)
        name = (
            f"{trial}: {told} {f'in step {long_step.step}' if is_twice else f'after {delay:.2f} s'}, {size} processes"
        )
        if verdict != Verdict.OK:
            detail += ended.output + ended.error
        layer = f"exit {code}"
        yield Trial(family="F20", name=name, verdict=verdict, detail=detail, layer=layer, steps_redone=lost)


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)


def _stopped(run: Path, size: int, code: int | None, numbers: list[signal.Signals]) -> tuple[Verdict, str, int]:
    """Judge a run that was told to stop, and let it go on."""
    want = wanted(size, **LONGER)
    lost = redone(run)
    number = numbers[0]
    allowed = {128 + number} if len(numbers) == 2 else {-number, 128 + number, 0, _STOPPED}
    if code not in allowed:
        return Verdict.CRASH, f"exit {code}: ", lost
    if lost and (len(numbers) == 1 or lost > LONGER["save_every"]):
        return Verdict.LOST, f"exit {code} and {lost} steps to be done again: ", lost
    verdict, detail = left_intact(run, want)
    if verdict == Verdict.OK:
        verdict, detail = goes_on(run, want, size, **LONGER)
    return verdict, detail, lost
