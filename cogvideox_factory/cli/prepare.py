"""`cogvideox prepare`: videos and captions become a cache of latents and text embeddings."""

from cogvideox_factory.cli.settings import parse

DESCRIPTION = """Encode clips and captions once, so that training never waits for a decoder, the VAE or T5.
Run it again after an interruption or with more clips: finished entries are kept, only what is missing is made."""


def run(argv: list[str]) -> None:
    """Parse and prepare."""
    config = parse("prepare", argv, sections=("task", "model", "data", "cache", "text", "run"), description=DESCRIPTION)
    from cogvideox_factory.torch_engine import prepare

    prepare.run(config)
