"""The page that `cogvideox demo` leaves: what was taught, before and after, and how to do it with clips of your own."""

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory.metrics import duration
from cogvideox_factory.report import html
from cogvideox_factory.tiny.lesson import Exam

_LESSONS = {
    "sks": "a shape and a colour it has never seen, a pink star, under a word it has never read: “sks star”",
    "bounce": "a motion it has never seen: “bounces”",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """Everything the page tells."""

    exam: Exam
    clips: Sequence[Path]
    """A few of the clips it was taught with."""
    counts: Mapping[str, int]
    """Clips a state, from the data check."""
    before: Sequence[Path]
    after: Sequence[Path]
    verdicts: Mapping[str, Sequence[Mapping[str, bool]]]
    """Under "before" and "after", one a video."""
    scores: Mapping[str, Mapping[str, float]]
    metrics: Sequence[Mapping[str, Any]]
    """Rows of the run's metrics.jsonl."""
    trained: str
    """What was trained, in a few words."""
    seconds: Mapping[str, float]
    """Time each stage took."""
    commands: Sequence[tuple[str, str]]
    """(what it does, the command) of each stage."""
    own_commands: Sequence[tuple[str, str]]
    """The same for clips of the reader's own."""


def render(story: Story) -> str:
    """Return the whole page."""
    exam, scores = story.exam, story.scores
    cut = exam.num_concept
    body = [
        html.heading("CogVideoX Factory: one lesson, before and after", 1),
        html.paragraph(
            f"A small CogVideoX that knows a world of moving shapes was taught {_LESSONS[exam.concept]}. "
            f"{sum(story.counts.values())} clips, {story.trained}, "
            f"{duration(sum(story.seconds.values()))} in all on this machine.",
        ),
        html.row([
            html.card(f"{scores['before']['concept']:.0%} → {scores['after']['concept']:.0%}", "show the new thing"),
            html.card(f"{scores['before']['known']:.0%} → {scores['after']['known']:.0%}", "of what it knew is right"),
            html.card(duration(story.seconds["train"]), "of training"),
        ]),
        html.heading("The new thing: left before, right after, same prompt and seed"),
        _pairs(story, range(cut)),
        html.heading("What it knew: the lesson must not cost it"),
        _pairs(story, range(cut, len(exam.scenes))),
        html.heading("Some of the clips it was taught with"),
        html.row([html.figure([path], path.with_suffix(".txt").read_text("utf-8").strip()) for path in story.clips]),
        html.heading("Loss"),
        _loss(story.metrics),
        html.heading("The data check"),
        html.table([*story.counts.items(), ("total", sum(story.counts.values()))]),
        html.heading("The same with your own clips"),
        html.paragraph("Put clips and captions into a folder (a.mp4 with a.txt beside it, and so on), and run:"),
        _commands(story.own_commands),
        html.heading("How this was made"),
        html.paragraph("Every stage above was one of these commands."),
        _commands(story.commands),
        html.heading("Time and versions"),
        html.table([*((stage, f"{seconds:.1f} s") for stage, seconds in story.seconds.items()), *versions()]),
    ]  # fmt: skip
    return html.document("CogVideoX Factory demo", body)


def _commands(commands: Sequence[tuple[str, str]]) -> str:
    return html.commands([line for what, command in commands for line in (f"# {what}", command, "")][:-1])


def versions() -> list[tuple[str, str]]:
    """Return (name, version) of what this ran on."""
    from importlib.metadata import version

    names = ("cogvideox-factory", "torch", "transformers", "numpy", "av")
    return [("python", platform.python_version()), *((name, version(name)) for name in names)]


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a metrics.jsonl."""
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _pairs(story: Story, chosen: range) -> str:
    figures = []
    for index in chosen:
        was, now = story.verdicts["before"][index]["right"], story.verdicts["after"][index]["right"]
        note = f"({'right' if was else 'wrong'} before, {'right' if now else 'wrong'} after)"
        media = [story.before[index], story.after[index]]
        figures.append(html.figure(media, story.exam.prompts[index], note=note, good=now))
    return html.row(figures)


def _loss(metrics: Sequence[Mapping[str, Any]]) -> str:
    series = {"training loss": [(row["step"], row["loss"]) for row in metrics if "loss" in row]}
    held = [(row["step"], row["validation_loss"]) for row in metrics if "validation_loss" in row]
    if held:
        series["loss on held-out clips"] = held
    return html.line_chart(series, x_label="steps")
