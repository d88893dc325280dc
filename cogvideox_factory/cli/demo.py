"""`cogvideox demo`: the whole factory on clips it draws and the model it carries, on any machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import tyro
from pydantic import BaseModel, ConfigDict, Field

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import duration, say
from cogvideox_factory.recipe import check, write_recipe

DESCRIPTION = """Teach a small CogVideoX something new and look at the result: draws captioned clips of a thing the
model does not know, checks and prepares them, generates with the model as it is, trains a LoRA (or all weights),
generates again, scores both and writes one page, DIR/index.html. The model is real, tiny and part of this package;
nothing is downloaded. About two minutes on two CPU cores."""


_ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]
"""Attention alone is too little to bend in a model as narrow as this."""


class Demo(BaseModel):
    """Settings of the demo."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    out: str = "demo"
    """Folder for everything the demo makes; it must be new or empty."""
    task: Literal["t2v", "i2v"] = "t2v"
    """t2v: text to video. i2v: text and a first image to video."""
    method: Literal["lora", "full"] = "lora"
    """lora: adapters over the frozen model. full: every weight."""
    concept: Literal["bounce", "sks"] = "bounce"
    """What to teach. bounce: a new motion. sks: a pink star called "sks star", which takes more steps, because shapes
    are what this model knows least."""
    num_clips: int = Field(default=48, ge=8)
    """Clips of the new thing."""
    num_reminders: int = Field(default=48, ge=0)
    """Clips of known things that go along, so that the model keeps them."""
    steps: int = Field(default=600, gt=0)
    """Training steps."""
    num_prompts: int = Field(default=12, ge=2)
    """Videos of the new thing to generate, and as many of known things."""


