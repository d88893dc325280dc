"""A workshop in which the commands of the pages run as written, on tiny models and drawn clips."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.tiny.world import random_scene, render
from tests.clips import draw_clips
from tests.docs.snippets import ROOT

COMMIT = "0" * 40
PUBLISHED_IDS = sorted(facts.hub_id for facts in PUBLISHED.values() if facts.hub_id)

SMALL = {
    "data.num_frames": "9", "data.height": "64", "data.width": "96", "train.steps": "2", "train.warmup_steps": "0",
    "validation.every": "0", "generate.num_frames": "9", "generate.height": "64", "generate.width": "96",
    "sampling.steps": "2", "text.max_sequence_length": "16", "lora.rank": "4", "train.gradient_accumulation": "1",
}  # fmt: skip
"""What a page leaves to the recipe or the model is made small; what it names itself counts, but for these."""
CAPS = {"train.steps": "3", "sampling.steps": "3", "data.num_frames": "9"}

SECTIONS = {
    "doctor": ("data", "text"),
    "prepare": ("data", "text"),
    "train": ("data", "text", "train", "validation", "lora"),
    "sweep": ("data", "text", "train", "validation", "lora"),
    "generate": ("generate", "sampling", "text"),
}


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, tiny_model) -> Path:
    """A folder with clips, pictures, a cache and a run, where pages expect them; the hub holds tiny models."""
    folder = tmp_path_factory.mktemp("workshop")
    for name in ("recipes", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    draw_clips(folder / "my-clips", [(18, 352, 640)] * 4)  # large enough for the shapes of a bucket file
    frames = render(random_scene(5, 0), num_frames=16, height=48, width=80, fps=8)
    export_to_video(frames, folder / "old.mp4", fps=8)
    Image.fromarray(np.asarray(frames[0])).save(folder / "fox.png")
    (folder / "prompts.txt").write_text("a red fox\na blue fox\n")
    fill_hub_cache(folder / "hub", tiny_model)
    with pytest.MonkeyPatch.context() as patch:
        move_in(folder, patch)
        for words in (
            ["prepare", "recipes/t2v_lora.yaml", "--data.root", "my-clips", "--cache.dir", "caches/mine"],
            ["train", "recipes/t2v_lora.yaml", "--cache.dir", "caches/mine", "--train.dir", "runs/mine"],
            ["generate", "runs/mine", "--generate.prompt", "a red fox", "--generate.out", "videos/fox.mp4"],
        ):
            assert main(small(words)) == 0, words
    return folder


def move_in(folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Make the workshop the working folder, and its hub the only one."""
    patch.chdir(folder)
    patch.setenv("HF_HUB_CACHE", str(folder / "hub"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    patch.setattr(constants, "HF_HUB_CACHE", str(folder / "hub"))
    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def fill_hub_cache(cache: Path, tiny_model: Callable[..., Path]) -> None:
    """Lay tiny models where the hub's own cache would have the published ones, by their names on these pages."""
    for hub_id in PUBLISHED_IDS:
        variant = next(name for name, facts in PUBLISHED.items() if (facts.hub_id or "").lower() == hub_id.lower())
        repository = cache / f"models--{hub_id.replace('/', '--')}"
        (repository / "snapshots").mkdir(parents=True)
        (repository / "snapshots" / COMMIT).symlink_to(tiny_model(variant))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def in_workshop(workshop, monkeypatch):
    """The workshop as the working folder."""
    move_in(workshop, monkeypatch)
    return workshop


def small(words: list[str]) -> list[str]:
    """Return the words of a command with sizes that a test can afford."""
    words, at = list(words), None
    given = {word[2:].replace("-", "_"): index for index, word in enumerate(words) if word.startswith("--")}
    for name, index in given.items():
        if name in CAPS:
            words[index + 1] = CAPS[name]
    sections = SECTIONS.get(words[0], ())
    if "--like" in words or (words[0] == "doctor" and not any(word.endswith(".yaml") for word in words)):
        return words
    of_run = words[0] == "generate" and os.path.isdir(words[1])  # its own sizes
    for name, value in SMALL.items():
        section = name.partition(".")[0]
        if section in sections and name not in given and not ((of_run and section in ("text",)) or name in given):
            at = [*(at or []), f"--{name.replace('_', '-')}", value]
    return [*words, *(at or [])]
