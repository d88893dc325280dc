"""`cogvideox evaluate`: numbers about a folder of videos, and whether they show what their prompts say."""

import json
from pathlib import Path
from typing import Annotated, Literal

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.errors import DataError
from cogvideox_factory.metrics import console, progress_bar, say

DESCRIPTION = """Measure every video of a folder: sharpness (deviation of the Laplacian, grey levels), flicker (grey
levels), consistency (SSIM of successive frames), motion (pixels a frame); against a first-frame picture PSNR and SSIM;
against a reference set the likeness of simple statistics. The tiny judge tells whether videos of moving shapes show the
colour, shape, motion and background of their prompts; a CLIP model you have adds how well frames and prompt agree.
Nothing is downloaded."""


class Evaluate(BaseModel):
    """Settings of an evaluation."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)

    folder: Annotated[str, tyro.conf.Positional]
    """Folder of videos; subfolders are not searched."""
    prompts: str | None = None
    """Text with one prompt a line in the order of the sorted file names, or JSON {file name: prompt}. Without it: the
    .json (key "prompt") that generate leaves beside a video, or a .txt."""
    reference: str | None = None
    """Folder of videos to compare the set with."""
    image: str | None = None
    """First-frame picture of all videos, or a folder with one named like each. Without it: "image" of the .json."""
    judge: Literal["none", "tiny"] = "none"
    """tiny: judge the moving shapes of the embedded model's world."""
    clip: str | None = None
    """Folder of a CLIP model (a local one): also the mean cosine of each video's frames and its prompt."""
    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write the whole report here."""


def run(argv: list[str]) -> None:
    """Evaluate, print the tables, write the report."""
    settings = tyro.cli(Evaluate, args=argv, prog="cogvideox evaluate", description=DESCRIPTION)
    from cogvideox_factory import evaluate
    from cogvideox_factory.publish import publish_text

    videos = evaluate.find_videos(Path(settings.folder))
    prompts = evaluate.read_prompts(videos, Path(settings.prompts) if settings.prompts else None)
    images = evaluate.find_images(videos, Path(settings.image) if settings.image else None)
    reference = evaluate.find_videos(Path(settings.reference)) if settings.reference else []
    entries = [evaluate.Entry(path=path, prompt=prompts.get(path), image=images.get(path)) for path in videos]
    text_similarity = None
    if settings.clip:
        from cogvideox_factory.torch_engine.clip import Clip

        text_similarity = Clip.from_folder(settings.clip).similarity
    with progress_bar("evaluating", len(entries) + len(reference)) as advance:
        report = evaluate.evaluate(
            entries, judge=settings.judge, reference=reference, text_similarity=text_similarity, advance=advance
        )
    _print_tables(report)
    if settings.json_file:
        publish_text(Path(settings.json_file), json.dumps(report, indent=1, ensure_ascii=False) + "\n")
        say(f"report: {settings.json_file}")
    if failed := [f"{row['file']}: {row['error']}" for row in report["videos"] if "error" in row]:
        raise DataError(f"{len(failed)} of {len(videos)} videos could not be evaluated:\n  " + "\n  ".join(failed))


def _print_tables(report: dict) -> None:
    from rich.table import Table

    metrics = Table("video", *(_short(name) for name in report["mean"]))
    for row in report["videos"]:
        found = row.get("metrics", {})
        metrics.add_row(row["file"], *(_show(found.get(name)) for name in report["mean"]))
    metrics.add_section()
    metrics.add_row("mean", *(_show(value) for value in report["mean"].values()))
    console.print(metrics)
    if judged := [name for name in report.get("judge", {}) if name != "name"]:
        verdicts = Table("video", *judged)
        for row in report["videos"]:
            verdicts.add_row(row["file"], *(_tell(row.get("verdict", {}).get(name)) for name in judged))
        verdicts.add_section()
        verdicts.add_row("right", *(f"{report['judge'][name]:.0%}" for name in judged))
        console.print(verdicts)
    if "reference" in report:
        found = report["reference"]
        say(f"likeness to {found['num_videos']} reference video(s): {found['similarity']:.3f} (1: the same statistics)")


def _short(name: str) -> str:
    return name.replace("first_frame_", "first ")


def _show(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.3f}"


def _tell(right: bool | None) -> str:
    return "" if right is None else "yes" if right else "no"
