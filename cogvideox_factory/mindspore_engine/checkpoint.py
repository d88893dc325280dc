"""The state of a run, to disk and back; the folder is described in `checkpoints`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mindspore import Parameter

from cogvideox_factory.checkpoints import FORMAT, MANIFEST, STATE, checkpoint_folder, digest, prune, read_state
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.mindspore_engine.border import put, to_array
from cogvideox_factory.publish import publish_folder, require_room, sync_file
from cogvideox_factory.tensors import open_tensors, save_tensors

_SHARD = "shard-00001.safetensors"


def save_checkpoint(
    run: Path, step: int, tensors: Mapping[str, Parameter], state: Mapping[str, Any], *, keep: int
) -> Path:
    """Write the state after update number `step`, then drop all but the newest `keep` complete checkpoints.

    Raises:
        StorageError: no room or no permission; older checkpoints stay as they are.
    """
    target = checkpoint_folder(run, step)
    require_room(run, sum(p.size * p.itemsize for p in tensors.values()), what=f"checkpoint {target.name}")
    text = json.dumps({"format": FORMAT, "step": step, "tensors": sorted(tensors), **state}, indent=1)
    with publish_folder(target) as folder:
        save_tensors(folder / _SHARD, {name: to_array(p) for name, p in sorted(tensors.items())}, seal=False)
        sync_file(folder / _SHARD)
        (folder / STATE).write_text(text, encoding="utf-8")
        manifest = {path.name: digest(path) for path in (folder / _SHARD, folder / STATE)}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    for why in prune(run, keep=keep, newest=step):
        say(f"{target} is saved, but an older one stays: {why}")
    return target


def load_checkpoint(folder: Path, tensors: Mapping[str, Parameter]) -> dict[str, Any]:
    """Fill `tensors` in place from `folder`, which is verified, and return its state.

    Raises:
        UnfitError: made by a run with other weights; names what differs.
    """
    state = read_state(folder)
    if state["tensors"] != sorted(tensors):
        extra = sorted(set(state["tensors"]) ^ set(tensors))
        raise UnfitError(
            f"{folder} holds the state of another kind of run; {len(extra)} names differ, such as {extra[:3]}. "
            "Resume with the method, LoRA targets and EMA setting the run was started with."
        )
    with open_tensors(folder / _SHARD, verify=False) as file:
        for name, parameter in tensors.items():
            if file.shape(name) != tuple(parameter.shape):
                raise UnfitError(
                    f"{folder}: {name} has shape {file.shape(name)}, this run needs {tuple(parameter.shape)}. "
                    "Resume with the model and LoRA rank the run was started with."
                )
            put(parameter, file.read(name))
    return state
