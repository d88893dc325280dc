"""Recipe files: YAML read through a hardened loader, checked against `Config`, written back complete.

Plain YAML 1.1 surprises: `1e-5` is a string, `no` a boolean, of two equal keys the last wins silently, and a
few bytes of aliases unfold to millions of nodes. This loader knows YAML 1.2 numbers, refuses duplicate keys and
aliases, and is bounded in size and depth.
"""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.publish import publish_text

_MAX_BYTES = 1_000_000
_MAX_DEPTH = 64


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars and without duplicate keys or aliases."""

    yaml_implicit_resolvers: dict[str, list] = {}  # noqa: RUF012 - the base class's own, emptied

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise FactoryError(f"line {mark.line + 1}: YAML aliases (*name) are not accepted; write the value out")
        self._depth = getattr(self, "_depth", 0) + 1
        if self._depth > _MAX_DEPTH:
            raise FactoryError(f"nested deeper than {_MAX_DEPTH} levels; no recipe is")
        try:
            node = super().compose_node(parent, index)
        finally:
            self._depth -= 1
        assert node is not None
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise FactoryError(f"line {key_node.start_mark.line + 1}: a key must be a plain word")
            line = key_node.start_mark.line + 1
            if key in seen:
                raise FactoryError(f"line {line}: {key!r} was set on line {seen[key]} already; keep one of them")
            seen[key] = line
        return super().construct_mapping(node, deep)


for _tag, _pattern, _first in (
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", "tTfF"),
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("int", r"[-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^{_pattern}$"), list(_first))
_Loader.add_constructor(
    "tag:yaml.org,2002:float",
    lambda loader, node: float(loader.construct_scalar(node)),  # type: ignore[arg-type]
)
_Loader.add_constructor(
    "tag:yaml.org,2002:int",
    lambda loader, node: int(loader.construct_scalar(node)),  # type: ignore[arg-type]
)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly what the loader would otherwise take for something else than text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FactoryError: missing, too large, not UTF-8, not YAML, not a mapping, a duplicate key, an alias.
    """
    path = Path(path)
    if not path.is_file():
        raise FactoryError(f"{path}: no such recipe file. `recipes/` holds complete ones to copy.")
    if path.stat().st_size > _MAX_BYTES:
        raise FactoryError(f"{path} has {path.stat().st_size} bytes; a recipe has at most {_MAX_BYTES}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 - a SafeLoader
    except UnicodeDecodeError as error:
        raise FactoryError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    except yaml.YAMLError as error:
        raise FactoryError(f"{path} is not valid YAML: {error}") from error
    except FactoryError as error:
        raise FactoryError(f"{path}: {error}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise FactoryError(f"{path} must hold `key: value` lines, not a {type(values).__name__}")
    return values


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
    publish_text(path, yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


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