def run(argv: list[str]) -> None:
    """Run every stage and leave the page."""
    ask = tyro.cli(Demo, args=argv, prog="cogvideox demo", description=DESCRIPTION)
    out = Path(ask.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FactoryError(f"{out} is not empty; give a new folder: cogvideox demo --out FOLDER")
    started = time.monotonic()
    scores = _run_stages(ask, out)
    say(f"done in {duration(time.monotonic() - started)}.")
    for when in ("before", "after"):
        shares = scores[when]
        say(f"  {when:<6}  the new thing {shares['concept']:>4.0%}   what it knew {shares['known']:>4.0%}")
    say(f"Look at it: {out / 'index.html'}")


def _run_stages(ask: Demo, out: Path) -> dict[str, dict[str, float]]:
    from cogvideox_factory.cli import doctor
    from cogvideox_factory.data.picture import write_png
    from cogvideox_factory.publish import publish_text
    from cogvideox_factory.report import demo_page, strip
    from cogvideox_factory.tiny import lesson

    concept = ask.concept
    exam = lesson.make_exam(concept, num_concept=ask.num_prompts, num_known=ask.num_prompts)
    seconds: dict[str, float] = {}
    recipe = out / "recipe.yaml"
    commands = _commands(ask, out, recipe)

    @contextmanager
    def stage(name: str, number: int) -> Iterator[None]:
        what, command = commands[number]
        say(f"[{number + 1}/{len(commands)}] {what}: {command}")
        begun = time.monotonic()
        yield
        seconds[name] = time.monotonic() - begun

    say(
        f"teaching a tiny CogVideoX {ask.num_clips} clips of something new ({concept}), among {ask.num_reminders} of "
        f"what it knows, in {out}"
    )
    begun = time.monotonic()
    lesson.draw_clips(out / "clips", concept, num_clips=ask.num_clips, num_reminders=ask.num_reminders)
    images = lesson.draw_first_frames(out / "images", exam.scenes) if ask.task == "i2v" else []
    config = demo_config(ask, out, exam.prompts, [str(path) for path in images])
    write_recipe(recipe, config)
    seconds["draw"] = time.monotonic() - begun
    with stage("doctor", 0):
        found = doctor.examine(config)
        doctor.print_tables(found)
        manifest = found.manifest
        manifest.require_good(strict=True)

    from cogvideox_factory.evaluate import read_video
    from cogvideox_factory.torch_engine import generate, prepare, train

    with stage("prepare", 1):
        prepare.run(config)
    with stage("generate before", 2):
        before = generate.run(_with(config, out=str(out / "before")))
    with stage("train", 3):
        train.run(config)
    with stage("generate after", 4):
        after = generate.run(_with_learned(ask, config, out))
    with stage("judge", 5):
        videos = {when: [read_video(path) for path in paths] for when, paths in (("before", before), ("after", after))}
        verdicts = {when: lesson.mark(exam, shown) for when, shown in videos.items()}
    scores = {when: lesson.summary(exam, marked) for when, marked in verdicts.items()}
    publish_text(out / "scores.json", json.dumps(scores, indent=1) + "\n")
    story = demo_page.Story(
        exam=exam, clips=sorted((out / "clips").glob(f"{concept}-*.mp4"))[:6], counts=manifest.counts(),
        before=before, after=after, verdicts=verdicts, scores=scores,
        metrics=demo_page.read_metrics(out / "run" / "metrics.jsonl"),
        trained=f"{ask.steps} steps of {'a LoRA' if ask.method == 'lora' else 'all weights'}",
        seconds=seconds, commands=commands, own_commands=own_commands(ask.task, ask.method),
    )  # fmt: skip
    publish_text(out / "index.html", demo_page.render(story))
    write_png(out / "strip.png", strip.before_after(videos["before"][:4], videos["after"][:4]))
    return scores


def _commands(ask: Demo, out: Path, recipe: Path) -> list[tuple[str, str]]:
    generate = f"cogvideox generate {recipe} --generate.out"
    return [
        ("look at the clips", f"cogvideox doctor {recipe}"),
        ("encode clips and captions once", f"cogvideox prepare {recipe}"),
        ("generate with the model as it is", f"{generate} {out / 'before'}"),
        ("train", f"cogvideox train {recipe}"),
        ("generate with what was learned", f"{generate} {out / 'after'} {_learned(ask, out)}"),
        ("let a judge look", f"cogvideox evaluate {out / 'after'} --judge tiny"),
    ]


def own_commands(task: str, method: str) -> list[tuple[str, str]]:
    """Return (what it does, the command) of each stage for clips in `my-clips` and a published model."""
    recipe = f"recipes/{task}_{method}.yaml"
    ask = '--generate.prompt "..."' + (" --generate.image first.png" if task == "i2v" else "")
    mine = f"{recipe} --data.root my-clips"
    return [
        ("look at the clips", f"cogvideox doctor {mine}"),
        ("encode clips and captions once", f"cogvideox prepare {mine} --cache.dir caches/mine"),
        ("generate with the model as it is", f"cogvideox generate {recipe} {ask} --generate.out before"),
        ("train", f"cogvideox train {mine} --cache.dir caches/mine --train.dir runs/mine"),
        ("generate with what was learned", f"cogvideox generate runs/mine {ask} --generate.out after"),
        ("measure the videos", "cogvideox evaluate after --reference my-clips"),
    ]


def demo_config(ask: Demo, out: Path, prompts: list[str], images: list[str]) -> Config:
    """Return the recipe of the demo; every stage reads it."""
    num_held_out = min(8, (ask.num_clips + ask.num_reminders) // 4)
    lora = {"lora": {"rank": 16, "alpha": 16.0, "target_modules": _ADAPTED}} if ask.method == "lora" else {}
    return check(
        {
            "task": ask.task,
            "model": {"path": f"tiny-{ask.task}"},
            "data": {"root": str(out / "clips"), "fps": 8.0},
            "cache": {"dir": str(out / "cache")},
            **lora,
            "train": {
                "dir": str(out / "run"), "method": ask.method, "steps": ask.steps, "batch_size": 8,
                "learning_rate": 2e-3 if ask.method == "lora" else 5e-4, "schedule": "cosine",
                "warmup_steps": min(20, ask.steps - 1), "checkpointing": "none", "log_every": 20,
                "save_every": ask.steps,
            },
            "validation": {"every": max(ask.steps // 3, 1), "num_clips": num_held_out},
            "sampling": {"steps": 20, "guidance_scale": 2.0, "tiling": False},
            "generate": {"prompt": prompts, "image": images, "fps": 8.0},
        },
        source="demo",
    )  # fmt: skip


def _learned(ask: Demo, out: Path) -> str:
    return f"--generate.lora {out / 'run'}" if ask.method == "lora" else f"--model.transformer {out / 'run'}"


def _with_learned(ask: Demo, config: Config, out: Path) -> Config:
    if ask.method == "lora":
        return _with(config, out=str(out / "after"), lora=[str(out / "run")])
    model = config.model.model_copy(update={"transformer": str(out / "run")})
    return _with(config.model_copy(update={"model": model}), out=str(out / "after"))


def _with(config: Config, **changes) -> Config:
    return config.model_copy(update={"generate": config.generate.model_copy(update=changes)})
