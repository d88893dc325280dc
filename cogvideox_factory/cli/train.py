"""`cogvideox train`: a cache (or raw clips) becomes a LoRA or a fine-tuned transformer."""

from cogvideox_factory.cli.engine import load_engine
from cogvideox_factory.cli.original import expand
from cogvideox_factory.cli.settings import parse

DESCRIPTION = """Fine-tune a CogVideoX model: train.method lora or full, task t2v or i2v, from a cache or raw clips.
The run folder holds config.yaml, metrics.jsonl, tensorboard, checkpoint-N/, samples/ and final/. The same command
again goes on from the newest checkpoint, bit for bit."""

SECTIONS = ("task", "engine", "mindspore", "model", "data", "cache", "text", "lora", "train", "parallel",
            "sampling", "validation", "run")  # fmt: skip


def run(argv: list[str]) -> None:
    """Parse and train."""
    config = parse("train", expand("train", argv), sections=SECTIONS, description=DESCRIPTION)
    load_engine(config, "train", sections=SECTIONS).run(config)
