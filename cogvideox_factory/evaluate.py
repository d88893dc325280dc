"""Evaluating a folder of videos: metrics of each, a judge's verdicts against the prompts, likeness to a reference.

A video that cannot be read is reported by name and never stops the others.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory import quality
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.rows import VIDEO_SUFFIXES, read_text
from cogvideox_factory.data.video import ClipSpec, probe, read_clip
from cogvideox_factory.errors import DataError, FactoryError

_PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(kw_only=True, slots=True)
class Entry:
    """One video and what was found about it."""

    path: Path
    prompt: str | None = None
    image: Path | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    verdict: dict[str, bool] = field(default_factory=dict)
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what the report keeps; an infinite PSNR (equal pictures) becomes the string "inf"."""
        facts: dict[str, Any] = {"file": self.path.name, "prompt": self.prompt}
        if self.image is not None:
            facts["image"] = str(self.image)
        if self.error is not None:
            return facts | {"error": self.error}
        return facts | {"metrics": plain(self.metrics)} | ({"verdict": self.verdict} if self.verdict else {})


def plain(values: Mapping[str, float]) -> dict[str, Any]:
    """Round for a report; JSON has no infinity."""
    return {name: round(value, 5) if np.isfinite(value) else str(value) for name, value in values.items()}


def find_videos(folder: Path) -> list[Path]:
    """Return the video files in `folder`, sorted by name.

    Raises:
        FactoryError: no such folder.
        DataError: no video in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise FactoryError(f"{folder} {what}; give the folder that holds the videos.")
    found = sorted(p for p in folder.iterdir() if p.suffix.lower() in VIDEO_SUFFIXES and not p.name.startswith("."))
    if not found:
        raise DataError(f"{folder} holds no video ({', '.join(VIDEO_SUFFIXES)}); subfolders are not searched.")
    return found


def read_prompts(videos: list[Path], file: Path | None) -> dict[Path, str]:
    """Return the prompt of each video that has one.

    Args:
        videos: in the order of the lines of a text file.
        file: text with one prompt a line, or JSON {file name: prompt}; None takes the `.json` (key "prompt", as
            `generate` writes it) or the `.txt` beside each video, where there is one.

    Raises:
        DataError: prompts and videos do not match; every fault is named at once.
    """
    if file is None:
        return {video: prompt for video in videos if (prompt := _sidecar(video, "prompt"))}
    if not file.is_file():
        raise FactoryError(f"{file} does not exist; --prompts takes a text file (one prompt a line) or a JSON file.")
    text = read_text(file)
    if file.suffix.lower() == ".json":
        return _named_prompts(videos, file, _json_object(file, text))
    lines = text.rstrip("\n").split("\n")
    if len(lines) != len(videos) or not all(line.strip() for line in lines):
        empty = [str(number) for number, line in enumerate(lines, 1) if not line.strip()]
        blank = f" (empty: line {', '.join(empty)})" if empty else ""
        raise DataError(
            f"{file} has {len(lines)} line(s){blank}, the folder {len(videos)} video(s); give one prompt for each, "
            "in the order of the sorted file names, or JSON {file name: prompt}."
        )
    return {video: line.strip() for video, line in zip(videos, lines)}


def _json_object(file: Path, text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file} is no JSON: {error}.") from error
    if not isinstance(values, dict):
        raise DataError(f"{file} holds a {type(values).__name__}; it must be an object.")
    return values


def _named_prompts(videos: list[Path], file: Path, values: dict[str, Any]) -> dict[Path, str]:
    names = {video.name for video in videos}
    faults = [f"no prompt for {name}" for name in sorted(names - values.keys())]
    faults += [f"no video {name}" for name in sorted(values.keys() - names)]
    faults += [f"{name} has no text" for name in sorted(names & values.keys()) if not _is_text(values[name])]
    if faults:
        raise DataError(f"{file} does not match the videos: {'; '.join(faults)}.")
    return {video: values[video.name].strip() for video in videos}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _sidecar(video: Path, key: str) -> str | None:
    """Return `key` of the JSON beside `video`; a prompt may also stand in a text file."""
    record = video.with_suffix(".json")
    if record.is_file():
        value = _json_object(record, read_text(record)).get(key)
        if _is_text(value):
            return str(value).strip()
    caption = video.with_suffix(".txt")
    if key == "prompt" and caption.is_file():
        return read_text(caption).strip() or None
    return None


def find_images(videos: list[Path], given: Path | None) -> dict[Path, Path]:
    """Return the first-frame picture of each video: one file for all, one of the same stem each, or the sidecar's.

    Raises:
        FactoryError: no such file or folder.
        DataError: a folder without a picture for a video.
    """
    if given is None:
        named = {video: _sidecar(video, "image") for video in videos}
        return {video: Path(name) for video, name in named.items() if name}
    if given.is_file():
        return dict.fromkeys(videos, given)
    if not given.is_dir():
        raise FactoryError(
            f"{given} does not exist; --image takes a picture, or a folder with one named like each video."
        )
    by_stem = {path.stem: path for path in sorted(given.iterdir()) if path.suffix.lower() in _PICTURE_SUFFIXES}
    if missing := [video.stem for video in videos if video.stem not in by_stem]:
        raise DataError(f"{given} has no picture named {', '.join(missing)} (.png, .jpg, .webp or .bmp).")
    return {video: by_stem[video.stem] for video in videos}


def read_video(path: Path) -> np.ndarray:
    """Return all frames of a video as uint8 [F, H, W, 3], upright, in its own size.

    Raises:
        ClipError: it cannot be read.
    """
    info = probe(path)
    spec = ClipSpec(
        num_frames=info.num_frames, height=info.height, width=info.width, fps=info.fps, fps_policy="stretch"
    )
    return read_clip(path, spec, info=info).pixels


def evaluate(
    entries: list[Entry],
    *,
    judge: str = "none",
    reference: list[Path] | None = None,
    text_similarity: Callable[[np.ndarray, str], float] | None = None,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Fill in `entries` and return the report.

    Args:
        entries: videos, with prompt and image where known.
        judge: "none", or "tiny" for the tiny world, which needs prompts of that world.
        reference: videos the set is compared with.
        text_similarity: gives a metric of a video [F, H, W, 3] and its prompt, which then every video needs.
        advance: called after each video read.

    Raises:
        DataError: the judge does not understand every prompt (all are named), a prompt is missing that is needed, or
            a reference cannot be read.
    """
    if judge == "tiny":
        _require_tiny_prompts(entries)
    if text_similarity and (missing := [entry.path.name for entry in entries if entry.prompt is None]):
        raise DataError(f"no prompt is known of {', '.join(missing)}; give --prompts FILE to compare them with text.")
    ours = []
    for entry in entries:
        try:
            ours.append(_evaluate_one(entry, judge, text_similarity))
        except ValueError as error:  # ours, and what a metric says of a picture it cannot take
            entry.error = str(error)
        advance()
    report: dict[str, Any] = {"num_videos": len(entries), "num_failed": sum(e.error is not None for e in entries)}
    report["mean"] = plain(_means([entry.metrics for entry in entries if entry.error is None]))
    if judge != "none":
        report["judge"] = {"name": judge} | plain(_means([entry.verdict for entry in entries if entry.error is None]))
    if reference and ours:
        theirs = []
        for path in reference:
            theirs.append(quality.features(read_video(path)))
            advance()
        report["reference"] = {"num_videos": len(theirs), "similarity": round(quality.similarity(ours, theirs), 5)}
    return report | {"videos": [entry.to_json() for entry in entries]}


