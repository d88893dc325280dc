"""What a brought command line comes to, as a configuration."""

from cogvideox_factory.config import Config
from cogvideox_factory.original.translate import Translation
from cogvideox_factory.recipe import check


def config_of(translation: Translation) -> Config:
    values: dict = {}
    for name, value in translation.settings.items():
        section, _, field = name.partition(".")
        if value is not None and section != "prepare":
            values |= {section: values.get(section, {}) | {field: value}} if field else {section: value}
    return check(values, source="test")
