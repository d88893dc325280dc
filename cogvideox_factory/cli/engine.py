"""The engine that settings ask for, imported when a command needs it and not before."""

from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from cogvideox_factory.config import Config
from cogvideox_factory.config.laws import lacking_in_mindspore
from cogvideox_factory.errors import FactoryError, MissingError

_INSTALL = {
    "torch": "pip install -c constraints.txt -e .",
    "mindspore": "pip install -r constraints-mindspore.txt && pip install --no-deps -e .",
}


def load_engine(config: Config, module: str, *, sections: Collection[str]) -> ModuleType:
    """Import `module` (train, generate, prepare) of the engine that `config` names.

    `sections` are those the command reads.

    Raises:
        FactoryError: a setting that this engine has not got; all of them at once.
        MissingError: its framework is not installed.
    """
    require_able(config, sections)
    if find_spec(config.engine) is None:
        other = "mindspore" if config.engine == "torch" else "torch"
        way = f", or use --engine {other}, which is" if find_spec(other) else ""
        raise MissingError(
            f"engine={config.engine}: {config.engine} is not installed here. Install: {_INSTALL[config.engine]}{way}."
        )
    return import_module(f"cogvideox_factory.{config.engine}_engine.{module}")


def require_able(config: Config, sections: Collection[str]) -> None:
    """Refuse settings in `sections` that the engine of `config` has not got.

    Raises:
        FactoryError: one line each.
    """
    if config.engine == "mindspore" and (problems := lacking_in_mindspore(config, sections)):
        raise FactoryError("; ".join(problems))