def _evaluate_one(entry: Entry, judge: str, text_similarity: Callable[[np.ndarray, str], float] | None) -> np.ndarray:
    video = read_video(entry.path)
    entry.metrics = quality.measure(video)
    if text_similarity is not None:
        assert entry.prompt is not None
        entry.metrics["clip"] = text_similarity(video, entry.prompt)
    if entry.image is not None:
        image = read_image(entry.image, *video.shape[1:3])
        entry.metrics |= quality.first_frame_fidelity(video, image)
    if judge == "tiny":
        from cogvideox_factory.tiny.judge import score

        assert entry.prompt is not None
        entry.verdict = score(video, entry.prompt)
    return quality.features(video)


def _require_tiny_prompts(entries: list[Entry]) -> None:
    from cogvideox_factory.tiny.judge import parse_caption

    faults = []
    for entry in entries:
        if entry.prompt is None:
            faults.append(f"{entry.path.name} has no prompt")
            continue
        try:
            parse_caption(entry.prompt)
        except FactoryError:
            faults.append(f"{entry.path.name}: {entry.prompt!r} is no sentence of the tiny world")
    if faults:
        raise DataError(
            "the tiny judge needs a prompt of the tiny world for every video, like "
            "'a large red circle moves right on a white background':\n  " + "\n  ".join(faults)
        )


def _means(rows: list[dict[str, Any]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}
