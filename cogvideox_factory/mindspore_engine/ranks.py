"""The processes of a run, which msrun starts: who takes what, and what they tell one another.

How they divide the work is in the `Layout` of the ground; what they send of tensors in `collectives`. msrun starts one
process more, which brings the others together: it runs the same program, and ends in `join`. So nothing may be written
before that.
"""

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
from mindspore import Tensor
from mindspore.communication import GlobalComm, get_group_size, get_rank, init

from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.launcher import only_introduces
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.collectives import Group, all_gather, all_reduce
from cogvideox_factory.ranks import AgreedError, Layout, Place, require_same

_PARTING_SECONDS = 2.0

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranks(Place):
    """This process among those of its run; with one process there is nothing to talk about and no group."""

    everyone: Group | None = None
    sequence: Group | None = None
    """Those that divide a token stream."""
    shards: Group | None = None
    """Those that divide a copy of what `layout.zero` divides."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over all processes."""
        return x if self.everyone is None else all_reduce(x, self.everyone) / self.layout.size

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, which JSON can say, in their order; each calls this at the same point."""
        if self.everyone is None:
            return [value]
        data = json.dumps(value).encode()
        lengths = to_array(all_gather(to_tensor(np.array([len(data)], np.int32)), self.everyone))
        padded = np.zeros(lengths.max(), np.int32)  # collectives of a CPU have no bytes
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        rows = to_array(all_gather(to_tensor(padded), self.everyone)).reshape(len(lengths), -1)
        return [json.loads(row[:length].astype(np.uint8).tobytes()) for row, length in zip(rows, lengths, strict=True)]

    def agree(self, value: str | None) -> str | None:
        """Return the value of the first process that has one; each calls this at the same point."""
        return next((v for v in self.gather(value) if v is not None), None)

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Compare `facts` with the other processes'.

        Raises:
            FactoryError: in all processes, naming the first that differs from the leading one, and in what.
        """
        require_same(self.gather(dict(facts)), leads=self.leads)

    def together(self, function: Callable[[], T]) -> T:
        """Return what `function()`, which may not talk to other processes, returns in this one, if it failed in none.

        Raises:
            AgreedError: in all, after a wrong request or file or a disk failed it in one; with that one's exit code.
        """
        if self.everyone is None:
            return function()
        problem, results = None, []
        try:
            results.append(function())
        except (FactoryError, OSError) as error:
            problem = str(error), getattr(error, "exit_code", StorageError.exit_code)
        if found := next(filter(None, self.gather(problem)), None):
            error = AgreedError(found[0])
            error.exit_code = found[1]
            raise error
        return results[0]

    def from_lead(self, function: Callable[[], T]) -> T:
        """Return what `function()` returns in the leading process, in all; JSON can say it.

        Raises:
            FactoryError: what it raises there, in all; the others' is `echoed`, so that one tells the user.
        """
        if self.everyone is None:
            return function()
        told: dict[str, Any] = {}
        failed = None
        if self.leads:
            try:
                told = {"result": function()}
            except FactoryError as error:
                told, failed = {"kind": type(error).__name__, "text": str(error)}, error
        told = self.gather(told)[0]
        if failed is not None:
            raise failed
        if "kind" in told:
            kinds = {kind.__name__: kind for kind in FactoryError.__subclasses__()}
            error = kinds.get(told["kind"], FactoryError)(told["text"])
            error.echoed = True
            raise error
        return told["result"]

    @contextmanager
    def going_together(self) -> Iterator[None]:
        """Let the leading process go first where all fail: msrun ends the others as soon as one has ended."""
        try:
            yield
        except FactoryError:
            if not self.leads:
                time.sleep(_PARTING_SECONDS)
            raise

    def lead_through(self, arrays: Iterator[Any], write: Callable[[], None]) -> None:
        """Let the leading process `write` what it takes from `arrays`, in the making of which all take part.

        Raises:
            StorageError: its disk failed; in all processes.
        """
        problem = None
        if self.leads:
            try:
                write()
            except StorageError as error:
                problem = error
        deque(arrays, maxlen=0)  # the others wait for their parts to be asked for, to the end
        self.from_lead(lambda: _raise(problem))


def _raise(problem: StorageError | None) -> None:
    if problem is not None:
        raise problem


ALONE = Ranks(layout=Layout())
"""One process."""


def num_processes() -> int:
    """Return how many processes msrun started.

    Raises:
        FactoryError: torchrun started this one.
    """
    count = int(os.environ.get("MS_WORKER_NUM", "1"))
    if count == 1 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FactoryError(
            f"{os.environ['WORLD_SIZE']} processes were started by torchrun, which MindSpore cannot join. Start it "
            f"with msrun: msrun --worker_num {os.environ['WORLD_SIZE']} --local_worker_num N --join=True python "
            "-m cogvideox_factory ...; or use --engine torch."
        )
    return count


def join(layout: Layout, *, timeout_seconds: float = 1800) -> Ranks:
    """Join the other processes; call this after the device is chosen and before any tensor is made.

    Args:
        layout: of the run, the same in every process.
        timeout_seconds: after which a collective that a rank did not come to is an error (a CPU's; HCCL has its own).

    Raises:
        FactoryError: processes of different layouts.
    """
    if layout.size == 1:
        return Ranks(layout=layout)
    if not GlobalComm.INITED:
        if not only_introduces(os.environ):  # that one waits for whoever died so long, and the launcher for it
            os.environ.setdefault("MS_NODE_TIMEOUT", str(round(timeout_seconds)))  # 30 unless it is said
        init()
    return make_ranks(layout)


def make_ranks(layout: Layout) -> Ranks:
    """Return this process' place, once it joined; every process must call this alike.

    Raises:
        FactoryError: processes of different layouts.
    """
    size, rank, shards = layout.size, get_rank(), layout.grid[1]
    assert size == get_group_size(), layout
    ranks = Ranks(
        layout=layout, rank=rank, everyone=_neighbours(size, rank=rank, size=size),
        sequence=_neighbours(layout.sequence, rank=rank, size=size) if layout.sequence > 1 else None,
        shards=_neighbours(shards, rank=rank, size=size) if shards > 1 else None,
    )  # fmt: skip
    ranks.require_agreement({f"parallel.{name}": value for name, value in asdict(layout).items()})
    return ranks


def _neighbours(count: int, *, rank: int, size: int) -> Group:
    """Return the group of `count` neighbours, counted from the first of `size`, that this process is of."""
    first = rank // count * count
    return Group(members=tuple(range(first, first + count)), index=rank - first, world=size)
