"""The state of a run, to disk and back: every process writes and reads what it holds of it.

The folder is described in `checkpoints`. Shards are in the format of torch's DCP (`HuggingFaceStorageReader` reads
them), but written and read here: DCP shuffles its headers, so that a state saved twice gives two files, holds a shard
twice in memory, talks to other processes while it writes, and maps what it reads.
"""

import json
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from cogvideox_factory.checkpoints import (
    FORMAT,
    MANIFEST,
    STATE,
    checkpoint_folder,
    digest,
    prune,
    read_state,
    verify_checkpoint,
)
from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.publish import publish_folder, require_room, sync_file
from cogvideox_factory.ranks import Layout
from cogvideox_factory.tensors import TensorFile, open_tensors, save_tensors
from cogvideox_factory.torch_engine.border import local, rows_of, to_array, to_tensor
from cogvideox_factory.torch_engine.ranks import Ranks

_OFFSETS = "DCP_SHARDING_INFO"
"""Key of the header under which DCP keeps {name: {"saved_offsets": [...]}}."""
_ALONE = Ranks(layout=Layout())


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Rows of a tensor of the state, from row `start` on."""

    tensor: Tensor
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Word:
    """What a process tells the others about its part of a save."""

    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Size and SHA-256 of what it wrote."""
    problem: str = ""
    is_bug: bool = False
    """The problem is not the disk's."""


def own_parts(tensors: Mapping[str, Tensor], ranks: Ranks = _ALONE) -> dict[str, Part]:
    """Return what this process has to write of `tensors`, so that all together write every row once.

    What several hold is written by one of them: rows of which there are copies by the holder that has least to write
    so far, tensors that are not divided at all by the leading process.
    """
    parts: dict[str, Part] = {}
    written = [0] * ranks.layout.grid[0]
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        if not isinstance(tensor, DTensor):
            if ranks.leads:
                parts[name] = Part(tensor=_at_least_1d(tensor), start=0)
            continue
        copies = [axis for axis, placement in enumerate(tensor.placements) if isinstance(placement, Replicate)]
        assert copies in ([], [0]), tensor.placements  # of the mesh (replicas, shards)
        writer = min(range(len(written)), key=written.__getitem__)
        written[writer] += tensor.numel() * tensor.element_size()
        if not copies or tensor.device_mesh.get_local_rank(0) == writer:
            start, stop = rows_of(tensor)
            if stop > start:
                parts[name] = Part(tensor=local(tensor), start=start)
    return parts


class Draft:
    """A checkpoint in the making: opened and committed by all processes together, written by each on its own.

    Raises:
        StorageError: no room or no permission.
    """

    def __init__(
        self, run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, ranks: Ranks = _ALONE
    ) -> None:
        self.step = step
        self.target = checkpoint_folder(run, step)
        self.word: Word | None = None
        """How writing went here; None until it is over."""
        self._ranks = ranks
        self._error: Exception | None = None
        text = json.dumps({"format": FORMAT, "step": step, "tensors": sorted(tensors), **state}, indent=1)
        num_bytes = sum(t.numel() * t.element_size() for t in tensors.values())
        self._making = _make_folder(self.target, text, num_bytes)
        self._folder = ranks.from_lead(lambda: next(self._making))

    def write(self, parts: Mapping[str, Part]) -> None:
        """Write the parts of this process, in any thread: it talks to nobody, and what goes wrong is in `word`."""
        file = self._folder / f"shard-{self._ranks.rank + 1:05}.safetensors"
        try:
            files = {}
            if parts:
                _write_shard(file, parts)
                files = {file.name: digest(file)}
            self.word = Word(files=files)
        except StorageError as error:
            self.word = Word(problem=str(error))
        except OSError as error:
            reason = error.strerror or error
            self.word = Word(problem=f"could not write {file}: {reason}. Make room or choose another --train.dir.")
        except Exception as error:  # noqa: BLE001 - in a thread it would be lost; `commit` raises it
            self._error = error
            self.word = Word(problem=f"process {self._ranks.rank}: {type(error).__name__}: {error}", is_bug=True)

    def commit(self, words: Sequence[Word], *, keep: int) -> Path:
        """Make the folder final if all processes wrote, and drop all but the newest `keep`; all or nothing.

        Args:
            words: of all processes, in order.
            keep: complete checkpoints that stay, this one among them.

        Raises:
            StorageError: some process could not write; nothing of this checkpoint is left then.
        """
        problem = next((word.problem for word in words if word.problem), None)
        if any(word.is_bug for word in words):
            self.abandon()
            raise self._error or RuntimeError(f"{self.target} was not saved: {problem}")
        self._ranks.from_lead(lambda: self._finish(words, problem))
        if self._ranks.leads:
            for why in prune(self.target.parent, keep=keep, newest=self.step):
                say(f"{self.target} is saved, but an older one stays: {why}")
        return self.target

    def _finish(self, words: Sequence[Word], problem: str | None) -> None:
        if problem:
            self._making.throw(StorageError(problem))
        try:
            self._making.send({name: entry for word in words for name, entry in word.files.items()})
        except StopIteration:
            return

    def abandon(self) -> None:
        """Remove what there is of it; a thread that still writes then fails, which nobody waits for."""
        self._making.close()


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, keep: int, ranks: Ranks = _ALONE
) -> Path:
    """Write the state after update number `step`, then drop all but the newest `keep` complete checkpoints.

    Raises:
        StorageError: no room or no permission; older checkpoints stay as they are.
    """
    draft = Draft(run, step, tensors, state, ranks=ranks)
    draft.write(own_parts(tensors, ranks))
    assert draft.word is not None
    return draft.commit(ranks.gather(draft.word), keep=keep)


