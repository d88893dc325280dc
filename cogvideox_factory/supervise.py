"""A run on many cards, started, and started again after a crash.

Every attempt is a fresh torchrun (or msrun) with a port of its own: torchrun's own restarts go on with a store that
keeps what the dead attempt wrote, and come to nothing now and then. A process that refuses (exit codes 2 to 7) would
refuse again, so only crashes are tried again, from the newest checkpoint; and those no longer once the same step has
failed three times.

Nothing here needs a framework. Of several machines each runs one of these, with the same words.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

from cogvideox_factory.attempt import FOLDER, STARTED, Ends, Processes, last_lines, read_ends
from cogvideox_factory.checkpoints import list_checkpoints
from cogvideox_factory.errors import PeerError, StorageError
from cogvideox_factory.metrics import say
from cogvideox_factory.stopping import StoppedError, lead_nowhere, stop_handler

_REFUSALS = range(2, 8)
_SAME_STEP = 3
"""Failures without a new checkpoint between them, after which another attempt is for nothing."""
_NO_START = 3
"""Launchers in a row that may end before a process of the run begins."""
_LONGEST_PAUSE_SECONDS = 60.0
_POLL_SECONDS = 0.1
_MSRUN_SECONDS = 3.0
"""Within which msrun sees that a process has ended, and ends the others."""
_SHOWN_LINES = 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """What to start, how often, and where."""

    words: tuple[str, ...]
    """What follows `cogvideox`."""
    engine: str = "torch"
    """Whose launcher: torchrun, or with "mindspore" msrun."""
    run_folder: Path
    num_processes: int
    """On this machine, and on every other."""
    num_nodes: int = 1
    node_rank: int = 0
    master_addr: str = "127.0.0.1"
    """Where the first machine is reached."""
    master_port: int | None = None
    """Of the first attempt on the first machine; later ones count up. None: any that is free."""
    restarts: int = 3
    """After crashes, in all."""
    grace_seconds: float = 10.0
    """How long the other processes may go on once one has crashed."""
    started: float = field(default_factory=time.monotonic)
    """When it began; what limits a run's time counts from there, whatever attempt it is in."""

    @property
    def launcher(self) -> str:
        """What starts the processes."""
        return "msrun" if self.engine == "mindspore" else "torchrun"

    @property
    def ranks(self) -> range:
        """The processes of this machine."""
        return range(self.node_rank * self.num_processes, (self.node_rank + 1) * self.num_processes)


class Agent(Protocol):
    """A launcher that was started: what is needed of a `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return its exit code, or None while it runs."""
        ...

    def send_signal(self, number: int, /) -> None:
        """Send it a signal."""
        ...


def start_launcher(launch: Launch, folder: Path, port: int) -> Agent:
    """Start an attempt that is recorded in `folder`."""
    return (start_msrun if launch.launcher == "msrun" else start_torchrun)(launch, folder, port)


def start_torchrun(launch: Launch, folder: Path, port: int) -> Agent:
    """Start an attempt that is recorded in `folder`, by torchrun."""
    environment = dict(os.environ)
    if launch.num_nodes == 1 and sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine needs no network
    words = [
        sys.executable, "-m", "torch.distributed.run", "--max-restarts=0", f"--nproc-per-node={launch.num_processes}",
        f"--nnodes={launch.num_nodes}", f"--node-rank={launch.node_rank}", f"--master-addr={launch.master_addr}",
        f"--master-port={port}", "-m", "cogvideox_factory", *launch.words,
    ]  # fmt: skip
    return _start(words, environment, launch, folder)


