"""Checkpoint folders of a run, `RUN/checkpoint-N/`: complete and verified, or not there at all.

```
checkpoint-000500/
  shard-*.safetensors   weights, moments, averages: what one process wrote
  state.json            step, position in the data, seed, settings, versions, layout
  MANIFEST.json         name, size and SHA-256 of every file; written last
```
One flipped bit in a weight file loads without an error, so every file is hashed when written and when read.
"""

import hashlib
import re
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import StorageError, UnfitError
from cogvideox_factory.json_object import read_object
from cogvideox_factory.publish import remove_folder

FORMAT = 1
MANIFEST, STATE = "MANIFEST.json", "state.json"
_WAY_OUT = "Resume from another checkpoint."
_NAME = re.compile(r"checkpoint-(\d{6,})")


def checkpoint_folder(run: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return Path(run) / f"checkpoint-{step:06}"


def read_state(folder: Path) -> dict[str, Any]:
    """Return `state.json` of a checkpoint.

    Raises:
        UnfitError: no checkpoint, or one of another format.
    """
    path = Path(folder) / STATE
    if not path.is_file():
        raise UnfitError(f"{folder} is no checkpoint: state.json is missing. Give a folder named checkpoint-N.")
    state = read_object(path, way_out=_WAY_OUT)
    if state.get("format") != FORMAT:
        raise UnfitError(f"{folder} has format {state.get('format')}; this version reads format {FORMAT}.")
    if not isinstance(state.get("step"), int):
        raise UnfitError(f"{path} is damaged: step is {state.get('step')!r}. Resume from another checkpoint.")
    return state


def verify_checkpoint(folder: Path) -> None:
    """Check size and SHA-256 of every file.

    Raises:
        UnfitError: names the first file that is missing, extra or changed.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise UnfitError(f"{folder} is incomplete: MANIFEST.json is missing. Resume from another checkpoint.")
    manifest = read_object(path, way_out=_WAY_OUT)
    found = {p.name for p in Path(folder).iterdir()} - {MANIFEST}
    if found != set(manifest):
        raise UnfitError(f"{folder}: files differ from its manifest: {sorted(found ^ set(manifest))}.")
    for name, recorded in manifest.items():
        if digest(Path(folder) / name) != recorded:
            raise UnfitError(f"{folder / name} was changed or damaged after it was written. Use another checkpoint.")


def checkpoint_folders(run: Path) -> list[Path]:
    """Return the folders of a run that are named as checkpoints, complete or not, oldest first."""
    if not Path(run).is_dir():
        return []
    found = [path for path in Path(run).iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step_of)


def list_checkpoints(run: Path) -> list[int]:
    """Return the steps of the complete checkpoints of a run folder, oldest first."""
    return [_step_of(path) for path in checkpoint_folders(run) if (path / MANIFEST).is_file()]


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None, folder
    return int(match[1])


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


def prune(run: Path, *, keep: int, newest: int) -> list[str]:
    """Remove all but the newest `keep` complete checkpoints, counting `newest`, which is one of them.

    Returns a line for each that could not be removed, which is no reason to lose the one just saved.
    """
    others, problems = [step for step in list_checkpoints(run) if step != newest], []
    for step in others[: max(0, len(others) - (keep - 1))]:
        folder = checkpoint_folder(run, step)
        try:
            remove_folder(folder)
        except (StorageError, OSError) as error:
            problems.append(f"{folder} cannot be removed: {error}")
    return problems


def set_aside(folder: Path, label: str = "broken") -> Path:
    """Rename a checkpoint to `label`-… so that it no longer counts; return its new name."""
    target = folder.with_name(f"{label}-{folder.name}")
    number = 1
    while target.exists():
        number += 1
        target = folder.with_name(f"{label}-{folder.name}-{number}")
    folder.rename(target)
    return target


def digest(path: Path) -> dict[str, Any]:
    """Return size and SHA-256 of a file, as a manifest has them."""
    with path.open("rb") as file:
        return {"size": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
