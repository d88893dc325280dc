"""A run's numbers sent to wandb or trackio as well, which share the calls used here.

A tracker is a guest: it must be installed before a run starts, and whatever fails after that costs one line and the
tracker, never the run. `metrics.jsonl` has everything.
"""

import hashlib
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from cogvideox_factory.errors import MissingError
from cogvideox_factory.metrics import say

TRACKERS = ("wandb", "trackio")


class Tracker:
    """One run of wandb or trackio. A run folder is the same run there whenever it is gone on with.

    Raises:
        MissingError: the library is not installed.
    """

    def __init__(self, kind: str, *, project: str, folder: Path, settings: Mapping[str, Any]) -> None:
        assert kind in TRACKERS, kind
        self.kind = kind
        self._arguments: dict[str, Any] = {
            "project": project, "name": folder.name, "config": dict(settings), "resume": "allow"
        }  # fmt: skip
        if kind == "wandb":
            digest = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
            self._arguments |= {"id": digest, "dir": str(folder)}
        try:
            self._library: Any = import_module(kind)
        except ImportError as error:
            raise self._missing() from error
        if not hasattr(self._library, "init"):  # a folder of that name is importable, too
            raise self._missing()
        self._is_alive = True

    def start(self) -> None:
        """Begin, or go on with, the run."""
        self._call("init", **self._arguments)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of `step`."""
        self._call("log", dict(values), step=step)

    def finish(self) -> None:
        """Send what is left."""
        self._call("finish")

    def _call(self, function: str, /, *args: Any, **kwargs: Any) -> None:
        if not self._is_alive:
            return
        try:
            getattr(self._library, function)(*args, **kwargs)
        except Exception as error:  # noqa: BLE001 - somebody else's code and network, which no run may depend on
            self._is_alive = False
            say(f"{self.kind} failed ({error}); it gets no more of this run, metrics.jsonl has all")

    def _missing(self) -> MissingError:
        return MissingError(
            f"train.tracker={self.kind}: {self.kind} is not installed. Run pip install "
            f"'cogvideox-factory[{self.kind}]', or set train.tracker to none."
        )
