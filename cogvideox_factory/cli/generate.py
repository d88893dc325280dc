"""`cogvideox generate`: prompts, and images or videos, become videos."""

from pathlib import Path

from cogvideox_factory.cli.engine import load_engine
from cogvideox_factory.cli.original import expand
from cogvideox_factory.cli.settings import parse
from cogvideox_factory.config import Config, Parallel
from cogvideox_factory.config.start import MindSpore
from cogvideox_factory.errors import FactoryError

DESCRIPTION = """Make one video a prompt, with the model as published, with LoRAs, or with a transformer you trained.
In place of a recipe give a run folder (cogvideox generate runs/mine --generate.prompt "...") for what that run
learned at the size it was trained at, or --like VIDEO for the settings of a video made before. The same settings give
the same video, on one process or on the many that torchrun starts (parallel.*), and the same command again makes only
what is missing."""
SECTIONS = ("task", "engine", "mindspore", "model", "text", "sampling", "generate", "parallel", "run")


def run(argv: list[str]) -> None:
    """Parse and generate."""
    base, argv = starting_point(expand("generate", argv))
    config = parse("generate", argv, sections=SECTIONS, description=DESCRIPTION, base=base)
    load_engine(config, "generate", sections=SECTIONS).run(config)


def starting_point(argv: list[str]) -> tuple[Config | None, list[str]]:
    """Return the settings of `--like VIDEO` or of a run folder, if the words begin so, and the words that are left.

    Raises:
        FactoryError: no such video or run, or one that says nothing.
    """
    if argv and argv[0] == "--like":
        if len(argv) < 2:
            raise FactoryError("--like which video? usage: cogvideox generate --like VIDEO [--generate.out FILE]")
        from cogvideox_factory.jobs import settings_like

        return settings_like(Path(argv[1])), argv[2:]
    if "--like" in argv:
        raise FactoryError("--like VIDEO takes the place of a recipe, so it comes first, and other settings after it")
    if argv and not argv[0].startswith("-") and Path(argv[0]).is_dir():
        base = settings_of_run(Path(argv[0]))
        if "--engine" in argv or any(word.startswith("--engine=") for word in argv):
            base = base.model_copy(update={"mindspore": MindSpore()})  # of the engine that trained
        return base, argv[1:]
    return None, argv


def settings_of_run(folder: Path) -> Config:
    """Return the settings of a run, with what it learned and the size it was trained at.

    Raises:
        FactoryError: no run, or one that is not finished.
    """
    from cogvideox_factory.lora_files import resolve_lora
    from cogvideox_factory.recipe import read_recipe
    from cogvideox_factory.weights import resolve_transformer

    if (folder / "state.json").is_file():
        raise FactoryError(
            f"{folder} is a checkpoint. `cogvideox export {folder} --to diffusers` makes of it what --generate.lora or "
            "--model.transformer takes."
        )
    if not (folder / "config.yaml").is_file():
        raise FactoryError(f"{folder} is no run folder: it has no config.yaml. Give a run folder or a recipe file.")
    config = read_recipe(folder / "config.yaml")
    data = config.data
    ask = {"num_frames": data.num_frames, "height": data.height, "width": data.width, "fps": data.fps}
    model: dict[str, object] = {}
    if config.train.method == "lora":
        resolve_lora(folder)  # there is one
        ask["lora"] = [str(folder)]
    else:
        resolve_transformer(folder)
        model = {"transformer": str(folder), "transformer_config": None}
    return config.model_copy(
        update={
            "generate": config.generate.model_copy(update=ask),
            "model": config.model.model_copy(update=model),
            "parallel": Parallel(),  # how training was divided says nothing about making videos
        }
    )
