"""YAML that means what it looks like, for recipes and bucket files.

Plain YAML 1.1 surprises: `1e-5` is a string, `no` a boolean, of two equal keys the last wins silently, and a
few bytes of aliases unfold to millions of nodes. This loader knows YAML 1.2 numbers, refuses duplicate keys and
aliases, and is bounded in size and depth.
"""

import re
from pathlib import Path
from typing import Any

import yaml

from cogvideox_factory.errors import FactoryError

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
            raise FactoryError(f"nested deeper than {_MAX_DEPTH} levels; no file of ours is")
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


class Dumper(yaml.SafeDumper):
    """Quotes exactly what the loader would otherwise take for something else than text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping.

    Raises:
        FactoryError: missing, too large, not UTF-8, not YAML, not a mapping, a duplicate key, an alias.
    """
    path = Path(path)
    if not path.is_file():
        raise FactoryError(f"{path}: no such recipe or bucket file. `recipes/` holds complete ones to copy.")
    if path.stat().st_size > _MAX_BYTES:
        raise FactoryError(f"{path} has {path.stat().st_size} bytes; at most {_MAX_BYTES} are read")
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