def _make_folder(target: Path, state: str, num_bytes: int) -> Generator[Path, dict[str, Any]]:
    """Yield the folder to write shards into; sent what they are, complete it."""
    require_room(target.parent, num_bytes, what=f"checkpoint {target.name}")
    with publish_folder(target) as folder:
        shards = yield folder
        (folder / STATE).write_text(state, encoding="utf-8")
        manifest = dict(sorted({**shards, STATE: digest(folder / STATE)}.items()))
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write_shard(file: Path, parts: Mapping[str, Part]) -> None:
    offsets = {
        name: {"saved_offsets": [part.start] + [0] * (part.tensor.ndim - 1)} for name, part in sorted(parts.items())
    }
    arrays = {name: to_array(part.tensor) for name, part in parts.items()}
    save_tensors(file, arrays, metadata={_OFFSETS: json.dumps(offsets), "DCP_VERSION": "1.0"}, seal=False)
    sync_file(file)


def load_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], *, ranks: Ranks = _ALONE, verified: bool = False, only: str = ""
) -> dict[str, Any]:
    """Verify `folder`, fill `tensors` in place and return its state; it may come from any other layout of processes.

    The leading process reads all of it once, unless it is `verified`; then every process reads the rows it holds, and
    no others. `tensors` are all that it holds, or all whose names begin with `only`.

    Raises:
        UnfitError: missing, damaged, or made by a run with other weights; names what differs.
    """
    folder = Path(folder)
    state = read_state(folder)
    if not verified:
        ranks.from_lead(lambda: verify_checkpoint(folder))
    if extra := sorted({name for name in state["tensors"] if name.startswith(only)} ^ set(tensors)):
        raise UnfitError(
            f"{folder} holds the state of another kind of run; {len(extra)} names differ, such as {extra[:3]}. "
            "Resume with the method, LoRA targets and EMA setting the run was started with."
        )
    with ExitStack() as stack:
        shards = [
            stack.enter_context(open_tensors(path, verify=False)) for path in sorted(folder.glob("*.safetensors"))
        ]
        pieces = find_pieces(shards)
        for name, tensor in tensors.items():
            shape = _at_least_1d(tensor).shape
            stored = stored_shape(pieces.get(name, []), name)
            if stored != tuple(shape):
                raise UnfitError(
                    f"{folder}: {name} has shape {stored}, this run needs {tuple(tensor.shape)}. "
                    "Resume with the model and LoRA rank the run was started with."
                )
            start, stop = rows_of(tensor)
            read_rows(_at_least_1d(local(tensor.detach())), start, stop, pieces[name], name)
    return state


def find_pieces(shards: Sequence[TensorFile]) -> dict[str, list[tuple[int, TensorFile]]]:
    """Return {name: (first row, file) of each stored piece}."""
    pieces: dict[str, list[tuple[int, TensorFile]]] = {}
    for shard in shards:
        offsets = json.loads(shard.metadata.get(_OFFSETS, "{}"))
        for name in shard.names:
            start = offsets[name]["saved_offsets"][0] if name in offsets else 0
            pieces.setdefault(name, []).append((start, shard))
    return pieces


def stored_shape(pieces: Sequence[tuple[int, TensorFile]], name: str) -> tuple[int, ...]:
    """Return the shape of a tensor of which `pieces` are all; () if there are none."""
    shapes = [(start, shard.shape(name)) for start, shard in pieces]
    return (max(start + shape[0] for start, shape in shapes), *shapes[0][1][1:]) if shapes else ()


@torch.no_grad()
def read_rows(target: Tensor, start: int, stop: int, pieces: Sequence[tuple[int, TensorFile]], name: str) -> None:
    """Fill `target`, rows `start` to `stop` of a tensor."""
    missing = stop - start
    for first, shard in pieces:
        low, high = max(start, first), min(stop, first + shard.shape(name)[0])
        if low < high:
            rows = shard.read_rows(name, low - first, high - first)
            target[low - start : high - start].copy_(to_tensor(rows))
            missing -= high - low
    if missing:
        raise UnfitError(
            f"{pieces[0][1].path.parent}: {missing} rows of {name} are in no file. Use another checkpoint."
        )


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor
