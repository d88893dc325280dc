"""Clips and captions to what the transformer is trained on: VAE moments and text embeddings.

`prepare` writes the result to a cache; training without a cache makes it on the way. Both go through here, so they
cannot differ.

B batch, F frames, H W pixels, C latent channels, S text tokens, E text channels.
"""

import torch
from torch import Tensor

from cogvideox_factory.torch_engine.device import pin
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE, pixels_from_uint8

_MEMO_BYTES = 2 * 2**30
_CAPTIONS_AT_ONCE = 8
_RAW = ("pixels", "captions", "image_pixels", "image_pixel_noise", "image_noise_sigma")


class Encoder:
    """The frozen VAE and text encoder; where the VAE has a group, its processes must come with the same clips."""

    def __init__(self, vae: CogVideoXVAE, text_encoder: TextEncoder | None, *, max_sequence_length: int) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.max_sequence_length = max_sequence_length
        self._memo: dict[str, Tensor] = {}

    @torch.no_grad()
    def video(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, F', C, H/8, W/8] of uint8 `pixels` [B, F, H, W, 3]."""
        return self.vae.encode(pixels_from_uint8(pixels).to(self._dtype))

    @torch.no_grad()
    def image(self, pixels: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, 1, C, H/8, W/8] of first frames, uint8 `pixels` [B, H, W, 3].

        `sigma` [B] times `noise` [B, H, W, 3] is added to pixels in [-1, 1] first, as the models were trained.
        """
        clean = pixels_from_uint8(pixels[:, None]).float()  # [B, 3, 1, H, W]
        noise = noise.permute(0, 3, 1, 2)[:, :, None]  # [B, 3, 1, H, W]
        noisy = clean + sigma.float()[:, None, None, None, None] * noise.float()
        return self.vae.encode(noisy.to(self._dtype))

    @torch.no_grad()
    def captions(self, captions: list[str]) -> Tensor:
        """Return embeddings [B, S, E] on the VAE's device."""
        missing = [text for text in dict.fromkeys(captions) if text not in self._memo]
        fresh = {}
        if missing:
            assert self.text_encoder is not None
            fresh = dict(zip(missing, self.text_encoder.encode(missing, self.max_sequence_length), strict=True))
        device = next(self.vae.parameters()).device
        found = (self._memo[text] if text in self._memo else fresh[text] for text in captions)
        return torch.stack([embeds.to(device, non_blocking=True) for embeds in found])

    def remember(self, captions: list[str]) -> None:
        """Encode all `captions` now and let the text encoder go, if their embeddings take at most 2 GiB of memory."""
        assert self.text_encoder is not None
        width, size = self.text_encoder.width, torch.finfo(self.text_encoder.dtype).bits // 8
        if len(captions) * self.max_sequence_length * width * size > _MEMO_BYTES:
            return
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            chunk = captions[start : start + _CAPTIONS_AT_ONCE]
            embeds = self.text_encoder.encode(chunk, self.max_sequence_length)
            self._memo |= {text: pin(e.cpu()) for text, e in zip(chunk, embeds, strict=True)}
        self.text_encoder = None

    def batch(self, raw: dict) -> dict:
        """Return a batch of raw clips with moments and embeddings in place of pixels and captions."""
        done = {key: value for key, value in raw.items() if key not in _RAW}
        done["mean"], done["logvar"] = self.video(raw["pixels"])
        done["prompt_embeds"] = self.captions(raw["captions"])
        if "image_pixel_noise" in raw:
            done["image_mean"], done["image_logvar"] = self.image(
                raw["image_pixels"] if "image_pixels" in raw else raw["pixels"][:, 0],
                raw["image_noise_sigma"],
                raw["image_pixel_noise"],
            )
        return done

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.vae.parameters()).dtype
