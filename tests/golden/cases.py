"""The inputs and weights of the golden files, the same bytes in any environment; no framework here."""

import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.diffusion.samplers import SamplerTable, guidance_scales, sampler_table
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.models import PUBLISHED, TransformerConfig, VaeConfig, tiny_facts
from cogvideox_factory.tiny.build import build_tiny_model
from cogvideox_factory.tiny.layout import transformer_shapes
from cogvideox_factory.weights import load_folder

VARIANTS = list(PUBLISHED)
LARGER = "10b head"
"""A larger config's head size on a small model."""
CAPTIONS = ["A red circle moves left.", "", "a slow pan, " * 30, "  two\nlines\tand   spaces "]
TEXT_LENGTHS = (1, 20, 226)
VIDEO_FRAMES = (1, 9, 17, 49, 77, 81)


def normal(*key: str | int, shape: tuple[int, ...]) -> np.ndarray:
    return draws.normal(0, "golden", *key, shape=shape)


@cache
def model_folder(variant: str) -> Path:
    return build_tiny_model(Path(tempfile.mkdtemp()) / variant, variant)


def config_of(case: str) -> TransformerConfig:
    if case == LARGER:
        return replace(tiny_facts("cogvideox1.5-5b").transformer, attention_head_dim=96, norm_elementwise_affine=False)
    return tiny_facts(case).transformer


def smallest() -> TransformerConfig:
    """Return a 2B of one layer and one small head, whose weights fill 45 KB."""
    return replace(
        config_of("cogvideox-2b"), num_layers=1, num_attention_heads=1, attention_head_dim=16, time_embed_dim=16
    )


