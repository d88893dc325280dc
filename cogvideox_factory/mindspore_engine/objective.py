"""The training objective: a batch of the ground becomes one loss a sample.

B batch, F latent frames, C latent channels, H W latent height and width.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512) with plain MSE on v in float32. The originals weight the error
of the implied clean sample by 1/(1 - alpha_bar); the two are the same number, but theirs loses it in bfloat16.

A batch is first made a tuple of tensors (`arguments`, where its input is checked), then computed on (`losses`, which
compiles): one graph a shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from cogvideox_factory.diffusion.schedule import add_noise, v_target
from cogvideox_factory.mindspore_engine.border import to_tensor
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.vae import sample_posterior
from cogvideox_factory.network_input import check_transformer_input

OFS = 2.0  # the value the 1.5 image-to-video model was trained with; nobody feeds another
_LATENTS = ("mean", "logvar", "posterior_noise", "noise", "prompt_embeds", "timesteps")
_IMAGE = ("image_mean", "image_logvar", "image_posterior_noise", "image_keep")


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """What latents are multiplied by before the transformer sees them."""

    video: float
    image: float


class Objective:
    """Loss of a transformer on latents: noise, condition, predict, compare."""

    def __init__(
        self, transformer: CogVideoXTransformer, *, alphas_cumprod: np.ndarray, scales: Scales, dtype: Any
    ) -> None:
        self.transformer = transformer
        self.scales = scales
        self.dtype = dtype
        self.sqrt_alpha = to_tensor(np.sqrt(alphas_cumprod).astype(np.float32))
        self.sqrt_one_minus_alpha = to_tensor(np.sqrt(1 - alphas_cumprod).astype(np.float32))

    def __call__(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each sample, float32 [B].

        `batch` holds `mean`, `logvar` [B, F, C, H, W], `prompt_embeds` [B, S, E], `timesteps` [B] and the draws
        `posterior_noise` (like mean) and `noise` [B, F + front padding, C, H, W]; for image-to-video also
        `image_mean`, `image_logvar`, `image_posterior_noise` [B, 1, C, H, W] and `image_keep` [B].
        """
        return self.losses(*self.arguments(batch))

    def arguments(self, batch: Mapping[str, Tensor]) -> tuple[Tensor | None, ...]:
        """Return what `losses` takes, tensors or None, in its order.

        Raises:
            FactoryError: latents or a text length this model cannot take.
        """
        config, text_length = self.transformer.config, batch["prompt_embeds"].shape[1]
        rows, frames, channels, height, width = batch["noise"].shape
        channels += batch["image_mean"].shape[2] if "image_mean" in batch else 0
        positions = self.transformer.positions(
            latent_frames=frames, latent_height=height, latent_width=width, text_length=text_length, dtype=self.dtype
        )
        check_transformer_input(
            config, (rows, frames, channels, height, width), text_length=text_length,
            tokens=(positions.text_length, positions.num_video_tokens), has_ofs=config.ofs_embed_dim is not None,
        )  # fmt: skip
        timesteps = batch["timesteps"]
        a, b = (ops.gather(table, timesteps, 0) for table in (self.sqrt_alpha, self.sqrt_one_minus_alpha))
        ofs = to_tensor(np.full(1, OFS, np.float32), self.dtype) if config.ofs_embed_dim else None
        return (
            *(batch[name] for name in _LATENTS), *(batch.get(name) for name in _IMAGE),
            a.reshape(-1, 1, 1, 1, 1), b.reshape(-1, 1, 1, 1, 1), positions.cos, positions.sin, positions.added, ofs,
        )  # fmt: skip

    def losses(
        self,
        mean: Tensor,
        logvar: Tensor,
        posterior_noise: Tensor,
        noise: Tensor,
        prompt_embeds: Tensor,
        timesteps: Tensor,
        image_mean: Tensor | None,
        image_logvar: Tensor | None,
        image_posterior_noise: Tensor | None,
        image_keep: Tensor | None,
        a: Tensor,
        b: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        added: Tensor | None,
        ofs: Tensor | None,
    ) -> Tensor:
        """Return the loss of each sample, float32 [B]; `a` and `b` are its parts of signal and noise [B, 1, 1, 1, 1]."""
        clean = sample_posterior(mean, logvar, posterior_noise).astype(ms.float32) * self.scales.video
        noise = noise.astype(ms.float32)
        num_padding = noise.shape[1] - clean.shape[1]
        if num_padding > 0:
            clean = ops.concat([clean[:, :1]] * num_padding + [clean], axis=1)
        model_input = add_noise(clean, noise, a, b)
        if image_mean is not None:
            image = sample_posterior(image_mean, image_logvar, image_posterior_noise).astype(ms.float32)
            image = image * self.scales.image * image_keep.astype(ms.float32).reshape(-1, 1, 1, 1, 1)
            model_input = ops.concat((model_input, pad_image_latents(image, model_input.shape[1])), axis=2)
        prediction = self.transformer(
            model_input.astype(self.dtype), prompt_embeds.astype(self.dtype), timesteps, cos, sin, added, ofs
        )
        # The padded slot exists only to fill a temporal patch; sampling throws it away, so it carries no loss.
        error = prediction.astype(ms.float32) - v_target(clean, noise, a, b)
        return error[:, num_padding:].square().mean(axis=(1, 2, 3, 4))


def pad_image_latents(image_latents: Tensor, num_frames: int) -> Tensor:
    """Put `image_latents` [B, 1, C, H, W], as the sampling pipeline feeds them, at frame 0 of `num_frames` frames.

    The others are zeros: [B, F, C, H, W].
    """
    if num_frames == 1:
        return image_latents
    batch, _, channels, height, width = image_latents.shape
    zeros = ops.zeros((batch, num_frames - 1, channels, height, width), image_latents.dtype)
    return ops.concat((image_latents, zeros), axis=1)
