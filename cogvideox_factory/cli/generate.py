"""`cogvideox generate`: prompts, and images for i2v, become mp4 files."""

from cogvideox_factory.cli.settings import parse

DESCRIPTION = """Make one video a prompt, with the model as published, with LoRAs, or with a transformer you trained
(--model.transformer runs/mine/final/transformer). The same seed and settings give the same video."""


def run(argv: list[str]) -> None:
    """Parse and generate."""
    config = parse(
        "generate",
        argv,
        sections=("task", "model", "text", "sampling", "generate", "run"),
        description=DESCRIPTION,
    )
    from cogvideox_factory.torch_engine import generate

    generate.run(config)
