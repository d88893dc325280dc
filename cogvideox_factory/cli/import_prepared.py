"""`cogvideox import-prepared`: a folder that the older trainers prepared becomes a cache."""

from cogvideox_factory.cli.settings import parse

DESCRIPTION = """Take over what the older prepare_dataset wrote (mindone's cogvideox_factory or its PyTorch ancestor):
data.root with prompts.txt, videos.txt, video_latents/, prompt_embeds/ and, for i2v, image_latents/, as .npy or .pt.
Every file is read and checked; each row ends in one named state. The result is a cache that `cogvideox train` takes,
with the model, size and text length of the recipe. What the folder cannot tell (which VAE and text encoder made it) is
tested on a few clips and written down in cache.json."""


def run(argv: list[str]) -> None:
    """Parse and import."""
    sections = ("task", "model", "data", "cache", "text", "run")
    config = parse("import-prepared", argv, sections=sections, description=DESCRIPTION)
    from cogvideox_factory.torch_engine import import_prepared

    import_prepared.run(config)
