"""The training objective: a batch of the ground becomes one loss a sample.

B batch, F latent frames, C latent channels, H W latent height and width.

v-prediction (Salimans & Ho 2022, arXiv 2202.00512) with plain MSE on v in float32. The originals weight the error
of the implied clean sample by 1/(1 - alpha_bar); the two are the same number, but theirs loses it in bfloat16.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cogvideox_factory.diffusion.schedule import add_noise, v_target
from cogvideox_factory.torch_engine.reuse import Shortcut
from cogvideox_factory.torch_engine.time_embedding import Instant
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import sample_posterior

OFS = 2.0  # the value the 1.5 image-to-video model was trained with; nobody feeds another


@dataclass(frozen=True, kw_only=True, slots=True)
class Scales:
    """What latents are multiplied by before the transformer sees them."""

    video: float
    image: float


class Objective:
    """Loss of a transformer on latents: noise, condition, predict, compare."""

    def __init__(
        self,
        transformer: CogVideoXTransformer,
        *,
        alphas_cumprod: np.ndarray,
        scales: Scales,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.transformer = transformer
        self.scales = scales
        self.device = device
        self.dtype = dtype
        self.sqrt_alpha = torch.from_numpy(np.sqrt(alphas_cumprod)).to(device, torch.float32)
        self.sqrt_one_minus_alpha = torch.from_numpy(np.sqrt(1 - alphas_cumprod)).to(device, torch.float32)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the loss of each sample, float32 [B].

        `batch` holds `mean`, `logvar` [B, F, C, H, W], `prompt_embeds` [B, S, E], `timesteps` [B] and the draws
        `posterior_noise` (like mean) and `noise` [B, F + front padding, C, H, W]; for image-to-video also
        `image_mean`, `image_logvar`, `image_posterior_noise` [B, 1, C, H, W] and `image_keep` [B].
        """
        clean = sample_posterior(batch["mean"], batch["logvar"], batch["posterior_noise"]).float()
        clean = clean * self.scales.video
        noise = batch["noise"].float()
        num_padding = noise.shape[1] - clean.shape[1]
        if num_padding:
            clean = torch.cat([clean[:, :1].expand(-1, num_padding, -1, -1, -1), clean], dim=1)
        timesteps = batch["timesteps"]
        a = self.sqrt_alpha[timesteps][:, None, None, None, None]
        b = self.sqrt_one_minus_alpha[timesteps][:, None, None, None, None]
        model_input = add_noise(clean, noise, a, b)
        if "image_mean" in batch:
            model_input = torch.cat([model_input, self.image_condition(batch, model_input.shape[1])], dim=2)
        prediction = self.predict(model_input, batch["prompt_embeds"], timesteps)
        # The padded slot exists only to fill a temporal patch; sampling throws it away, so it carries no loss.
        error = prediction.float() - v_target(clean, noise, a, b)
        return error[:, num_padding:].square().mean(dim=(1, 2, 3, 4))

    def image_condition(self, batch: dict[str, Tensor], num_frames: int) -> Tensor:
        """Return the image latents as the sampling pipeline feeds them: frame 0, then zeros, [B, F, C, H, W]."""
        image = sample_posterior(batch["image_mean"], batch["image_logvar"], batch["image_posterior_noise"]).float()
        image = image * self.scales.image * batch["image_keep"].to(image.dtype)[:, None, None, None, None]
        return pad_image_latents(image, num_frames)

    def predict(self, model_input: Tensor, prompt_embeds: Tensor, timesteps: Tensor) -> Tensor:
        """Return the transformer's v prediction [B, F, C, H, W]."""
        return predict_v(
            self.transformer,
            model_input.to(self.dtype),
            prompt_embeds.to(self.dtype),
            timesteps,
        )


def pad_image_latents(image_latents: Tensor, num_frames: int) -> Tensor:
    """Put `image_latents` [B, 1, C, H, W] at frame 0 of `num_frames` frames of zeros."""
    zeros = image_latents.new_zeros(())
    shape = list(image_latents.shape)
    shape[1] = num_frames - 1
    return torch.cat([image_latents, zeros.expand(shape)], dim=1)  # [B, F, C, H, W]


def predict_v(
    transformer: CogVideoXTransformer,
    latents: Tensor,
    prompt_embeds: Tensor,
    timesteps: Tensor | Instant,
    *,
    shortcut: Shortcut | None = None,
) -> Tensor:
    """Call the transformer with the positions and the `ofs` its shape asks for."""
    positions = transformer.positions(
        latent_frames=latents.shape[1],
        latent_height=latents.shape[3],
        latent_width=latents.shape[4],
        text_length=prompt_embeds.shape[1],
        device=latents.device,
        dtype=latents.dtype,
    )
    ofs = make_ofs(transformer, latents.device, latents.dtype)
    return transformer(latents, prompt_embeds, timesteps, positions=positions, ofs=ofs, shortcut=shortcut)


def make_ofs(transformer: CogVideoXTransformer, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Return the `ofs` [1] of a model that takes one."""
    return torch.full((1,), OFS, device=device, dtype=dtype) if transformer.config.ofs_embed_dim else None
