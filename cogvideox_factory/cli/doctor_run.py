"""`cogvideox doctor RUN` or `CHECKPOINT`: whether checkpoints are as they were written, and what they hold."""

import json
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory import checkpoints
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import console, say
from cogvideox_factory.publish import publish_text

DESCRIPTION = """Hash every file of a checkpoint, or of all checkpoints of a run folder, against its manifest, and say
what they hold: step, place in the data, seed, versions, processes, changes on the way. Exit code 5 if one is damaged.
Nothing is changed; no framework is loaded."""


class RunDoctor(BaseModel):
    """What doctor is asked of a run."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write the whole report here: one entry a checkpoint."""


def is_run(folder: Path) -> bool:
    """Whether `folder` is a checkpoint, or holds some."""
    parts = (checkpoints.MANIFEST, checkpoints.STATE)
    return any((folder / name).is_file() for name in parts) or bool(checkpoints.checkpoint_folders(folder))


def run(argv: list[str]) -> None:
    """Look at the run or checkpoint `argv[0]`, print and write as asked.

    Raises:
        UnfitError: a checkpoint is damaged or incomplete, or there is none.
    """
    folder = Path(argv[0])
    ask = tyro.cli(RunDoctor, args=argv[1:], prog="cogvideox doctor RUN", description=DESCRIPTION)
    found = [examine(path) for path in checkpoints.checkpoint_folders(folder) or [folder]]
    for entry in found:
        _print(entry)
    if ask.json_file:
        publish_text(Path(ask.json_file), json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        say(f"report: {ask.json_file}")
    if bad := [entry["path"] for entry in found if entry["problem"]]:
        good = [entry["path"] for entry in found if not entry["problem"]]
        way = f"The newest good one is {good[-1]}." if good else "None is good; start a new run."
        raise UnfitError(f"{len(bad)} of {len(found)} checkpoints cannot be gone on from: {', '.join(bad)}. {way}")


def examine(folder: Path) -> dict[str, Any]:
    """Return what a checkpoint holds, and what is wrong with it (`problem`, None if nothing is)."""
    entry: dict[str, Any] = {"path": str(folder), "problem": None}
    try:
        checkpoints.verify_checkpoint(folder)
        entry |= _held(folder, checkpoints.read_state(folder))
    except UnfitError as error:
        return entry | {"problem": str(error)}
    return entry


def _held(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.iterdir())
    names = ("step", "position", "seed", "versions", "layout", "changes", "settings")
    try:
        held = {"bytes": size, "num_tensors": len(state["tensors"])} | {k: state[k] for k in names if k in state}
        _rows(held)  # what cannot be shown is damage
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnfitError(
            f"{folder / checkpoints.STATE} has another form than training writes ({type(error).__name__}: {error}). "
            "Resume from another checkpoint."
        ) from error
    return held


def _print(entry: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table("", "", title=entry["path"], title_justify="left", show_header=False)
    for row in [("DAMAGED", entry["problem"])] if entry["problem"] else _rows(entry):
        table.add_row(*row)
    console.print(table)


def _rows(held: dict[str, Any]) -> list[tuple[str, str]]:
    """Return what a checkpoint holds, to be shown: name and value."""
    place = held.get("position", {})
    rows = [
        ("state", f"ok: {held['num_tensors']} tensors, {held['bytes'] / 2**30:.2f} GiB, hashes agree"),
        ("step", f"{held['step']}" + (f", epoch {place['epoch']:.2f}" if place else "")),
        *((name, _plain(held[name])) for name in ("seed", "versions", "layout") if name in held),
    ]
    for change in held.get("changes", []):
        where = f"{change['setting']} {change['from']} -> {change['to']}"
        rows.append(("changed", f"after step {change['after_step']}: {where}"))
    return rows


def _plain(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
