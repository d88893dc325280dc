"""The training objective: a batch of the ground becomes one loss a sample.

B batch, F latent frames, C latent channels, H W latent height and width.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512) with plain MSE on v in float32. The originals weight the error
of the implied clean sample by 1/(1 - alpha_bar); the two are the same number, but theirs loses it in bfloat16.

What has no gradient is done first, op by op (`arguments`: noise, condition, positions, checks); `losses` is the rest,
which compiles, one graph a shape.
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
        model_input, target = self.noised(batch)
        config, text_length = self.transformer.config, batch["prompt_embeds"].shape[1]
        _, frames, _, height, width = model_input.shape
        positions = self.transformer.positions(
            latent_frames=frames, latent_height=height, latent_width=width, text_length=text_length, dtype=self.dtype
        )
        tokens = positions.text_length, positions.num_video_tokens
        check_transformer_input(config, model_input.shape, text_length=text_length, tokens=tokens)
        ofs = to_tensor(np.full(1, OFS, np.float32), self.dtype) if config.ofs_embed_dim else None
        return (
            target, model_input.astype(self.dtype), batch["prompt_embeds"].astype(self.dtype), batch["timesteps"],
            positions.cos, positions.sin, positions.added, ofs,
        )  # fmt: skip

    def noised(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return what the transformer sees, [B, P + F, C, H, W] with P slots of padding, and v [B, F, C, H, W]."""
        clean = sample_posterior(batch["mean"], batch["logvar"], batch["posterior_noise"]).astype(ms.float32)
        clean, noise = clean * self.scales.video, batch["noise"].astype(ms.float32)
        num_padding = noise.shape[1] - clean.shape[1]
        if num_padding:
            clean = ops.concat([clean[:, :1]] * num_padding + [clean], axis=1)
        a, b = (
            ops.gather(table, batch["timesteps"], 0).reshape(-1, 1, 1, 1, 1)
            for table in (self.sqrt_alpha, self.sqrt_one_minus_alpha)
        )
        model_input = add_noise(clean, noise, a, b)
        if "image_mean" in batch:
            image = self.image_condition(batch, model_input.shape[1])
            model_input = ops.concat((model_input, image), axis=2)
        # A padded slot exists only to fill a temporal patch; sampling throws it away, so it carries no loss.
        return model_input, v_target(clean, noise, a, b)[:, num_padding:]

    def image_condition(self, batch: Mapping[str, Tensor], num_frames: int) -> Tensor:
        """Return the image latents as the sampling pipeline feeds them: frame 0, then zeros, [B, F, C, H, W]."""
        image = sample_posterior(batch["image_mean"], batch["image_logvar"], batch["image_posterior_noise"])
        keep = batch["image_keep"].astype(ms.float32).reshape(-1, 1, 1, 1, 1)
        return pad_image_latents(image.astype(ms.float32) * self.scales.image * keep, num_frames)

    def losses(
        self,
        target: Tensor,
        model_input: Tensor,
        prompt_embeds: Tensor,
        timesteps: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        added: Tensor | None,
        ofs: Tensor | None,
    ) -> Tensor:
        """Return the loss of each sample, float32 [B]: the part that has a gradient."""
        prediction = self.transformer(model_input, prompt_embeds, timesteps, cos, sin, added, ofs)
        error = prediction[:, -target.shape[1] :].astype(ms.float32) - target
        return error.square().mean(axis=(1, 2, 3, 4))


def pad_image_latents(image_latents: Tensor, num_frames: int) -> Tensor:
    """Put `image_latents` [B, 1, C, H, W] at frame 0 of `num_frames` frames of zeros."""
    if num_frames == 1:
        return image_latents
    batch, _, channels, height, width = image_latents.shape
    zeros = ops.zeros((batch, num_frames - 1, channels, height, width), image_latents.dtype)
    return ops.concat((image_latents, zeros), axis=1)
