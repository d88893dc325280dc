"""Runs that both engines make from the same recipe, clips and cache; no framework here.

The cache is drawn, not encoded, so that its bytes are the same whatever computes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory import preparation
from cogvideox_factory.config import Config
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.diffusion.frames import num_latent_frames
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.tensors import open_tensors
from cogvideox_factory.tiny.world import random_scene, render
from tests.golden import FOLDER, cases

RUNS = {"t2v lora": "cogvideox-2b", "i2v full": "cogvideox1.5-5b-i2v"}
NUM_STEPS = 50
SHAPES = [(17, 64, 96)] * 2 + [(9, 64, 64)] * 3 + [(9, 64, 96)] * 3
"""Frames, height and width of clips for runs of several shapes."""
BUCKETED = {"t2v lora": "cache", "i2v full": "raw clips"}
"""Where each of those takes its clips from."""
PROMPT = "a red circle moves left"
LORAS = {engine: FOLDER / f"lora-{engine}.safetensors" for engine in ("torch", "mindspore")}
"""What one engine trained in the first of `RUNS`."""


def recipe(case: str, folder: Path, shapes: Sequence[tuple[int, int, int]] = [(9, 64, 96)] * 4, **more: Any) -> Config:
    """Return the settings of a run in `folder`, where its clips and its cache are made if they are not there."""
    task, method = case.split()
    sections: dict[str, Any] = {
        "task": task,
        "model": {"path": str(cases.model_folder(cases.TASKS[task]))},
        "data": {"root": str(folder / "clips"), "num_frames": 9, "height": 64, "width": 96, "fps": 8.0},
        "cache": {"dir": str(folder / "cache")},
        "text": {"max_sequence_length": 16},
        "train": {
            "dir": str(folder / "run"), "method": method, "steps": NUM_STEPS, "batch_size": 2, "log_every": 1,
            "gradient_accumulation": 2, "schedule": "cosine", "warmup_steps": 5, "max_grad_norm": 0.5,
            "learning_rate": 1e-3 if method == "lora" else 1e-4, "checkpointing": "none", "num_workers": 0,
        },
        "run": {"device": "cpu", "dtype": "float32"},
    }  # fmt: skip
    if task == "i2v":
        sections["cache"]["image_noise_variants"] = 2
    if method == "lora":
        sections["lora"] = {"rank": 2, "alpha": 2.0, "target_modules": ["to_q", "to_v"]}
    values = {key: value | more.get(key, {}) if isinstance(value, dict) else value for key, value in sections.items()}
    config = check(more | values, source="test")
    if not (folder / "clips").exists():
        _make_clips(folder / "clips", shapes)
    if not (folder / "cache" / "cache.json").exists():
        preparation.run(check(sections | {"data": values["data"]}, source="test"), Drawn)
    return config


def bucketed(case: str, folder: Path, **more: Any) -> Config:
    """Return the settings of a short run of several shapes."""
    data = {"num_frames": 17, "buckets": "auto"}
    train = {"steps": 8, "batch_size": 1, "schedule": "constant", "warmup_steps": 0} | more.pop("train", {})
    cache = {"dir": None} if BUCKETED[case] == "raw clips" else {}
    return recipe(case, folder, SHAPES, data=data, train=train, cache=cache, **more)


def request(variant: str, out: Path, **more: Any) -> Config:
    """Return the settings of one small video."""
    values = {
        "task": "i2v" if variant.endswith("i2v") else "t2v",
        "model": {"path": str(cases.model_folder(variant))},
        "sampling": {"steps": 4} | more.pop("sampling", {}),
        "text": {"max_sequence_length": 16},
        "generate": {"prompt": [PROMPT], "num_frames": 9, "height": 64, "width": 96, "out": str(out)}
        | more.pop("generate", {}),
        "run": {"device": "cpu", "dtype": "float32"},
    }  # fmt: skip
    return check(values | more, source="test")


VIDEOS: dict[str, dict[str, Any]] = {
    "t2v ddim lora": {"variant": "cogvideox-2b", "sampling": {"sampler": "ddim"}},
    "i2v dpm": {"variant": "cogvideox1.5-5b-i2v", "sampling": {"sampler": "dpm", "dynamic_guidance": True}},
    "t2v anew": {"variant": "cogvideox-5b", "sampling": {"guidance_scale": 1.0}},
    "i2v further": {"variant": "cogvideox-5b-i2v", "sampling": {"sampler": "ddim"}},
}
"""The last two are made of a video, and go on with one."""


def video_request(case: str, folder: Path, **more: Any) -> Config:
    """Return the settings of one of `VIDEOS`."""
    ask = dict(VIDEOS[case])
    given: dict[str, Any] = {"format": "npy"}
    if case.endswith("lora"):
        given["lora"] = [str(LORAS["torch"])]
    if case == "i2v dpm":
        given["image"] = [str(folder / "image.png")]
        if not (folder / "image.png").exists():
            write_png(folder / "image.png", render(random_scene(2, 0), num_frames=1, height=64, width=96, fps=8)[0])
    if case in ("t2v anew", "i2v further"):
        frames = render(random_scene(2, 1), num_frames=9, height=64, width=96, fps=8)
        source = [str(export_to_video(frames, folder / "source.mp4", fps=8))]
        given |= {"fps": 8.0} | ({"video": source, "strength": 0.5} if case == "t2v anew" else {"extend": source})
    given |= more.pop("generate", {})
    return request(ask.pop("variant"), folder / "video.npy", generate=given, **ask, **more)


EXPORTED = {case: FOLDER / f"exported-{case.split()[1]}" for case in ("t2v lora", "t2v full")}
"""What `export` made, for diffusers, of runs of the MindSpore engine."""


def to_export(case: str, folder: Path, **more: Any) -> Config:
    """Return the settings of two large steps; where all weights are trained, of a model that is small in a file."""
    sections: dict[str, dict[str, Any]] = {
        "train": {"steps": 2, "learning_rate": 0.05, "schedule": "constant", "warmup_steps": 0}
    }
    if case.endswith("full"):
        sections["model"] = {"transformer_config": str(folder / "transformer.json")}
        (folder / "transformer.json").write_text(json.dumps(cases.smallest().to_dict()))
    return recipe(case, folder, **sections, **more)


def losses(run: Path) -> np.ndarray:
    """Return the loss of every step."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return np.float64([row["loss"] for row in rows])


