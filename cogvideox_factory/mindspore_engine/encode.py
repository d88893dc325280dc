"""Clips and captions to what the transformer is trained on: VAE moments and text embeddings.

`prepare` writes the result to a cache; training without a cache makes it on the way. Both go through here, so they
cannot differ.

B batch, F frames, H W pixels, C latent channels, S text tokens, E text channels.
"""

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops

from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE, pixels_from_uint8

_MEMO_BYTES = 2 * 2**30
_RAW = ("pixels", "captions", "image_pixels", "image_pixel_noise", "image_noise_sigma")


class Encoder:
    """The frozen VAE and text encoder."""

    def __init__(self, vae: CogVideoXVAE, text_encoder: TextEncoder | None, *, max_sequence_length: int) -> None:
        self.vae = vae
        self.text_encoder = text_encoder
        self.max_sequence_length = max_sequence_length
        self._memo: dict[str, Tensor] = {}

    def video(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, F', C, H/8, W/8] of uint8 `pixels` [B, F, H, W, 3]."""
        return self.vae.encode(pixels_from_uint8(pixels))

    def image(self, pixels: Tensor, sigma: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, 1, C, H/8, W/8] of first frames, uint8 `pixels` [B, H, W, 3].

        `sigma` [B] times `noise` [B, H, W, 3] is added to pixels in [-1, 1] first, as the models were trained.
        """
        clean = pixels_from_uint8(pixels[:, None])  # [B, 3, 1, H, W]
        noise = noise.transpose(0, 3, 1, 2)[:, :, None]  # [B, 3, 1, H, W]
        return self.vae.encode(clean + sigma.astype(ms.float32).reshape(-1, 1, 1, 1, 1) * noise.astype(ms.float32))

    def captions(self, captions: list[str]) -> Tensor:
        """Return embeddings [B, S, E]."""
        fresh = {text: self._encoded(text) for text in dict.fromkeys(captions) if text not in self._memo}
        return ops.stack([self._memo[text] if text in self._memo else fresh[text] for text in captions])

    def remember(self, captions: list[str]) -> None:
        """Encode all `captions` now and let the text encoder go, if their embeddings take at most 2 GiB of memory."""
        assert self.text_encoder is not None
        a_caption = self.max_sequence_length * self.text_encoder.width * (4 if self._is_float32 else 2)
        if len(captions) * a_caption > _MEMO_BYTES:
            return
        self._memo |= {text: self._encoded(text) for text in captions}
        self.text_encoder = None

    def batch(self, raw: dict[str, Any]) -> dict[str, Any]:
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

    def _encoded(self, caption: str) -> Tensor:
        """Return the embedding of one caption [S, E]: one graph serves all, whatever a batch has."""
        assert self.text_encoder is not None
        return self.text_encoder.encode([caption], self.max_sequence_length)[0]

    @property
    def _is_float32(self) -> bool:
        return self.text_encoder is not None and self.text_encoder.dtype == ms.float32
