"""State of a run on disk: `RUN/checkpoint-N/`, complete and verified or not there at all.

```
checkpoint-000500/
  shard-*.safetensors   weights, moments, averages (written by torch's DCP, which reshards them; no pickle)
  state.json            step, counters, settings fingerprint, versions
  MANIFEST.json         name, size and SHA-256 of every file; written last
```
One flipped bit in a weight file loads without an error, so every file is hashed when written and when read.
"""

import hashlib
import json
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.publish import publish_folder, remove_folder, require_room
from cogvideox_factory.run_folder import list_checkpoints
from cogvideox_factory.tensors import open_tensors
from cogvideox_factory.torch_engine.parallel import Layout, Ranks

FORMAT = 1


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return Path(run) / f"checkpoint-{step:06}"


_ALONE = Ranks(layout=Layout())


def save_checkpoint(
    run: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], *, keep: int, ranks: Ranks = _ALONE
) -> Path:
    """Write the state after update number `step`, then drop all but the newest `keep` complete checkpoints.

    Every process writes what it holds of `tensors`; the leading one makes the folder, the manifest and the rename.

    Raises:
        StorageError: no room or no permission; older checkpoints stay as they are.
    """
    target = checkpoint_folder(run, step)
    steps = _publish(target, step, tensors, state)
    folder = ranks.from_lead(lambda: next(steps))
    problem = None
    try:
        _write_shards(folder, tensors, alone=ranks.mesh is None)
    except StorageError as error:  # the same in every process
        problem = error
    ranks.from_lead(lambda: steps.throw(problem) if problem else next(steps, None))
    if ranks.leads:
        others = [number for number in list_checkpoints(run) if number != step]
        for old in others[: max(0, len(others) - (keep - 1))]:
            remove_folder(checkpoint_folder(run, old))
    return target


def _publish(target: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Generator[Path]:
    """Yield the folder to write shards into, then complete it."""
    require_room(target.parent, sum(t.numel() * t.element_size() for t in tensors.values()), what=f"checkpoint {step}")
    with publish_folder(target) as folder:
        yield folder
        text = json.dumps({"format": FORMAT, "step": step, "tensors": sorted(tensors), **state}, indent=1)
        (folder / "state.json").write_text(text, encoding="utf-8")
        manifest = {path.name: _digest(path) for path in sorted(folder.iterdir())}
        (folder / "MANIFEST.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")


def _write_shards(folder: Path, tensors: dict[str, Tensor], *, alone: bool) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # DCP warns that it runs in a single process, which is meant
            dcp.save(
                {name: _at_least_1d(tensor) for name, tensor in tensors.items()},
                storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True),
                no_dist=alone,
            )
    except CheckpointException as error:  # no Exception: it would pass every handler above
        raise StorageError(f"could not write {folder}: {error}. Make room, or choose another --train.dir.") from error


def load_checkpoint(folder: Path, tensors: dict[str, Tensor], *, ranks: Ranks = _ALONE) -> dict[str, Any]:
    """Verify `folder`, fill `tensors` in place and return its state; it may come from any other layout of processes.

    Raises:
        UnfitError: missing, damaged, or made by a run with other weights; names what differs.
    """
    folder = Path(folder)
    state = read_state(folder)
    ranks.from_lead(lambda: verify_checkpoint(folder))
    if state["tensors"] != sorted(tensors):
        extra = sorted(set(state["tensors"]) ^ set(tensors))
        raise UnfitError(
            f"{folder} holds the state of another kind of run; {len(extra)} names differ, such as {extra[:3]}. "
            "Resume with the method, LoRA targets and EMA setting the run was started with."
        )
    shapes = _stored_shapes(folder)
    if absent := sorted(set(tensors) - set(shapes)):
        raise UnfitError(f"{folder} lacks {len(absent)} tensors, such as {absent[:3]}. Use another checkpoint.")
    for name, tensor in tensors.items():
        if shapes[name] != tuple(_at_least_1d(tensor).shape):
            raise UnfitError(
                f"{folder}: {name} has shape {shapes[name]}, this run needs {tuple(tensor.shape)}. "
                "Resume with the model and LoRA rank the run was started with."
            )
    views = {name: _at_least_1d(tensor.detach()) for name, tensor in tensors.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(views, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=ranks.mesh is None)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint.

    Raises:
        UnfitError: no checkpoint, or one of another format.
    """
    path = Path(folder) / "state.json"
    if not path.is_file():
        raise UnfitError(f"{folder} is no checkpoint: state.json is missing. Give a folder named checkpoint-N.")
    state = _read_object(path)
    if state.get("format") != FORMAT:
        raise UnfitError(f"{folder} has format {state.get('format')}; this version reads format {FORMAT}.")
    if not isinstance(state.get("step"), int) or not isinstance(state.get("tensors"), list):
        raise UnfitError(f"{path} does not say which step and tensors it belongs to. Resume from another checkpoint.")
    return state


def _read_object(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise UnfitError(f"{path} is damaged: {error}. Resume from another checkpoint.") from error
    if not isinstance(values, dict):
        raise UnfitError(f"{path} is damaged: it holds no JSON object. Resume from another checkpoint.")
    return values


def verify_checkpoint(folder: Path) -> None:
    """Check size and SHA-256 of every file.

    Raises:
        UnfitError: names the first file that is missing, extra or changed.
    """
    path = Path(folder) / "MANIFEST.json"
    if not path.is_file():
        raise UnfitError(f"{folder} is incomplete: MANIFEST.json is missing. Resume from another checkpoint.")
    manifest = _read_object(path)
    found = {p.name for p in Path(folder).iterdir() if p.is_file()} - {"MANIFEST.json"}
    if found != set(manifest):
        raise UnfitError(f"{folder}: files differ from its manifest: {sorted(found ^ set(manifest))}.")
    for name, recorded in manifest.items():
        if _digest(Path(folder) / name) != recorded:
            raise UnfitError(f"{folder / name} was changed or damaged after it was written. Use another checkpoint.")


def newest_checkpoint(run: Path) -> tuple[Path | None, list[str]]:
    """Return the newest checkpoint that verifies, and a line for each newer one that does not."""
    problems = []
    for step in reversed(list_checkpoints(run)):
        folder = checkpoint_folder(run, step)
        try:
            verify_checkpoint(folder)
        except UnfitError as error:
            problems.append(str(error))
            continue
        return folder, problems
    return None, problems


def set_aside(folder: Path, label: str = "broken") -> Path:
    """Rename a checkpoint to `label`-… so that it no longer counts; return its new name."""
    target = folder.with_name(f"{label}-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{label}-{folder.name}-{number}")
    folder.rename(target)
    return target


def _digest(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _stored_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    for path in folder.glob("*.safetensors"):
        with open_tensors(path):  # refuses what is none, which torch's reader takes at its word
            pass
    metadata = HuggingFaceStorageReader(str(folder)).read_metadata()
    return {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}  # type: ignore[union-attr]


def versions() -> dict[str, str]:
    """Return what made a run: our version and torch's."""
    from cogvideox_factory import __version__

    return {"cogvideox_factory": __version__, "torch": torch.__version__}
