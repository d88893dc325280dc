"""What a model card is made of: which model exported weights belong to, and what the run that made them tells."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cogvideox_factory.checkpoints import checkpoint_folder, list_checkpoints, read_state
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.models import PUBLISHED, ModelFacts
from cogvideox_factory.recipe import read_recipe

Form = Literal["diffusers lora", "peft", "comfyui lora", "transformer", "comfyui model"]
Task = Literal["t2v", "i2v"]

_MAX_SAMPLES = 4
_PLACE = "path/to/"
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CACHED = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Base:
    """The model that exported weights belong to."""

    hub_id: str | None
    name: str
    """What it is called in text and code: its hub id, or a folder that the reader has to name."""
    licence: Mapping[str, str] = field(default_factory=dict)
    """Keys of a card's front matter; empty where nothing is known."""

    @property
    def short(self) -> str:
        """The name as it stands in a sentence."""
        return self.name.removeprefix(_PLACE)

    @property
    def facts(self) -> ModelFacts | None:
        """What is known of it, if it is a published model under either owner's name."""
        return _published(self.hub_id) if self.hub_id else None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a run folder tells."""

    settings: dict[str, Any]
    step: int
    counts: dict[str, int]
    """Clips a state, from the data check."""
    curves: dict[str, list[tuple[float, float]]]
    samples: list[Path]
    """The newest sample video of each prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Card:
    """Everything a card tells."""

    name: str
    """What the weights go by: the id of a hub repository, or a folder."""
    form: Form
    files: Sequence[str]
    """The weights, first the one to load."""
    base: Base
    task: Task | None
    rank: int | None = None
    """Of the LoRA that they are, or that was folded into them."""
    is_dora: bool = False
    run: RunFacts | None = None

    @property
    def is_whole(self) -> bool:
        """Whether they are a model, not a LoRA."""
        return self.form in ("transformer", "comfyui model")

    @property
    def about(self) -> str:
        """What they are, in a sentence."""
        base = self.base.short
        if self.rank is None:
            return f"A transformer fine-tuned from {base}."
        kind = f"{'DoRA' if self.is_dora else 'LoRA'} of rank {self.rank}"
        if self.is_whole:
            return f"The transformer of {base} with a {kind} folded in."
        return f"A {kind} for {base}."


def base_of(path: str) -> Base:
    """Return the model that a setting `model.path` names; of a local folder only its name, and its own licence.

    Without one, it is a model that the reader has to know.
    """
    if not path:
        return Base(hub_id=None, name=f"{_PLACE}the-base-model")
    folder = Path(path).expanduser()
    cached = _CACHED.search(path)
    hub_id = f"{cached['owner']}/{cached['name']}" if cached else None
    if hub_id is None and not folder.exists() and HUB_ID.fullmatch(path):
        hub_id = path
    if hub_id and _published(hub_id):
        name = hub_id.split("/")[1]
        own = {"license": "apache-2.0"} if name.lower() == "cogvideox-2b" else {
            "license": "other", "license_name": "cogvideox-license",
            "license_link": f"https://huggingface.co/{hub_id}/blob/main/LICENSE",
        }  # fmt: skip
        return Base(hub_id=hub_id, name=hub_id, licence=own)
    name = hub_id or f"{_PLACE}{folder.absolute().name}"
    return Base(hub_id=hub_id, name=name, licence=_licence_of(folder))


def read_run(run: Path, *, step: int | None = None) -> RunFacts:
    """Return what a run folder tells, up to a step if one is given.

    Raises:
        FactoryError: its config.yaml cannot be read.
    """
    rows = [row for row in _metrics(run / "metrics.jsonl") if step is None or row["step"] <= step]
    state = _newest_state(run)
    curves = {
        title: [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
        for key, title in (("loss", "training loss"), ("validation_loss", "loss on held-out clips"))
    }
    samples: dict[str, Path] = {}
    for path in sorted((run / "samples").glob("step-*-*.mp4")):
        if step is None or int(path.stem.split("-")[1]) <= step:
            samples[path.stem.split("-")[2]] = path
    settings = read_recipe(run / "config.yaml").model_dump()
    return RunFacts(
        settings=settings, step=step or state.get("step", settings["train"]["steps"]),
        counts=state.get("data_counts", {}), curves={name: points for name, points in curves.items() if points},
        samples=list(samples.values())[:_MAX_SAMPLES],
    )  # fmt: skip


def _published(hub_id: str) -> ModelFacts | None:
    """Return a published model by its hub id; its authors' organisation has had two names there."""
    owner, _, name = hub_id.partition("/")
    found = [facts for facts in PUBLISHED.values() if facts.hub_id and facts.hub_id.split("/")[1] == name]
    return found[0] if found and owner in ("THUDM", "zai-org") else None


def _licence_of(folder: Path) -> dict[str, str]:
    """Return the licence keys of the front matter of a model folder's README, if it has some that can be read."""
    readme = folder / "README.md"
    if not readme.is_file():
        return {}
    found = re.match(r"---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    lines = found[1].splitlines() if found else []
    pairs = [re.fullmatch(r"(license|license_name|license_link): *[\"']?([^\"'#]+?)[\"']? *", line) for line in lines]
    keys = {pair[1]: pair[2] for pair in pairs if pair}
    return keys if "license" in keys else {}


def _newest_state(run: Path) -> dict[str, Any]:
    """Return what the newest checkpoint says of the run; without one that can be read, a card tells less."""
    steps = list_checkpoints(run)
    try:
        return read_state(checkpoint_folder(run, steps[-1])) if steps else {}
    except UnfitError as error:
        say(f"the card does not tell of the clips: {error}")
        return {}


def _metrics(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl; what a killed writer left of a line is no row."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows
