"""A lesson for the embedded model: clips of a concept it does not know, prompts to examine it with, and the marks.

A lesson is what a user does with real clips, small: a few dozen captioned clips of one new thing. The examination
asks for the new thing in scenes the clips do not show, and for known things, because a fine-tune must not cost what the
model knew. Clips of known things go along as reminders, the tiny world's form of prior preservation (Ruiz et al. 2022,
arXiv 2208.12242).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.publish import publish_text
from cogvideox_factory.tiny.judge import score
from cogvideox_factory.tiny.world import Scene, concept_scene, random_scene, render

SIZE = {"num_frames": 9, "height": 64, "width": 64, "fps": 8.0}
"""What the embedded model was trained on."""
TAUGHT = {"sks": ("colour", "shape"), "bounce": ("motion",)}
"""Attributes that make a concept; all of them must be right."""
KNOWN = ("colour", "shape", "motion", "background")
_LESSON_SEED, _EXAM_SEED = 11, 12


@dataclass(frozen=True, kw_only=True, slots=True)
class Exam:
    """Prompts to generate, those about the new concept first."""

    concept: str
    scenes: tuple[Scene, ...]
    num_concept: int

    @property
    def prompts(self) -> list[str]:
        """Return the sentences."""
        return [scene.caption for scene in self.scenes]


def draw_clips(folder: Path, concept: str, *, num_clips: int, num_reminders: int) -> None:
    """Write clips of `concept` and of known things into `folder`, each with its caption beside it."""
    scenes = [(f"{concept}-{index:03}", concept_scene(_LESSON_SEED, index, concept)) for index in range(num_clips)]
    scenes += [(f"known-{index:03}", random_scene(_LESSON_SEED, index)) for index in range(num_reminders)]
    for name, scene in scenes:
        export_to_video(render(scene, **SIZE), folder / f"{name}.mp4", fps=SIZE["fps"])
        publish_text(folder / f"{name}.txt", scene.caption + "\n")


def make_exam(concept: str, *, num_concept: int, num_known: int) -> Exam:
    """Return an examination; the known scenes are of combinations that no training ever shows."""
    scenes = [concept_scene(_EXAM_SEED, index, concept) for index in range(num_concept)]
    scenes += [random_scene(_EXAM_SEED, index, split="held_out") for index in range(num_known)]
    return Exam(concept=concept, scenes=tuple(scenes), num_concept=num_concept)


def draw_first_frames(folder: Path, scenes: Sequence[Scene]) -> list[Path]:
    """Write the first frame of each scene as PNG, for image-to-video, and return the files."""
    paths = [folder / f"{index:03}.png" for index in range(len(scenes))]
    for path, scene in zip(paths, scenes):
        write_png(path, render(scene, **SIZE)[0])
    return paths


def mark(exam: Exam, videos: Sequence[np.ndarray]) -> list[dict[str, bool]]:
    """Return for each video (uint8 [F, H, W, 3]) the judge's verdict, and under "right" whether it passed."""
    verdicts = []
    for index, (scene, video) in enumerate(zip(exam.scenes, videos, strict=True)):
        verdict = score(video, scene)
        wanted = TAUGHT[exam.concept] if index < exam.num_concept else KNOWN
        verdicts.append(verdict | {"right": all(verdict[name] for name in wanted)})
    return verdicts


def summary(exam: Exam, verdicts: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """Return `concept`: share of its videos that show it; `known`: share of the four attributes that are right."""
    concept, known = verdicts[: exam.num_concept], verdicts[exam.num_concept :]
    return {
        "concept": float(np.mean([verdict["right"] for verdict in concept])),
        "known": float(np.mean([[verdict[name] for name in KNOWN] for verdict in known])),
    }
