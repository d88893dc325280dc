"""`cogvideox demo`: the whole factory on clips it draws and a tiny model it builds, on any machine."""

import json
import time
from pathlib import Path

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import duration, say
from cogvideox_factory.recipe import check, write_recipe

VARIANT = "cogvideox1.5-5b"
PROMPT = "a large red circle moves right on a white background"

DESCRIPTION = """Draw clips of moving shapes, prepare them, train a LoRA and generate the same prompt before and after.
The model has the real architecture (that of CogVideoX1.5) and random weights, so its video is noise; what this shows is
that every stage works on this machine, and the commands to run each of them on your own data."""


class Demo(BaseModel):
    """Settings of the demo."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    out: str = "demo"
    """Folder for everything the demo makes; it must be new or empty."""
    num_clips: int = Field(default=24, ge=6)
    """Clips to draw; 4 of them are held out."""
    steps: int = Field(default=120, gt=0)
    """Training steps."""


def run(argv: list[str]) -> None:
    """Run every stage and say what it made."""
    settings = tyro.cli(Demo, args=argv, prog="cogvideox demo", description=DESCRIPTION)
    out = Path(settings.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FactoryError(f"{out} is not empty; give a new folder: cogvideox demo --out FOLDER")
    started = time.monotonic()
    say(f"1/5  drawing {settings.num_clips} clips and building a tiny model in {out}")
    make_clips(out / "clips", settings.num_clips)
    from cogvideox_factory.tiny.build import build_tiny_model

    build_tiny_model(out / "model", VARIANT)
    config = demo_config(out, settings.steps)
    write_recipe(out / "recipe.yaml", config)

    from cogvideox_factory.torch_engine import generate, prepare, train

    _stage(2, "prepare", out)
    prepare.run(config)
    _stage(3, "generate", out, f"--generate.out {out / 'before.mp4'}")
    generate.run(_with(config, lora=[], out=str(out / "before.mp4")))
    _stage(4, "train", out)
    train.run(config)
    _stage(5, "generate", out, f"--generate.lora {out / 'run'} --generate.out {out / 'after.mp4'}")
    generate.run(_with(config, lora=[str(out / "run")], out=str(out / "after.mp4")))
    rows = [json.loads(line) for line in (out / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [row["validation_loss"] for row in rows if "validation_loss" in row]
    say(
        f"done in {duration(time.monotonic() - started)}. Loss on held-out clips: {losses[0]:.4f} before, "
        f"{losses[-1]:.4f} after. Look into {out}: clips/ cache/ run/ before.mp4 after.mp4 recipe.yaml"
    )


def make_clips(folder: Path, count: int) -> None:
    """Draw `count` clips of the tiny world with their captions beside them."""
    from cogvideox_factory.data.export import export_to_video
    from cogvideox_factory.publish import publish_text
    from cogvideox_factory.tiny.world import random_scene, render

    for index in range(count):
        scene = random_scene(7, index)
        frames = render(scene, num_frames=9, height=64, width=96, fps=16)
        export_to_video(frames, folder / f"{index:03}.mp4", fps=16)
        publish_text(folder / f"{index:03}.txt", scene.caption + "\n")


def demo_config(out: Path, steps: int) -> Config:
    """Return the recipe of the demo, complete except for what is generated."""
    return check(
        {
            "task": "t2v",
            "model": {"path": str(out / "model")},
            "data": {"root": str(out / "clips")},
            "cache": {"dir": str(out / "cache")},
            "lora": {"rank": 16, "alpha": 16.0},
            "train": {
                "dir": str(out / "run"), "steps": steps, "batch_size": 4, "learning_rate": 3e-3,
                "schedule": "cosine", "warmup_steps": min(10, steps - 1), "checkpointing": "none", "log_every": 20,
                "save_every": max(steps // 2, 1),
            },
            "validation": {"every": max(steps // 2, 1), "num_clips": 4},
            "sampling": {"steps": 10},
            "generate": {"prompt": [PROMPT]},
        },
        source="demo",
    )  # fmt: skip


def _with(config: Config, **changes) -> Config:
    return config.model_copy(update={"generate": config.generate.model_copy(update=changes)})


def _stage(number: int, command: str, out: Path, flags: str = "") -> None:
    say(f"{number}/5  cogvideox {command} {out / 'recipe.yaml'} {flags}".rstrip())