def start_msrun(launch: Launch, folder: Path, port: int) -> Agent:
    """Start an attempt that is recorded in `folder`, by msrun."""
    own = str(Path(sys.executable).parent)
    # It starts the `python` it finds, and warns of what is meant so.
    environment = os.environ | {"PATH": os.pathsep.join([own, os.environ.get("PATH", os.defpath)]), "GLOG_v": "3"}
    words = [
        sys.executable, "-m", "mindspore.parallel.cluster.run", "--join=True", f"--log_dir={folder.absolute()}",
        "--tail_worker_log=-2", f"--worker_num={launch.num_processes * launch.num_nodes}",
        f"--local_worker_num={launch.num_processes}", f"--master_addr={launch.master_addr}", f"--master_port={port}",
        *([f"--node_rank={launch.node_rank}"] if launch.num_nodes > 1 else []),
        "python", "-m", "cogvideox_factory", *launch.words,
    ]  # fmt: skip
    return _Msrun(_start(words, environment, launch, folder))


class _Msrun:
    """A msrun that was started; SIGINT is the one signal at which it takes its processes with it."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    def poll(self) -> int | None:
        return self._agent.poll()

    def send_signal(self, number: int, /) -> None:
        self._agent.send_signal(signal.SIGINT if number == signal.SIGTERM else number)


def _start(words: list[str], environment: dict[str, str], launch: Launch, folder: Path) -> Agent:
    environment = environment | {FOLDER: str(folder.absolute()), STARTED: repr(launch.started)}
    with (folder / f"node-{launch.node_rank}.log").open("ab") as log:
        # In a session of its own: Ctrl-C in a terminal reaches every process once, through the supervisor.
        return subprocess.Popen(
            words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


@dataclass(kw_only=True, slots=True)
class Supervisor:
    """One machine's part of a run, over all attempts."""

    launch: Launch
    start: Callable[[Launch, Path, int], Agent] = start_launcher
    pause_seconds: float = 1.0
    """Before the first restart; every further one waits twice as long, up to a minute."""
    _asked: list[int] = field(default_factory=list)
    _sent: int = 0

    def run(self) -> int:
        """Return the run's exit code: 0, that of a refusal, 75 when it was stopped on request, 8 after crashes.

        Raises:
            StorageError: the log folder cannot be written.
        """
        first = number = self._next_number()
        restarts = unmoved = stillborn = 0
        with stop_handler(self._note):
            while not self._asked:
                before = self._newest()
                ends = self._attempt(number, tries=number - first)
                if (code := self._verdict(ends)) is not None:
                    return code
                number += 1
                if not set(ends.codes) & set(self.launch.ranks):
                    stillborn += 1
                    said = self._launcher_said(ends)
                    _tell(f"{self.launch.launcher} ended before it started a process{said}")
                    if stillborn == _NO_START:
                        return PeerError.exit_code
                    self._pause(stillborn)
                    continue
                stillborn = 0
                unmoved = 1 if self._newest() != before else unmoved + 1
                if unmoved == _SAME_STEP or restarts == self.launch.restarts:
                    _tell(self._given_up(ends, unmoved, restarts))
                    return PeerError.exit_code
                restarts += 1
                _tell(f"restart {restarts} of {self.launch.restarts}, {self._from_where()}")
                self._pause(restarts)
        return 128 + self._asked[0]

    def _attempt(self, number: int, *, tries: int) -> Ends:
        """Start a launcher and see it to its end."""
        launch, folder = self.launch, self._folder(number)
        port = free_port() if launch.master_port is None else launch.master_port + tries
        agent = self.start(launch, folder, port)
        processes = Processes(folder=folder, ranks=launch.ranks)
        echo = _Echo(folder / "rank-0.log") if 0 in launch.ranks else None
        crashed_at = None
        while agent.poll() is None:
            time.sleep(_POLL_SECONDS)
            processes.look()
            self._pass_on(agent, processes)
            if crashed_at is None and processes.crashed():
                crashed_at = time.monotonic()
            if crashed_at is not None and time.monotonic() > crashed_at + launch.grace_seconds:
                processes.kill()
            if self._waits_for_the_dead(processes, crashed_at):
                agent.send_signal(signal.SIGINT)
            if echo:
                echo.go_on()
        processes.look()
        processes.kill()  # what an ended launcher has left
        processes.close()
        if echo:
            echo.go_on()
        return read_ends(folder, put_down=processes.put_down)

    def _waits_for_the_dead(self, processes: Processes, crashed_at: float | None) -> bool:
        """Tell whether msrun has seen all its processes end but the one that joined them, which lives on for long."""
        seen = crashed_at is not None and time.monotonic() > crashed_at + _MSRUN_SECONDS
        return seen and self.launch.launcher == "msrun" and not processes.alive

    def _pass_on(self, agent: Agent, processes: Processes) -> None:
        """Pass signals on: to the processes themselves, since launchers kill them, at once or half a minute later."""
        for number in self._asked[self._sent :]:
            self._sent += 1
            if self._sent > 2:
                processes.kill()
            elif processes.begun == set(self.launch.ranks):
                processes.send(number)
            else:
                agent.send_signal(signal.SIGTERM)

    def _verdict(self, ends: Ends) -> int | None:
        """Return the exit code to end with, or None after a crash; tell what happened."""
        codes = ends.codes
        if set(codes.values()) == {0} and set(codes) >= set(self.launch.ranks):
            return 0
        if StoppedError.exit_code in codes.values():
            return StoppedError.exit_code
        if self._asked:
            return 128 + self._asked[0]
        for rank in ends.causes:
            echoed = rank == 0 and 0 in self.launch.ranks
            _tell(ends.told(rank) + ("" if echoed else ends.last_words(rank, _SHOWN_LINES)))
        refusals = [code for code in codes.values() if code in _REFUSALS]
        return refusals[0] if refusals else None

    def _given_up(self, ends: Ends, unmoved: int, restarts: int) -> str:
        if unmoved == _SAME_STEP:
            why = f"{unmoved} attempts in a row came to no new checkpoint, so another would not either"
        else:
            why = f"all {restarts} restarts (--restarts) are used up"
        return f"error: {why}; {self._from_where()} the same command goes on. Outputs: {ends.folder.parent}"

    def _from_where(self) -> str:
        newest = self._newest()
        return "from the start" if newest is None else f"from the checkpoint of step {newest}"

    def _launcher_said(self, ends: Ends) -> str:
        return last_lines(ends.folder / f"node-{self.launch.node_rank}.log", _SHOWN_LINES)

    def _newest(self) -> int | None:
        steps = list_checkpoints(self.launch.run_folder)
        return steps[-1] if steps else None

    def _next_number(self) -> int:
        """Return the number of the next attempt; each machine counts those it took part in, and so all agree."""
        mine = self.launch.run_folder.glob(f"logs/attempt-*/node-{self.launch.node_rank}.log")
        numbers = [path.parent.name.removeprefix("attempt-") for path in mine]
        return 1 + max((int(number) for number in numbers if number.isdecimal()), default=0)

    def _folder(self, number: int) -> Path:
        folder = self.launch.run_folder / "logs" / f"attempt-{number}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"node-{self.launch.node_rank}.log").touch()
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error.strerror}. Choose another --train.dir.") from error
        return folder

    def _pause(self, times: int) -> None:
        end = time.monotonic() + min(self.pause_seconds * 2 ** (times - 1), _LONGEST_PAUSE_SECONDS)
        while time.monotonic() < end and not self._asked:
            time.sleep(_POLL_SECONDS)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked.append(number)


class _Echo:
    """Shows a growing log on the console."""

    def __init__(self, path: Path) -> None:
        self._path, self._place = path, 0

    def go_on(self) -> None:
        """Show what came since."""
        if not self._path.is_file():
            return
        with self._path.open("rb") as file:
            file.seek(self._place)
            new = file.read()
        self._place += len(new)
        try:
            sys.stdout.buffer.write(new)
            sys.stdout.flush()
        except OSError:  # nobody reads us any more; the run goes on
            lead_nowhere(sys.stdout.fileno())


def _tell(text: str) -> None:
    """Say something, if anybody still reads."""
    try:
        say(text)
    except (OSError, SystemExit):  # rich ends a program whose reader is gone; this one watches over a run
        lead_nowhere(sys.stdout.fileno())


def free_port() -> int:
    """Return a port of this machine that nobody listens at now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
