"""Text (and an image) to video in one object: the Python API, and what `generate` and validation run on.

```python
from cogvideox_factory import CogVideoXPipeline, export_to_video

pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b")
pipe.load_lora_weights("runs/mine", adapter_name="mine")
pipe.set_adapters(["mine"], [1.0])
video = pipe("a red fox in the snow")[0][0]
export_to_video(video, "fox.mp4", fps=8)
```
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory import draws, weights
from cogvideox_factory.data.image import read_image
from cogvideox_factory.diffusion.samplers import SamplerTable, guidance_scales, sampler_table
from cogvideox_factory.entries import report_cut_captions
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.lora_files import load_lora, resolve_lora
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.shapes import ClipShape, clip_shape
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.device import pick_device, pick_dtype, pin
from cogvideox_factory.torch_engine.objective import pad_image_latents
from cogvideox_factory.torch_engine.ranks import Ranks, leads_machine
from cogvideox_factory.torch_engine.reuse import Reuse
from cogvideox_factory.torch_engine.sampling import denoise
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import (
    CogVideoXVAE,
    pixels_from_uint8,
    sample_posterior,
    uint8_from_pixels,
)
from cogvideox_factory.videos import first_step


class Videos(NamedTuple):
    """Result of a pipeline call; `[0][0]` is the first video, as in diffusers."""

    frames: list[np.ndarray]
    """One uint8 array [F, H, W, 3] a video."""


class CogVideoXPipeline:
    """A transformer, a VAE and (until it is dropped) a text encoder on one device."""

    def __init__(
        self,
        *,
        transformer: CogVideoXTransformer,
        vae: CogVideoXVAE,
        text_encoder: TextEncoder | None,
        scheduler: SchedulerConfig,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.transformer = transformer
        self.vae = vae
        self.text_encoder = text_encoder
        self.scheduler = scheduler
        self.device = device
        self.dtype = dtype
        self.halves: dist.ProcessGroup | None = None
        """Two processes that divide guidance, see `share`."""
        self.meeting: dist.ProcessGroup | None = None
        """Processes that meet inside the transformer, and so run the same blocks."""
        self.num_reused = 0
        """Steps of the last call's videos that a shortcut was taken in (`reuse`)."""

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        transformer: str | Path | None = None,
        transformer_config: TransformerConfig | None = None,
        dtype: str = "auto",
        device: str = "auto",
        tiling: bool = True,
        text_encoder: bool = True,
    ) -> Self:
        """Load a model folder in the diffusers layout, or a hub id; `transformer` replaces its transformer.

        `transformer_config` is for weights whose folder has none.

        Without the text encoder (9.5 GB of the published models) calls need `prompt_embeds`.

        Raises:
            MissingError: no such model here, and the hub cannot be reached.
            UnfitError: files that are damaged or of another kind of model.
        """
        place = pick_device(device)
        folder = weights.resolve_model(str(model), revision=revision)
        transformer_folder = folder / "transformer"
        if transformer:
            transformer_folder = weights.resolve_transformer(transformer, has_config=transformer_config is None)
        config = transformer_config or TransformerConfig.from_folder(transformer_folder)
        arithmetic = pick_dtype(dtype, place, config)
        vae = CogVideoXVAE.from_folder(folder / "vae", dtype=arithmetic, device=place)
        if tiling:
            vae.enable_tiling()
        return cls(
            transformer=CogVideoXTransformer.from_folder(
                transformer_folder, config=config, dtype=arithmetic, device=place, verify=leads_machine()
            ),
            vae=vae,
            text_encoder=TextEncoder.from_folder(folder, dtype=arithmetic, device=place) if text_encoder else None,
            scheduler=SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json"),
            device=place,
            dtype=arithmetic,
        )

    def share(self, ranks: Ranks) -> None:
        """Make videos together with other processes, all of which are then called alike.

        Tokens, guidance and the VAE's work are divided among the processes of a video; the weights are as they were
        loaded (`loading`). The numbers are those of one process, up to rounding.
        """
        self.transformer.sequence = ranks.sequence
        self.halves = ranks.guidance
        self.meeting = dist.group.WORLD if ranks.layout.zero == 3 else ranks.video
        self.vae.group = ranks.video

    def load_lora_weights(self, path: str | Path, adapter_name: str | Sequence[str] = "default") -> None:
        """Load a LoRA file, a folder that holds one, or a run folder; weight 1.0 is its trained strength.

        Raises:
            UnfitError: the file is damaged or was made for another model.
        """
        name = adapter_name if isinstance(adapter_name, str) else adapter_name[0]
        lora.load_lora_into(self.transformer, load_lora(resolve_lora(path)), name)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Use these adapters with these weights (1.0 each by default); others are switched off."""
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        lora.set_adapters(self.transformer, names, adapter_weights)

    def fuse_lora(self) -> None:
        """Fold the adapters that are on, with their weights, into the model: faster, and they cannot be changed again.

        Raises:
            FactoryError: weights of few bits, which cannot take them in.
        """
        lora.merge_lora(self.transformer)

    def encode_prompts(self, prompts: Sequence[str], *, max_sequence_length: int | None = None) -> Tensor:
        """Return prompt embeddings [B, S, E]; needs the text encoder."""
        if self.text_encoder is None:
            raise FactoryError("the text encoder was dropped; pass prompt_embeds, or load the pipeline again")
        length = max_sequence_length or self.transformer.config.max_text_seq_length
        report_cut_captions(self.text_encoder.truncated_tokens, list(prompts), length, strict=False, called="prompts")
        # One by one: the last bits of a batch depend on its size, and a video must not depend on the others.
        embeds = [self.text_encoder.encode([prompt], length) for prompt in prompts]
        return torch.cat(embeds).to(self.device, self.dtype)

    @torch.inference_mode()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        image: str | Path | np.ndarray | None = None,
        *,
        video: np.ndarray | None = None,
        strength: float = 0.8,
        negative_prompt: str = "",
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float = 6.0,
        use_dynamic_cfg: bool = False,
        guidance_interval: Sequence[float] = (0.0, 1.0),
        reuse: Reuse | None = None,
        sampler: str = "auto",
        seed: int = 42,
        max_sequence_length: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Videos:
        """Make one video a prompt; all start from the noise of `seed`.

        `image` is a path or uint8 [H, W, 3] of the video's size (image-to-video models only, and needed there).
        `video` is uint8 [F, H, W, 3] of the size asked for, to be made anew (text-to-video models only): noised as far
        as `strength` says, of the steps that share is taken. `guidance_interval` and `reuse` make it faster and another
        video, see `guidance_scales` and `Reuse`.

        Raises:
            FactoryError: a size or frame count the model cannot take, a missing or superfluous image or video.
            NonFiniteError: the latents are NaN or Inf, most often from float16 on a bfloat16 model.
        """
        shape = clip_shape(self.transformer.config, num_frames=num_frames, height=height, width=width)
        self._check_image(image is not None)
        if prompt_embeds is None:
            prompts = [prompt] if isinstance(prompt, str) else list(prompt or [])
            if not prompts:
                raise FactoryError("give a prompt (or prompt_embeds)")
            prompt_embeds = self.encode_prompts(prompts, max_sequence_length=max_sequence_length)
        scales = guidance_scales(
            guidance_scale, num_inference_steps, dynamic=use_dynamic_cfg, interval=guidance_interval
        )
        negative = None
        if max(scales) > 1:
            negative = negative_prompt_embeds
            if negative is None:
                negative = self.encode_prompts([negative_prompt], max_sequence_length=prompt_embeds.shape[1])
        for embeds in (prompt_embeds, *([] if negative is None else [negative])):
            self._check_embeds(tuple(embeds.shape))
        table = self.sampler_table(sampler, num_inference_steps)
        start = 0
        if video is not None:
            start = first_step(num_inference_steps, strength)
            table, scales = table.tail(start), scales[start:]
        source = self.video_latents(video, shape, seed=seed) if video is not None else None
        image_latents = self.image_latents(image, shape, seed=seed) if image is not None else None
        frames, self.num_reused = [], 0
        for index in range(len(prompt_embeds)):
            noise = self._noise(shape, seed, "initial noise")
            latents = denoise(
                self.transformer,
                noise if source is None else table.noised(source, noise),
                prompt_embeds[index : index + 1],
                table=table,
                guidance=scales,
                negative_embeds=negative,
                image_latents=image_latents,
                step_noise=lambda step: self._noise(shape, seed, "sampler noise", start + step),
                progress=progress,
                halves=self.halves,
                reuse=replace(reuse, group=self.meeting) if reuse else None,
                told=self._count_reused,
            )
            frames.append(self.decode(latents, shape))
        return Videos(frames)

    def _count_reused(self, number: int) -> None:
        self.num_reused += number

    def sampler_table(self, sampler: str, num_inference_steps: int) -> SamplerTable:
        """Return the table of `ddim`, `dpm` or `auto` (ddim for 2B-style models, as their authors sample)."""
        if sampler == "auto":
            sampler = "dpm" if self.transformer.config.use_rotary_positional_embeddings else "ddim"
        return sampler_table(sampler, self.scheduler, num_inference_steps)

    def image_latents(self, image: str | Path | np.ndarray, shape: ClipShape, *, seed: int) -> Tensor:
        """Return the condition [1, F, C, H, W]: the encoded image at frame 0, zeros after it."""
        pixels = image if isinstance(image, np.ndarray) else read_image(Path(image), shape.height, shape.width)
        if pixels.shape != (shape.height, shape.width, 3) or pixels.dtype != np.uint8:
            raise FactoryError(
                f"image has shape {pixels.shape} and dtype {pixels.dtype}; it must be uint8 "
                f"({shape.height}, {shape.width}, 3), the size of the video. A path is resized for you."
            )
        video = pixels_from_uint8(torch.from_numpy(pixels.copy())[None, None].to(self.device))  # [1, 3, 1, H, W]
        mean, logvar = self.vae.encode(video.to(self.dtype))
        noise = draws.normal(seed, "image posterior", shape=tuple(mean.shape))
        latents = sample_posterior(mean, logvar, torch.from_numpy(noise).to(self.device))
        latents = latents.float() * self.vae.config.image_scale
        return pad_image_latents(latents, shape.latent_frames + shape.num_front_padding)

    def video_latents(self, video: np.ndarray, shape: ClipShape, *, seed: int) -> Tensor:
        """Return a video's latents as the transformer sees them [1, F, C, H, W], front padding included."""
        if self.transformer.config.is_image_to_video:
            raise FactoryError("this is an image-to-video model; video-to-video takes a text-to-video model")
        wanted = (shape.num_frames, shape.height, shape.width, 3)
        if video.shape != wanted or video.dtype != np.uint8:
            raise FactoryError(f"video has shape {video.shape} and dtype {video.dtype}; it must be uint8 {wanted}.")
        pixels = pixels_from_uint8(torch.from_numpy(video)[None].to(self.device))  # [1, 3, F, H, W]
        mean, logvar = self.vae.encode(pixels.to(self.dtype))
        noise = draws.normal(seed, "video posterior", shape=tuple(mean.shape))
        latents = sample_posterior(mean, logvar, torch.from_numpy(noise).to(self.device)).float()
        latents = latents * self.vae.config.scaling_factor
        padding = latents[:, :1].expand(-1, shape.num_front_padding, -1, -1, -1)
        return torch.cat([padding, latents], dim=1)

    def decode(self, latents: Tensor, shape: ClipShape) -> np.ndarray:
        """Return the frames uint8 [F, H, W, 3] of `latents` [1, F, C, H, W], front padding dropped."""
        if not torch.isfinite(latents).all():
            raise NonFiniteError(
                f"the latents are not finite ({self.dtype}). float16 on a model published in bfloat16 does this: "
                "use --run.dtype bfloat16 (or float32)."
            )
        clean = latents[:, shape.num_front_padding :] / self.vae.config.scaling_factor
        return uint8_from_pixels(self.vae.decode(clean.to(self.dtype)))[0].cpu().numpy()

    def _noise(self, shape: ClipShape, seed: int, purpose: str, *coordinates: int) -> Tensor:
        size = (
            1, shape.latent_frames + shape.num_front_padding, self.vae.config.latent_channels,
            shape.latent_height, shape.latent_width,
        )  # fmt: skip
        drawn = torch.from_numpy(draws.normal(seed, purpose, *coordinates, shape=size))
        return pin(drawn).to(self.device, non_blocking=True)  # from other memory the host would wait for the device

    def _check_embeds(self, shape: tuple[int, ...]) -> None:
        width = self.transformer.config.text_embed_dim
        if len(shape) != 3 or shape[2] != width:
            raise FactoryError(
                f"prompt embeddings of shape {list(shape)} are not this model's: [prompts, tokens, {width}]."
            )

    def _check_image(self, given: bool) -> None:
        if given != self.transformer.config.is_image_to_video:
            raise FactoryError(
                "this is a text-to-video model; it takes no image"
                if given
                else "this is an image-to-video model; give an image (image=path)"
            )
