"""From the words of a command line to a checked `Config`: recipe file first, then flags."""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, create_model

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.recipe import check, read_recipe

Own = TypeVar("Own", bound=BaseModel)


class _NoOwn(BaseModel):
    """No flags beside the recipe's."""


def parse(
    command: str, argv: list[str], *, sections: tuple[str, ...], description: str, base: Config | None = None
) -> Config:
    """Return the settings of `command`; only the flags of `sections` exist, because others would do nothing.

    `base` takes the place of a recipe file.

    Raises:
        FactoryError: an unreadable recipe or a setting that is unknown, out of range or contradictory.
        SystemExit: `--help` (0), or a flag this command does not have (2), with the nearest ones.
    """
    return parse_with(command, argv, sections=sections, description=description, own=_NoOwn, base=base)[0]


def parse_with(
    command: str,
    argv: list[str],
    *,
    sections: tuple[str, ...],
    description: str,
    own: type[Own],
    base: Config | None = None,
) -> tuple[Config, Own]:
    """Do as `parse`, with the fields of `own` as further flags that no recipe holds; return those as well."""
    config = base or Config()
    if base is None and argv and not argv[0].startswith("-"):
        config, argv = read_recipe(Path(argv[0])), argv[1:]
    if stray := next((word for word in argv[:1] if not word.startswith("-")), None):
        raise FactoryError(f"{stray!r} is no flag; usage: cogvideox {command} [RECIPE.yaml] [--section.setting VALUE]")
    if not argv:  # nothing to parse, so a quarter of a second saved
        return config, own()
    import tyro

    fields = {name: (Config.model_fields[name].annotation, getattr(config, name)) for name in sections}
    flags = create_model("Flags", __base__=own, **fields)  # type: ignore[call-overload]
    chosen = tyro.cli(
        flags,
        args=argv,
        prog=f"cogvideox {command}",
        description=description,
        config=(tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands),
    )
    values = config.model_dump() | {name: _plain(getattr(chosen, name)) for name in sections}
    return check(values, source="settings"), chosen


def _plain(value):
    return value.model_dump() if hasattr(value, "model_dump") else value
