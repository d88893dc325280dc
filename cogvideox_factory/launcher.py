"""What a launcher tells each process it starts: torchrun in WORLD_SIZE and RANK, msrun in MS_WORKER_NUM and RANK_ID.

msrun starts one process more on the first machine, with the same words, which only brings the others together.
"""

from collections.abc import Mapping


def num_processes(environment: Mapping[str, str]) -> int:
    """Return how many processes there are of the run, 1 without a launcher."""
    return int(environment.get("MS_WORKER_NUM") or environment.get("WORLD_SIZE") or "1")


def rank_of(environment: Mapping[str, str]) -> int:
    """Return the number of this process, from 0."""
    return int(environment.get("RANK_ID" if environment.get("MS_WORKER_NUM") else "RANK") or "0")


def only_introduces(environment: Mapping[str, str]) -> bool:
    """Tell whether this is the process of msrun that has no work of its own; it ends where the others are joined."""
    return environment.get("MS_ROLE") == "MS_SCHED"
