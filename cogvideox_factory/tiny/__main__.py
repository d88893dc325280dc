"""`python -m cogvideox_factory.tiny`: what the embedded model is made from, so that anyone can make it again.

    python -m cogvideox_factory.tiny clips  OUT --count 4096            # clips of the world with captions
    python -m cogvideox_factory.tiny model  OUT --task t2v --vae runs/vae/vae [--transformer FOLDER]

`recipes/tiny/README.md` tells the whole way.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import progress_bar, say


@dataclass(kw_only=True)
class Clips:
    """Draw clips of the world of moving shapes into a folder, each with its caption beside it."""

    out: Annotated[Path, tyro.conf.Positional]
    count: int = 1024
    seed: int = 1
    scenes: Literal["train", "held_out", "sks", "bounce"] = "train"
    """train and held_out never share a combination of shape, colour, motion and background; sks and bounce are new."""
    num_frames: int = 9
    height: int = 64
    width: int = 64
    fps: float = 8.0


@dataclass(kw_only=True)
class Model:
    """Put a tiny model folder together from trained parts, a drawn text encoder and the tokenizer."""

    out: Annotated[Path, tyro.conf.Positional]
    task: Literal["t2v", "i2v"] = "t2v"
    vae: Path
    """Folder of the VAE."""
    transformer: Path | None = None
    """Folder of the transformer; none yet for a model whose transformer is to be trained."""
    dtype: Literal["float32", "bfloat16"] = "float32"


def draw_clips(ask: Clips) -> None:
    """Write `count` mp4 files and captions.

    Raises:
        FactoryError: a number that is none of clips, frames, pixels or frames a second.
    """
    for name, least in (("count", 1), ("num_frames", 1), ("height", 16), ("width", 16), ("fps", 0.1)):
        if getattr(ask, name) < least:
            raise FactoryError(f"{name}={getattr(ask, name)}: give {least} or more.")
    from cogvideox_factory.data.export import export_to_video
    from cogvideox_factory.publish import publish_text
    from cogvideox_factory.tiny.world import CONCEPTS, concept_scene, random_scene, render

    with progress_bar("drawing", ask.count) as advance:
        for index in range(ask.count):
            if ask.scenes in CONCEPTS:
                scene = concept_scene(ask.seed, index, ask.scenes)
            else:
                scene = random_scene(ask.seed, index, split="held_out" if ask.scenes == "held_out" else "train")
            frames = render(scene, num_frames=ask.num_frames, height=ask.height, width=ask.width, fps=ask.fps)
            export_to_video(frames, ask.out / f"{index:05}.mp4", fps=ask.fps)
            publish_text(ask.out / f"{index:05}.txt", scene.caption + "\n")
            advance()
    say(f"{ask.count} clips in {ask.out}")


def main() -> int:
    """Do one of the two and return the exit code."""
    kinds = {"clips": Clips, "model": Model}
    ask = tyro.extras.subcommand_cli_from_dict(kinds, prog="python -m cogvideox_factory.tiny")
    try:
        _carry_out(ask)
    except FactoryError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _carry_out(ask: Clips | Model) -> None:
    from cogvideox_factory.tiny import build

    if isinstance(ask, Clips):
        draw_clips(ask)
    else:
        folder = build.assemble_model(ask.out, ask.task, vae=ask.vae, transformer=ask.transformer, dtype=ask.dtype)
        say(f"model in {folder}")


if __name__ == "__main__":
    sys.exit(main())
