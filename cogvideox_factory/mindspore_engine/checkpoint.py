"""The state of a run, to disk and back; the folder is described in `checkpoints`.

Tensors lie in it whole, whatever processes divide them: they are gathered one after the other while the leading process
writes, and read by all, each what it holds. So any other number of processes and any `zero` goes on from there.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.checkpoints import FORMAT, MANIFEST, STATE, checkpoint_folder, digest, prune, read_state
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.mindspore_engine.ranks import ALONE, Ranks
from cogvideox_factory.mindspore_engine.sharding import State
from cogvideox_factory.publish import publish_folder, require_room, sync_file
from cogvideox_factory.tensors import Deferred, StoredTensor, open_tensors, save_tensors

_SHARD = "shard-00001.safetensors"


def save_checkpoint(
    run: Path, step: int, tensors: State, state: Mapping[str, Any], *, keep: int, ranks: Ranks = ALONE
) -> Path:
    """Write the state after update number `step`, then drop all but the newest `keep` complete checkpoints.

    Raises:
        StorageError: no room or no permission; older checkpoints stay as they are. In all processes.
    """
    target, arrays = checkpoint_folder(run, step), tensors.arrays()

    def write() -> None:
        require_room(run, tensors.num_bytes, what=f"checkpoint {target.name}")
        with publish_folder(target) as folder:
            _write_shard(folder / _SHARD, tensors, arrays)
            text = json.dumps({"format": FORMAT, "step": step, "tensors": list(tensors.shapes), **state}, indent=1)
            (folder / STATE).write_text(text, encoding="utf-8")
            manifest = {path.name: digest(path) for path in (folder / _SHARD, folder / STATE)}
            (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for why in prune(run, keep=keep, newest=step):
            say(f"{target} is saved, but an older one stays: {why}")

    ranks.lead_through(arrays, write)
    return target


def _write_shard(file: Path, tensors: State, arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    def deferred(name: str, shape: tuple[int, ...]) -> Deferred:
        def make() -> np.ndarray:
            made, array = next(arrays)
            assert made == name, (made, name)
            return array

        return Deferred(shape=shape, dtype=tensors.dtype(name), make=make)

    save_tensors(file, {name: deferred(name, shape) for name, shape in tensors.shapes.items()}, seal=False)
    sync_file(file)


def load_checkpoint(folder: Path, tensors: State) -> dict[str, Any]:
    """Fill what this process holds of `tensors` from `folder`, which is verified, and return its state.

    Raises:
        UnfitError: made by a run with other weights; names what differs.
    """
    state = read_state(folder)
    if state["tensors"] != list(tensors.shapes):
        extra = sorted(set(state["tensors"]) ^ set(tensors.shapes))
        raise UnfitError(
            f"{folder} holds the state of another kind of run; {len(extra)} names differ, such as {extra[:3]}. "
            "Resume with the method, LoRA targets and EMA setting the run was started with."
        )
    with open_tensors(folder / _SHARD, verify=False) as file:
        for name, shape in tensors.shapes.items():
            if file.shape(name) != shape:
                raise UnfitError(
                    f"{folder}: {name} has shape {file.shape(name)}, this run needs {shape}. "
                    "Resume with the model and LoRA rank the run was started with."
                )
        tensors.fill(lambda name: StoredTensor(file=file, name=name))
    return state