class Drawn:
    """An engine that draws what an encoder would make."""

    def auto_dtype(self, device: str, transformer: TransformerConfig) -> str:
        raise AssertionError("the recipe has a dtype")

    def encode(self, work: preparation.Work) -> dict[str, ClipError]:
        cache, count = work.cache, work.cache.settings.video.image_variants
        for caption in work.captions:
            cache.write_caption(caption, cases.normal("caption", caption, shape=(16, 32)))
        for clip in work.clips:
            assert clip.spec is not None
            frames, size = num_latent_frames(clip.spec.num_frames), (16, clip.spec.height // 8, clip.spec.width // 8)
            mean, logvar = (cases.normal(name, clip.footage, shape=(frames, *size)) for name in ("mean", "logvar"))
            image = {}
            if count:
                drawn = (cases.normal(name, clip.footage, shape=(count, *size)) for name in ("image", "spread"))
                image = dict(zip(("image_mean", "image_logvar"), drawn), image_sigmas=[0.0] + [0.05] * (count - 1))
            cache.write_clip(clip, mean=mean, logvar=logvar - 4, **image, crop={})
        return {}


def to_encode(case: str, folder: Path, **more: Any) -> Config:
    """Return the settings of a preparation of clips that are made in `folder`."""
    config = recipe(case, folder, **more)
    return config.model_copy(update={"cache": config.cache.model_copy(update={"dir": str(folder / "encoded")})})


def entries_of(cache: Path) -> dict[str, np.ndarray]:
    """Return a sample of every array of a cache, by file (which says what it was made of and with) and name."""
    found = {}
    for file in sorted(cache.rglob("*.safetensors")):
        with open_tensors(file) as tensors:
            for name in tensors.names:
                flat = tensors.read(name).astype(np.float32).reshape(-1)
                found[f"{file.relative_to(cache)}/{name}"] = flat[:: max(1, flat.size // 64)]
    return found


def keep_frames(video: np.ndarray, path: Path, *, fps: float) -> Path:
    """Write a sample video as it is, in place of `export_to_video`: H.264 would hide or add a difference."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path.with_suffix(".npy"), video)
    return path


def seen(frames: Path) -> np.ndarray:
    """Return a sample of the pixels of a video, uint8."""
    return np.load(frames)[:, ::8, ::8].copy()


def _make_clips(folder: Path, shapes: Sequence[tuple[int, int, int]]) -> None:
    for index, (num_frames, height, width) in enumerate(shapes):
        video = render(random_scene(1, index), num_frames=num_frames, height=height, width=width, fps=8)
        export_to_video(video, folder / f"{index}.mp4", fps=8)
        (folder / f"{index}.txt").write_text(f"a caption {index % 3}")
