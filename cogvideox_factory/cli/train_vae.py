"""`cogvideox train-vae`: clips become a VAE, new or improved; for models of your own."""

from cogvideox_factory.cli.settings import parse

DESCRIPTION = """Train a VAE of the CogVideoX architecture on clips: from random weights (vae.config: a config.json) or
from an existing one (vae.start, or the model's own). The folder vae.dir holds config.yaml, metrics.jsonl and vae/ in
the diffusers layout. No published model needs this; a transformer has to be trained for a new VAE."""

SECTIONS = ("model", "data", "vae", "run")


def run(argv: list[str]) -> None:
    """Parse and train."""
    config = parse("train-vae", argv, sections=SECTIONS, description=DESCRIPTION)
    from cogvideox_factory.torch_engine import train_vae

    train_vae.run(config)
