"""Recipe files: YAML (see `strict_yaml`) checked against `Config`, written back complete."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.publish import publish_text
from cogvideox_factory.strict_yaml import Dumper, read_yaml


def check(values: dict[str, Any], *, source: str) -> Config:
    """Validate `values` as a `Config`, naming every problem at once.

    Raises:
        FactoryError: unknown keys (with the nearest valid one), wrong types, values out of range, contradictions.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        problems = [_explain(item) for item in error.errors()]
        raise FactoryError(f"{source}: " + "\n  ".join(["", *problems] if len(problems) > 1 else problems)) from error


def read_recipe(path: Path) -> Config:
    """Read and validate a recipe file."""
    return check(read_yaml(path), source=str(path))


def write_recipe(path: Path, config: Config) -> None:
    """Write a complete config that `read_recipe` reads back equal."""
    publish_text(path, yaml.dump(config.model_dump(), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=100))


def _explain(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        section = _section(item["loc"][:-1])
        choices = sorted(section.model_fields) if section else []
        return f"unknown setting {where!r}{nearest(str(item['loc'][-1]), choices)}; there are: {', '.join(choices)}"
    message = item["msg"].removeprefix("Value error, ")
    return f"{where}={item['input']!r}: {message}" if where else message


def _section(location: tuple) -> type[BaseModel] | None:
    section: Any = Config
    for name in location:
        field = section.model_fields.get(name)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return None
        section = field.annotation
    return section
