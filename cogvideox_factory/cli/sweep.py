"""`cogvideox sweep`: one run of `train` for each combination of some settings."""

import os
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cogvideox_factory import sweep
from cogvideox_factory.cli import train
from cogvideox_factory.cli.settings import parse_with
from cogvideox_factory.config import Config
from cogvideox_factory.config.section import Positive
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.launcher import num_processes
from cogvideox_factory.recipe import check, write_recipe

DESCRIPTION = """Train once for each combination of the --grid values, each run in a process of its own:
  cogvideox sweep recipes/t2v_lora.yaml --cache.dir caches/mine --train.dir runs/rates \\
      --grid train.learning-rate=1e-4,2e-4 --grid lora.rank=16,64
train.dir is the folder of all: a recipe and a run folder for each, sweep.csv, sweep.json and index.html. Run it again
to go on: finished runs are left alone, others go on from their newest checkpoint. A run that fails does not stop the
rest; it is named at the end and decides the exit code."""

_OWN = ("train.dir", "train.resume")


class Sweep(BaseModel):
    """How each run is started."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    processes: Positive = 1
    """Processes of a run, one a card."""


class Flags(BaseModel):
    """Flags of this command that no recipe holds."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    grid: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A setting and its values, SECTION.SETTING=VALUE,VALUE; give it once for each setting."""
    sweep: Sweep = Sweep()


def run(argv: list[str]) -> None:
    """Parse, check every combination, and train them one after the other."""
    config, ask = parse_with("sweep", argv, sections=train.SECTIONS, description=DESCRIPTION, own=Flags)
    if num_processes(os.environ) > 1:
        raise FactoryError("a sweep starts its runs itself; start it without a launcher, with --sweep.processes N")
    axes = [sweep.Axis.parse(text) for text in ask.grid]
    if not axes:
        raise FactoryError("which combinations? give --grid SECTION.SETTING=VALUE,VALUE")
    folder = Path(config.train.dir)
    chosen = {point: _config_of(config, axes, point) for point in sweep.combinations(axes)}
    method = {"lora": "lora", "full": "sft"}
    runs = [
        sweep.Run(
            folder=folder / sweep.name_of(axes, point, method=method[made.train.method]),
            values=dict(zip([axis.setting for axis in axes], point, strict=True)),
        )
        for point, made in chosen.items()
    ]
    sweep.require_distinct(runs)

    def write(run: sweep.Run, path: Path) -> None:
        made = chosen[tuple(run.values.values())]
        write_recipe(path, made.model_copy(update={"train": made.train.model_copy(update={"dir": str(run.folder)})}))

    sweep.carry_out(folder, runs, write, num_processes=ask.sweep.processes)


def _config_of(config: Config, axes: list[sweep.Axis], point: tuple[str, ...]) -> Config:
    values = config.model_dump()
    for axis, text in zip(axes, point, strict=True):
        section, _, name = axis.setting.partition(".")
        values[section][name] = _value(axis.setting, text)
    return check(values, source=", ".join(f"{axis.setting}={text}" for axis, text in zip(axes, point, strict=True)))


def _value(setting: str, text: str) -> Any:
    """Return a word as the setting's type.

    Raises:
        FactoryError: no such setting, one that a grid cannot vary, or a word of another type.
    """
    section, _, name = setting.partition(".")
    sections = {key: field.annotation for key, field in Config.model_fields.items() if key in train.SECTIONS}
    known = [f"{key}.{field}" for key, kind in sections.items() for field in getattr(kind, "model_fields", {})]
    if setting not in known:
        raise FactoryError(f"--grid {setting}: no such setting of train{nearest(setting, known)}")
    annotation = sections[section].model_fields[name].annotation  # type: ignore[union-attr]
    if setting in _OWN or "list" in str(annotation):
        what = "a sweep decides it" if setting in _OWN else "it holds a list, and commas part the grid's values"
        raise FactoryError(f"--grid {setting}: {what}; choose another setting")
    try:
        return TypeAdapter(annotation).validate_strings(text)
    except ValidationError as error:
        raise FactoryError(f"--grid {setting}={text}: {error.errors()[0]['msg']}") from error