def weights_of(case: str) -> dict[str, np.ndarray]:
    if case != LARGER:
        return load_folder(model_folder(case) / "transformer")
    shapes = transformer_shapes(config_of(case))
    return {
        name: (0.1 if len(shape) == 1 else np.float32(np.prod(shape[1:]) ** -0.5)) * normal("weight", name, shape=shape)
        + np.float32("norm_q.weight" in name or "norm_k.weight" in name)
        for name, shape in shapes.items()
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One call of a transformer, and the gradient of its output."""

    latents: np.ndarray
    prompt_embeds: np.ndarray
    timesteps: np.ndarray
    ofs: np.ndarray | None
    grad: np.ndarray

    @property
    def shape(self) -> dict[str, int]:
        """What positions are made for."""
        _, frames, _, height, width = self.latents.shape
        text = self.prompt_embeds.shape[1]
        return {"latent_frames": frames, "latent_height": height, "latent_width": width, "text_length": text}


def step_of(case: str, batch: int = 2) -> Step:
    return step_for(config_of(case), batch)


def step_for(config: TransformerConfig, batch: int = 2) -> Step:
    """Return the call of a model with this config."""
    frames = 3 if config.patch_size_t is None else 4
    shape = (batch, frames, config.in_channels, 8, 12)
    return Step(
        latents=normal("latents", shape=shape),
        prompt_embeds=normal("prompt", shape=(batch, 16, config.text_embed_dim)),
        timesteps=np.array([999, 7][:batch], np.int64),
        ofs=np.full(1, 2.0, np.float32) if config.ofs_embed_dim else None,
        grad=normal("grad", shape=(batch, frames, config.out_channels, 8, 12)),
    )


# --- VAE --------------------------------------------------------------------------------------------------------------

VAE = VaeConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)
TILED = (9, 48, 64, {"tile_sample_min_height": 32, "tile_sample_min_width": 32})
"""Frames, height, width and tiles of the tiled case."""


def vae_folder() -> Path:
    return model_folder("cogvideox-2b") / "vae"


def pixels(frames: int, height: int = 16, width: int = 24, batch: int = 1) -> np.ndarray:
    return np.tanh(normal("pixels", frames, shape=(batch, 3, frames, height, width)))


def latents(frames: int, height: int = 2, width: int = 3, batch: int = 1) -> np.ndarray:
    return normal("vae latents", frames, shape=(batch, frames, VAE.latent_channels, height, width))


# --- LoRA -------------------------------------------------------------------------------------------------------------

LORAS = {
    "attention": {"targets": ("to_q", "to_k", "to_v", "to_out.0"), "use_rslora": False, "use_dora": False},
    "everywhere": {
        "targets": ("to_v", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm_out.linear", "text_proj", "proj_out"),
        "use_rslora": True,
        "use_dora": False,
    },
    "dora": {"targets": ("to_q", "to_out.0", "ff.net.0.proj"), "use_rslora": False, "use_dora": True},
}
LORA_VARIANT, LORA_RANK, LORA_ALPHA = "cogvideox-5b", 3, 6.0


def lora_file(case: str) -> LoraFile:
    """Return an adapter of which nothing is zero."""
    settings = LORAS[case]
    shapes = {n.removesuffix(".weight"): s for n, s in transformer_shapes(config_of(LORA_VARIANT)).items()}
    arrays = {}
    for name, shape in shapes.items():
        if len(shape) != 2 or not any(name == t or name.endswith(f".{t}") for t in settings["targets"]):
            continue
        outside, inside = shape
        arrays[f"{name}.lora_A.weight"] = normal("A", case, name, shape=(LORA_RANK, inside)) * np.float32(inside**-0.5)
        arrays[f"{name}.lora_B.weight"] = np.float32(0.2) * normal("B", case, name, shape=(outside, LORA_RANK))
        if settings["use_dora"]:
            arrays[f"{name}.lora_magnitude_vector"] = 1 + np.float32(0.1) * normal("m", name, shape=(outside,))
    return LoraFile(
        source=case, arrays=arrays, rank=LORA_RANK, alpha=LORA_ALPHA, use_rslora=settings["use_rslora"],
        use_dora=settings["use_dora"], target_modules=settings["targets"],
    )  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------

TASKS = {"t2v": "cogvideox-2b", "i2v": "cogvideox1.5-5b-i2v"}
TRAININGS = {f"{task} {method}": variant for task, variant in TASKS.items() for method in ("lora", "full")}
NUM_STEPS, NUM_MICROS = 10, 2
OPTIMIZER = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
MAX_GRAD_NORM = {"lora": 0.015, "full": 0.75}
"""So that some steps are clipped and some not."""
SCALES = {"video": 0.7, "image": 1 / 0.7}


def learning_rate(step: int) -> float:
    return 2e-3 * min(step / 4, 1.0)


def batch_of(variant: str, step: int, micro: int) -> dict[str, np.ndarray]:
    """Return a batch of two samples as the loader gives it: moments in bfloat16, draws in float32."""
    config, place = config_of(variant), (step, micro)
    size = (16, 8, 12)
    padded = 4 if config.patch_size_t else 3
    shape = (2, 3, *size)

    def drawn(name: str, shape: tuple[int, ...], dtype: type = np.float32) -> np.ndarray:
        return normal(name, *place, shape=shape).astype(dtype)

    batch = {
        "mean": drawn("mean", shape, ml_dtypes.bfloat16),
        "logvar": (drawn("logvar", shape) - 4).astype(ml_dtypes.bfloat16),
        "posterior_noise": drawn("posterior", shape),
        "noise": drawn("noise", (2, padded, *size)),
        "prompt_embeds": drawn("text", (2, 16, config.text_embed_dim), ml_dtypes.bfloat16),
        "timesteps": draws.generator(0, "golden timesteps", *place).integers(0, 1000, 2),
    }
    if config.is_image_to_video:
        image = (2, 1, *size)
        batch |= {
            "image_mean": drawn("image", image, ml_dtypes.bfloat16),
            "image_logvar": (drawn("image logvar", image) - 4).astype(ml_dtypes.bfloat16),
            "image_posterior_noise": drawn("image posterior", image),
            "image_keep": np.array([True, step % 2 == 0]),
        }
    return batch


def trained_tolerances(case: str, count: int) -> list[float]:
    """Return by how much each of `count` trained weights may differ, in the order of names, in parts of its largest.

    The bias of k's norm adds the same to every score of a query, so nothing depends on it where nothing turns k, and
    hardly anything in channels that turn slowly: its gradient is rounding, and AdamW makes whole steps of that.
    """
    if case.endswith("lora"):
        return [1e-4] * count
    names = sorted(transformer_shapes(config_of(TRAININGS[case])))
    return [1e-3 if name.endswith("norm_k.bias") else 1e-4 for name in names]


# --- denoising --------------------------------------------------------------------------------------------------------

DENOISING = {f"{task} {sampler}": variant for task, variant in TASKS.items() for sampler in ("ddim", "dpm")}
NUM_DENOISING_STEPS = 10


class Watched:
    """A sampler's table that remembers where every step led."""

    def __init__(self, table: SamplerTable) -> None:
        self.timesteps, self.uses_noise, self.samples = table.timesteps, table.uses_noise, []
        self._step = table.step

    def __len__(self) -> int:
        return len(self.timesteps)

    def step(self, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        sample, x0 = self._step(*args, **kwargs)
        self.samples.append(sample)
        return sample, x0


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """What a sampler is given: noise, both prompts, the image's latents where there are some, its table."""

    latents: np.ndarray
    prompt_embeds: np.ndarray
    negative_embeds: np.ndarray
    image_latents: np.ndarray | None
    table: Watched
    guidance: list[float]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the latents."""
        return self.latents.shape

    def noise(self, step: int) -> np.ndarray:
        """Return what a stochastic sampler draws in a step."""
        return normal("step noise", step, shape=self.shape)


def denoising_of(case: str) -> Denoising:
    """Return one of `DENOISING`; the second sampler's guidance grows from none."""
    variant, sampler = DENOISING[case], case.split()[1]
    config = config_of(variant)
    frames = 3 if config.patch_size_t is None else 4
    shape, text = (1, frames, 16, 8, 12), (1, 16, config.text_embed_dim)
    image = None
    if config.is_image_to_video:
        image = np.zeros(shape, np.float32)
        image[:, :1] = normal("first frame", shape=(1, 1, 16, 8, 12))
    return Denoising(
        latents=normal("start", shape=shape), prompt_embeds=normal("wanted", shape=text),
        negative_embeds=normal("unwanted", shape=text), image_latents=image,
        table=Watched(sampler_table(sampler, PUBLISHED[variant].scheduler, NUM_DENOISING_STEPS)),
        guidance=guidance_scales(6.0, NUM_DENOISING_STEPS, dynamic=sampler == "dpm"),
    )  # fmt: skip
