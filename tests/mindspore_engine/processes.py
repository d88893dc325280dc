"""Run a test's function in several processes that msrun starts."""

import os
import pickle
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 600


def run_in(
    num_processes: int, function: Callable[..., Any], *args: Any, folder: Path, limit_seconds: int = LIMIT_SECONDS
) -> list[Any]:
    """Return what `function(*args)` returns in each of `num_processes` processes, in the order of their ranks.

    `function` must be importable, a module's own, and join the others first: the process that msrun starts beside
    them calls it too, and ends there. Whatever one raises fails the test with its traceback.
    """
    (folder / "task").write_bytes(pickle.dumps((function, args)))
    done = launch(num_processes, [__name__, str(folder)], folder=folder, limit_seconds=limit_seconds)
    problems = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not problems, "\n".join(problems)
    results = [folder / f"result-{rank}" for rank in range(num_processes)]
    told = "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted((folder / "logs").glob("*.log")))
    assert all(map(Path.exists, results)), f"msrun ended with {done.returncode}: {done.stdout}{told}"
    return [pickle.loads(path.read_bytes()) for path in results]  # noqa: S301 - our own children wrote them


def launch(
    num_processes: int, words: list[str], *, folder: Path, check: bool = False, limit_seconds: int = LIMIT_SECONDS
) -> subprocess.CompletedProcess[str]:
    """Run `python -m WORDS` in `num_processes` processes of msrun, their output in `folder`/logs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    own = Path(sys.executable).parent  # msrun starts the `python` of PATH
    environment = os.environ | {"PATH": f"{own}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [
            str(own / "msrun"), f"--worker_num={num_processes}", f"--local_worker_num={num_processes}",
            f"--master_port={port}", f"--log_dir={folder / 'logs'}", "--join=True", "python", "-m", *words,
        ],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = started.communicate(timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGINT)  # the one at which it takes its processes with it
        started.communicate()
        raise
    done = subprocess.CompletedProcess(started.args, started.returncode, out, err)
    if check:
        done.check_returncode()
    return done


def _run(folder: Path) -> None:
    from cogvideox_factory.mindspore_engine.device import pick_device

    pick_device("auto")
    rank = os.environ["RANK_ID"]
    function, args = pickle.loads((folder / "task").read_bytes())  # noqa: S301 - our own parent wrote it
    try:
        (folder / f"result-{rank}").write_bytes(pickle.dumps(function(*args)))
    except Exception:
        if os.environ["MS_ROLE"] == "MS_SCHED":  # what it says is of others' ends
            raise
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise


if __name__ == "__main__":
    _run(Path(sys.argv[1]))
