"""`cogvideox prepare`: videos and captions become a cache of latents and text embeddings."""

import gc
import os

from pydantic import BaseModel, ConfigDict

from cogvideox_factory.cli.engine import load_engine, require_able
from cogvideox_factory.cli.original import expand
from cogvideox_factory.cli.settings import parse_with
from cogvideox_factory.config import Config
from cogvideox_factory.launcher import only_introduces
from cogvideox_factory.metrics import say

DESCRIPTION = """Encode clips and captions once, so that training never waits for a decoder, the VAE or T5.
Run it again after an interruption or with more clips: finished entries are kept, only what is missing is made. Several
processes or machines that see one cache folder share the work with --prepare.shard; those that torchrun or msrun starts
do so by themselves."""
SECTIONS = ("task", "engine", "mindspore", "model", "data", "cache", "text", "run")


class Prepare(BaseModel):
    """What this process is asked."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    shard: str | None = None
    """Encode only the I-th of N parts, as in 2/4; start one process for each part, here or on other machines. The last
    to end lists the clips; run without it afterwards if one of them failed. Default: everything, or under a launcher
    the part of each process."""


class Flags(BaseModel):
    """Flags of this command that no recipe holds."""

    prepare: Prepare = Prepare()


def run(argv: list[str]) -> None:
    """Parse and prepare; a framework is imported only if something is to be encoded."""
    if only_introduces(os.environ):
        return  # nobody here has anything to tell the others
    config, ask = parse_with("prepare", expand("prepare", argv), sections=SECTIONS, description=DESCRIPTION, own=Flags)
    require_able(config, SECTIONS)
    from cogvideox_factory import preparation

    shard = preparation.Shard.of_process(os.environ)
    if ask.prepare.shard is not None:
        shard = preparation.Shard.parse(ask.prepare.shard)
    elif shard:
        say(f"process {shard.number} of {shard.count} that were started: --prepare.shard {shard}")
    gc.disable()  # rows and entries by the thousand, none in cycles: collecting takes a tenth of a run that ends here
    try:
        preparation.run(config, lambda: _engine(config), shard=shard)
    finally:
        gc.enable()


def _engine(config: Config):
    gc.enable()
    return load_engine(config, "prepare", sections=SECTIONS).engine_of(config)
