"""Run a test's function in several processes that talk to each other by gloo."""

import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

LIMIT_SECONDS = 240


def run_in(num_processes: int, function: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Return what `function(*args)` returns in each of `num_processes` processes, in the order of their ranks.

    `function` must be importable: a module's own. Whatever one raises fails the test with its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "cogvideox_factory.torch_engine.sharding", function.__module__])
    store = folder / f"store-{os.urandom(4).hex()}"
    processes = [
        context.Process(target=_run, args=(rank, num_processes, store, folder, function, args), daemon=True)
        for rank in range(num_processes)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(LIMIT_SECONDS)
    hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for rank in hung:
        processes[rank].kill()
    problems = [path.read_text() for path in sorted(folder.glob("error-*"))]
    assert not problems, "\n".join(problems)
    assert not hung, f"ranks {hung} did not come to an end"
    codes = [process.exitcode for process in processes]
    assert not any(codes), f"processes ended with {codes}"
    written = [(folder / f"result-{rank}").read_bytes() for rank in range(num_processes)]
    return [pickle.loads(result) for result in written]  # noqa: S301 - our own children wrote them


def _run(rank: int, size: int, store: Path, folder: Path, function: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    try:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        result = function(*args)
        torch.distributed.barrier()
        (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
        torch.distributed.destroy_process_group()
    except BaseException:
        (folder / f"error-{rank}").write_text(f"rank {rank}:\n{traceback.format_exc()}")
        raise
