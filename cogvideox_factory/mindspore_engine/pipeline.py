"""Text (and an image, or a video) to video in one object, which `generate` runs on.

```python
pipe = CogVideoXPipeline.from_folders(folder, folder / "transformer", machine=machine)
pipe.load_lora_weights("runs/mine", "mine")
frames = pipe(prompt_embeds, negative_embeds, num_frames=49, height=480, width=720)
```
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import numpy as np
from mindspore import Tensor, ops

from cogvideox_factory import draws
from cogvideox_factory.diffusion.samplers import SamplerTable, guidance_scales, sampler_table
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.lora_files import load_lora, resolve_lora
from cogvideox_factory.mindspore_engine import lora
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.objective import OFS, pad_image_latents
from cogvideox_factory.mindspore_engine.sampling import denoise
from cogvideox_factory.mindspore_engine.start import Machine
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.vae import (
    CogVideoXVAE,
    pixels_from_uint8,
    sample_posterior,
    uint8_from_pixels,
)
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.network_input import check_transformer_input
from cogvideox_factory.shapes import ClipShape, clip_shape
from cogvideox_factory.videos import first_step


class CogVideoXPipeline:
    """A transformer and a VAE on one device; prompts come encoded."""

    def __init__(
        self, *, transformer: CogVideoXTransformer, vae: CogVideoXVAE, scheduler: SchedulerConfig, machine: Machine
    ) -> None:
        self.transformer, self.vae, self.scheduler, self.machine = transformer, vae, scheduler, machine

        def predict(*arguments):  # a graph can be made of this, not of a cell that changes
            return transformer(*arguments)

        self._compiled = machine.mode.compiled(predict, of=transformer)

    @classmethod
    def from_folders(
        cls, folder: Path, transformer_folder: Path, *, config: TransformerConfig, machine: Machine, tiling: bool = True
    ) -> Self:
        """Load a model folder in the diffusers layout with this transformer.

        Raises:
            MissingError, UnfitError: files that are missing, damaged or of another kind of model.
        """
        vae = CogVideoXVAE.from_folder(folder / "vae", dtype=machine.dtype, mode=machine.mode)
        if tiling:
            vae.enable_tiling()
        return cls(
            transformer=CogVideoXTransformer.from_folder(
                transformer_folder, config=config, dtype=machine.precision.weights, shards=machine.shards
            ),
            vae=vae,
            scheduler=SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json"),
            machine=machine,
        )

    def load_lora_weights(self, path: str | Path, adapter_name: str = "default") -> None:
        """Load a LoRA file, a folder that holds one, or a run folder; weight 1.0 is its trained strength.

        Raises:
            UnfitError: the file is damaged or was made for another model.
        """
        lora.load_lora_into(self.transformer, load_lora(resolve_lora(path)), adapter_name)

    def __call__(
        self,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        *,
        image: np.ndarray | None = None,
        video: np.ndarray | None = None,
        strength: float = 0.8,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        sampler: str = "auto",
        seed: int = 42,
        progress: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Make one video, uint8 [F, H, W, 3], of embeddings [1, S, E].

        `image` is uint8 [H, W, 3] of the video's size (image-to-video models only, and needed there). `video` is uint8
        [F, H, W, 3] of the size asked for, to be made anew (text-to-video models only): noised as far as `strength`
        says, of the steps that share is taken.

        Raises:
            FactoryError: a size or frame count the model cannot take, a missing or superfluous image or video.
            NonFiniteError: the latents are NaN or Inf, most often from float16 on a bfloat16 model.
        """
        shape = clip_shape(self.transformer.config, num_frames=num_frames, height=height, width=width)
        self._check_input(image, video)
        scales = guidance_scales(
            guidance_scale, num_inference_steps, dynamic=use_dynamic_cfg, interval=guidance_interval
        )
        table, start = self.sampler_table(sampler, num_inference_steps), 0
        noise = self._noise(shape, seed, "initial noise")
        if video is not None:
            start = first_step(num_inference_steps, strength)
            table, scales = table.tail(start), scales[start:]
            noise = table.noised(self.video_latents(video, shape, seed=seed), noise)
        latents = denoise(
            self._predict,
            noise,
            prompt_embeds.astype(self.machine.dtype),
            table=table,
            guidance=scales,
            negative_embeds=negative_embeds.astype(self.machine.dtype) if any(scale != 1 for scale in scales) else None,
            image_latents=None if image is None else self.image_latents(image, shape, seed=seed),
            step_noise=lambda step: self._noise(shape, seed, "sampler noise", start + step),
            progress=progress,
        )
        return self.decode(latents, shape)

    def sampler_table(self, sampler: str, num_inference_steps: int) -> SamplerTable:
        """Return the table of `ddim`, `dpm` or `auto` (ddim for 2B-style models, as their authors sample)."""
        if sampler == "auto":
            sampler = "dpm" if self.transformer.config.use_rotary_positional_embeddings else "ddim"
        return sampler_table(sampler, self.scheduler, num_inference_steps)

    def image_latents(self, image: np.ndarray, shape: ClipShape, *, seed: int) -> Tensor:
        """Return the condition [1, F, C, H, W]: the encoded image at frame 0, zeros after it."""
        latents = self._encoded(image[None], seed, "image posterior") * self.vae.config.image_scale
        return pad_image_latents(latents, shape.latent_frames + shape.num_front_padding)

    def video_latents(self, video: np.ndarray, shape: ClipShape, *, seed: int) -> Tensor:
        """Return a video's latents as the transformer sees them [1, F, C, H, W], front padding included."""
        latents = self._encoded(video, seed, "video posterior") * self.vae.config.scaling_factor
        return ops.concat([latents[:, :1]] * shape.num_front_padding + [latents], axis=1)

    def decode(self, latents: Tensor, shape: ClipShape) -> np.ndarray:
        """Return the frames uint8 [F, H, W, 3] of `latents` [1, F, C, H, W], front padding dropped."""
        if not np.isfinite(to_array(latents)).all():
            raise NonFiniteError(
                f"the latents are not finite ({self.machine.dtype_name}). float16 on a model published in bfloat16 "
                "does this: use --run.dtype bfloat16 (or float32)."
            )
        clean = latents[:, shape.num_front_padding :] / self.vae.config.scaling_factor
        return to_array(uint8_from_pixels(self.vae.decode(clean.astype(self.machine.dtype))))[0]

    def _predict(self, latents: Tensor, prompt_embeds: Tensor, timesteps: Tensor) -> Tensor:
        """Call the transformer with the positions and the `ofs` its shape asks for."""
        transformer, text_length = self.transformer, prompt_embeds.shape[1]
        _, frames, _, height, width = latents.shape
        positions = transformer.positions(
            latent_frames=frames, latent_height=height, latent_width=width, text_length=text_length,
            dtype=latents.dtype,
        )  # fmt: skip
        ofs = to_tensor(np.full(1, OFS, np.float32), latents.dtype) if transformer.config.ofs_embed_dim else None
        check_transformer_input(
            transformer.config, latents.shape, text_length=text_length,
            tokens=(positions.text_length, positions.num_video_tokens),
        )  # fmt: skip
        return self._compiled(
            latents, prompt_embeds, timesteps, positions.cos, positions.sin, positions.added, ofs
        )  # fmt: skip

    def _encoded(self, frames: np.ndarray, seed: int, purpose: str) -> Tensor:
        """Return unscaled latents [1, F, C, H, W], float32, of uint8 `frames` [F, H, W, 3]."""
        mean, logvar = self.vae.encode(pixels_from_uint8(to_tensor(frames)[None], self.machine.dtype))
        noise = draws.normal(seed, purpose, shape=tuple(mean.shape))
        return sample_posterior(mean, logvar, to_tensor(noise)).astype(to_tensor(noise).dtype)

    def _noise(self, shape: ClipShape, seed: int, purpose: str, *coordinates: int) -> Tensor:
        size = (
            1, shape.latent_frames + shape.num_front_padding, self.vae.config.latent_channels,
            shape.latent_height, shape.latent_width,
        )  # fmt: skip
        return to_tensor(draws.normal(seed, purpose, *coordinates, shape=size))

    def _check_input(self, image: np.ndarray | None, video: np.ndarray | None) -> None:
        is_i2v = self.transformer.config.is_image_to_video
        if (image is not None) != is_i2v:
            raise FactoryError(
                "this is an image-to-video model; give an image"
                if is_i2v
                else "this is a text-to-video model; it takes no image"
            )
        if video is not None and is_i2v:
            raise FactoryError("this is an image-to-video model; video-to-video takes a text-to-video model")
