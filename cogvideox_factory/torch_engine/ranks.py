"""The processes of a run: who takes which clips and which rows of the token stream, and what they tell one another.

How they divide the work is in the `Layout` of the ground; the grid of the weights in `sharding`.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.errors import FactoryError, PeerError
from cogvideox_factory.ranks import AgreedError, Layout, Place, require_same
from cogvideox_factory.torch_engine.exhausted import is_out_of_memory
from cogvideox_factory.torch_engine.sequence_parallel import SequenceGroup, ulysses_degree

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_PARTING_SECONDS = 5.0
_partings = count()

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Ranks(Place):
    """This process among those of its run; with one process there is nothing to talk about and no group."""

    mesh: "DeviceMesh | None" = None
    """Of the weights, (replicas, shards)."""
    sequence: SequenceGroup | None = None
    guidance: dist.ProcessGroup | None = None
    """The two ranks that exchange predictions; the first has the negative prompt's."""
    video: dist.ProcessGroup | None = None
    """Those that have the same clips, or make a video together."""
    talk: dist.ProcessGroup | None = None
    """For what is said on the host, beside the devices' traffic."""

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of `x` over all processes."""
        if self.mesh is None:
            return x
        x = x.clone()
        dist.all_reduce(x)
        return x / self.layout.size

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes in their order; each calls this at the same point."""
        if self.mesh is None:
            return [value]
        values: list[Any] = [None] * self.layout.size
        dist.all_gather_object(values, value, group=self.talk)
        return values

    def over_shards(self, x: Tensor) -> Tensor:
        """Return the sum of `x` over the processes that divide a copy of the weights among them."""
        if self.mesh is None or self.layout.grid[1] == 1:
            return x
        total = x.clone()
        dist.all_reduce(total, group=self.mesh.get_group("shards"))
        return total

    def agree(self, value: str | None) -> str | None:
        """Return the value of the first process that has one; each calls this at the same point."""
        return next((v for v in self.gather(value) if v is not None), None)

    def require_agreement(self, facts: Mapping[str, Any]) -> None:
        """Compare `facts` with the other processes'.

        Raises:
            FactoryError: in all processes, naming the first that differs from the leading one, and in what.
        """
        if self.talk is not None:
            _require_agreement(facts, self.talk)

    def together(self, function: Callable[[], T]) -> T:
        """Return what `function()`, which may not talk to other processes, returns in this one, if it failed in none.

        Raises:
            AgreedError: in all, after a wrong request or file, a disk or a device's memory failed it in one.
        """
        problem, results = None, []
        try:
            results.append(function())
        except (FactoryError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            problem = str(error)
        if (problem := self.agree(problem)) is not None:
            raise AgreedError(problem)
        return results[0]

    def from_lead(self, function: Callable[[], T]) -> T:
        """Return what `function()` returns in the leading process, in all.

        Raises:
            FactoryError: what it raises there, in all; the others' is `echoed`, so that one tells the user.
        """
        if self.mesh is None:
            return function()
        box: list[Any] = [None, None]
        if self.leads:
            try:
                box[0] = function()
            except FactoryError as error:
                box[1] = error
        dist.broadcast_object_list(box, src=0, group=self.talk)
        result, error = box
        if error is not None:
            error.echoed = not self.leads
            raise error
        return result


def num_processes() -> int:
    """Return how many processes the launcher (torchrun) started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads_machine() -> bool:
    """Whether this process is the first of its machine, and looks at the files there for all of them."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


@contextmanager
def joined(layout: Layout, *, num_heads: int, device: torch.device, timeout_seconds: float = 1800) -> Iterator[Ranks]:
    """Join the other processes for the duration.

    Args:
        layout: of the run, the same in every process.
        num_heads: of the model, which Ulysses divides.
        device: of this process.
        timeout_seconds: after which a collective that a rank did not come to is an error.

    Raises:
        PeerError: another process ended or no longer answers.
    """
    if layout.size == 1:
        yield Ranks(layout=layout)
        return
    mine = not dist.is_initialized()
    ranks = None
    try:
        if mine:
            dist.init_process_group(timeout=timedelta(seconds=timeout_seconds), device_id=_indexed(device))
        ranks = make_ranks(layout, num_heads=num_heads, device_type=device.type, timeout_seconds=timeout_seconds)
        yield ranks
        _part(ranks)
    except RuntimeError as error:
        if not _is_broken_link(error):
            raise
        raise PeerError(
            f"another process of the run ended or no longer answers ({_first_line(error)}). What it printed last says "
            "why; the same command goes on from the newest checkpoint."
        ) from error
    except FactoryError:
        if ranks:
            _part(ranks)
        raise
    finally:
        if mine and dist.is_initialized():
            dist.destroy_process_group()


def _part(ranks: Ranks) -> None:
    """Wait a little for the others, since a connection that closes cuts off whoever still reads from it.

    They come if the run is over or refused in all of them; if it failed here alone, they will not. Said through the
    store and not by a barrier, which could not be given up.
    """
    number = next(_partings)  # every process counts alike
    names = [f"parting/{number}/{rank}" for rank in range(ranks.layout.size)]
    with suppress(RuntimeError):  # the store is gone with the process that keeps it
        store = dist.distributed_c10d._get_default_store()
        store.set(names[ranks.rank], "")
        end = time.monotonic() + _PARTING_SECONDS
        while not store.check(names) and time.monotonic() < end:
            time.sleep(0.02)


def _is_broken_link(error: RuntimeError) -> bool:
    """Tell whether `error` is a collective's; gloo's are plain ones, known by the file they come from."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error) or "ProcessGroup" in str(error)


def _first_line(error: RuntimeError) -> str:
    return str(error).strip().split("\n")[0].split("] ", 1)[-1].split(". This is")[0]


def _indexed(device: torch.device) -> torch.device | None:
    return device if device.index is not None else None


def make_ranks(layout: Layout, *, num_heads: int, device_type: str, timeout_seconds: float = 1800) -> Ranks:
    """Return this process' place; the process group must exist, and every process must call this alike.

    Every group made here waits `timeout_seconds`: torch would give each its own default, ten minutes on a card.
    """
    assert layout.size == dist.get_world_size(), layout
    patience = timedelta(seconds=timeout_seconds)
    talk = _new_group(range(layout.size), patience, backend="gloo")
    _require_agreement({f"parallel.{name}": value for name, value in asdict(layout).items()}, talk)
    sequence = _sequence_group(layout, num_heads, patience) if layout.sequence > 1 else None
    guidance, video = None, sequence.group if sequence else None
    if layout.guidance > 1:
        videos = _neighbours(layout, layout.num_video_ranks)
        pairs = (members[i :: layout.sequence] for members in videos for i in range(layout.sequence))
        guidance, video = _own_group(pairs, patience), _own_group(videos, patience)
    return Ranks(
        layout=layout, rank=dist.get_rank(), mesh=_mesh(layout, device_type, patience), sequence=sequence,
        guidance=guidance, video=video, talk=talk,
    )  # fmt: skip


def _mesh(layout: Layout, device_type: str, patience: timedelta) -> "DeviceMesh":
    """Return the grid of the weights; torch makes its groups, and does not ask how long they wait."""
    from torch.distributed.device_mesh import init_device_mesh  # with DTensor, which takes a second

    mesh = init_device_mesh(device_type, layout.grid, mesh_dim_names=("replicas", "shards"))
    for group in mesh.get_all_groups():
        if group is not dist.group.WORLD:
            dist.distributed_c10d._set_pg_timeout(patience, group)
    return mesh


def _require_agreement(facts: Mapping[str, Any], talk: dist.ProcessGroup) -> None:
    all_facts: list[Any] = [None] * dist.get_world_size(talk)
    dist.all_gather_object(all_facts, dict(facts), group=talk)
    require_same(all_facts, leads=dist.get_rank() == 0)


def _sequence_group(layout: Layout, num_heads: int, patience: timedelta) -> SequenceGroup:
    """Make the groups of all sequences, as every process must, and return this one's."""
    size = layout.sequence
    ulysses = ulysses_degree(size, num_heads, layout.ring)
    sequences = _neighbours(layout, size)
    neighbours = [members[i : i + ulysses] for members in sequences for i in range(0, size, ulysses)]
    rings = [members[i::ulysses] for members in sequences for i in range(ulysses)]
    return SequenceGroup(
        rank=dist.get_rank() % size,
        group=_own_group(sequences, patience),
        ulysses=_own_group(neighbours, patience),
        ring=_own_group(rings, patience),
    )


def _neighbours(layout: Layout, count: int) -> list[list[int]]:
    return [list(range(first, first + count)) for first in range(0, layout.size, count)]


def _own_group(groups: Iterable[Iterable[int]], patience: timedelta) -> dist.ProcessGroup:
    """Make all `groups`, which every process is in one of, and return this one's."""
    found = None
    for ranks in map(list, groups):
        group = _new_group(ranks, patience)
        found = group if dist.get_rank() in ranks else found
    assert found is not None
    return found


def _new_group(ranks: Iterable[int], patience: timedelta, backend: str | None = None) -> dist.ProcessGroup:
    """Make a group of processes; those outside get a placeholder."""
    return cast(dist.ProcessGroup, dist.new_group(list(ranks), timeout=patience, backend=backend))
