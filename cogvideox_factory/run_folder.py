"""A run folder: one process at a time writes it, and a run goes on only with the settings it was started with."""

import fcntl
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError, nearest


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Keep a second process out of the folder; the system drops the lock of one that dies.

    Raises:
        FactoryError: another process is training there.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        file = (run / ".lock").open("w")
    except OSError as error:
        raise StorageError(f"{run} cannot be written: {error.strerror}. Choose another --train.dir.") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FactoryError(f"{run}: another process is training there; choose another --train.dir") from error
        try:
            yield
        finally:
            if [path.name for path in run.iterdir()] == [".lock"]:  # refused before anything was made
                shutil.rmtree(run)


_LATER = {"weights"}
"""What the first checkpoints did not record, so nothing is held against them."""
_BEFORE = {"train.fp8": "none"}
"""What runs did before there was a choice, and did not record."""
_FATAL = {"task", "engine", "model", "weights", "train.method", "train.master_weights", "train.optimizer", "run.dtype"}
"""Settings that decide what the state of a run is; so does every setting of `lora`."""


def differences(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return {setting: (recorded, wanted)} of those that differ."""
    pairs = {
        key: (recorded.get(key, _BEFORE.get(key)), wanted.get(key))
        for key in dict.fromkeys([*recorded, *wanted])
        if key in recorded or key not in _LATER
    }
    return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}


def require_same(
    recorded: dict[str, Any], wanted: dict[str, Any], *, source: Path, allow: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """Refuse to go on with settings that would change the numbers, but for those of `allow`; return what these change.

    Raises:
        UnfitError: one line a setting that differs.
    """
    changed = differences(recorded, wanted)
    refused = {key: values for key, values in changed.items() if key not in allow or _is_fatal(key)}
    if not refused:
        return changed
    lines = [f"  {key}: the run has {before!r}, you ask for {now!r}" for key, (before, now) in refused.items()]
    choices = [key for key in refused if not _is_fatal(key)]
    way = "Set them back, or start a new run in another --train.dir."
    if len(choices) == len(refused):
        way = f"Set them back; or change them knowingly: --train.allow-change {' '.join([*allow, *choices])}"
    raise UnfitError(
        "\n".join([f"{source} was made with other settings, so going on would not be the same run:", *lines, way])
    )


def check_allowed(allow: Collection[str], wanted: Collection[str]) -> None:
    """Refuse names in `train.allow_change` that no resume could change.

    Raises:
        FactoryError: an unknown name, or one that decides what the state of a run is.
    """
    for name in allow:
        if name not in wanted:
            raise FactoryError(
                f"train.allow_change={name}: no number of this run depends on such a setting"
                f"{nearest(name, list(wanted))}. Name one of {', '.join(k for k in wanted if not _is_fatal(k))}."
            )
        if _is_fatal(name):
            raise FactoryError(
                f"train.allow_change={name}: another {name} is another model or another state, and no checkpoint fits "
                "it. Start a new run in another --train.dir."
            )


def _is_fatal(key: str) -> bool:
    return key in _FATAL or key.startswith("lora.")
