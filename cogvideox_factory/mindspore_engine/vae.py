"""The 3-D causal VAE of the CogVideoX family: 8x8 pixels (and 4 frames) become one latent (arXiv 2408.06072, 2.1).

```python
vae = CogVideoXVAE.from_folder("CogVideoX-2b/vae", mode=Mode(graph=True))
mean, logvar = vae.encode(pixels_from_uint8(frames))      # unscaled, as the cache keeps them
frames = uint8_from_pixels(vae.decode(mean))
```

Unusual: a video is coded in frame batches of 8 frames (2 latents), the remainder joined to the first, and group norm
sees one batch at a time. So the batch size is part of the numbers; it is the one the weights were trained with. In
graph mode a shape costs two graphs a direction: one for the first frame batch, one for all that follow.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from cogvideox_factory import weights
from cogvideox_factory.diffusion.coding import Coding
from cogvideox_factory.diffusion.frames import frame_batches
from cogvideox_factory.mindspore_engine.border import load_parameters, to_array
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.linear import weights_in
from cogvideox_factory.mindspore_engine.vae_blocks import Decoder, Encoder
from cogvideox_factory.mindspore_engine.vae_layers import PointwiseConv, Tails
from cogvideox_factory.mindspore_engine.vae_tiling import run_tiled
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.network_input import check_latents, check_pixels, check_vae_config

# Legend: B batch, F frames or latent frames, C latent channels, H W pixel height and width, h w latent ones.

Coder = Callable[[Tensor, Tails], tuple[Tensor, Tails]]


class CogVideoXVAE(Coding, nn.Cell):
    """Frozen encoder and decoder with the options of a run: tiling, slicing, frame batches."""

    def __init__(self, config: VaeConfig, *, mode: Mode = PYNATIVE) -> None:
        super().__init__()
        check_vae_config(config)
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latent = config.latent_channels
        self.quant_conv = PointwiseConv(2 * latent, 2 * latent) if config.use_quant_conv else None
        self.post_quant_conv = PointwiseConv(latent, latent) if config.use_post_quant_conv else None
        self._encode_batch = mode.compiled(self._encoded)
        self._decode_batch = mode.compiled(self._decoded)
        for parameter in self.get_parameters():
            parameter.requires_grad = False

    @classmethod
    def from_folder(cls, folder: Path | str, *, dtype: Any = ms.float32, mode: Mode = PYNATIVE) -> Self:
        """Load a `vae/` folder in the diffusers layout, frozen.

        Raises:
            MissingError: no weights there.
            UnfitError: another model's weights, or damaged ones.
        """
        folder = Path(folder)
        with weights_in(dtype):
            model = cls(VaeConfig.from_folder(folder), mode=mode)
        load_parameters(model, weights.stored_tensors(folder, weights.MODEL_STEM), source=str(folder))
        return model

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the weights by their diffusers names."""
        return {name: to_array(parameter) for name, parameter in self.parameters_and_names()}

    def save(self, folder: Path | str) -> None:
        """Write a `vae/` folder that diffusers loads."""
        weights.save_folder(Path(folder), self.to_arrays(), config=self.config.to_dict(), stem=weights.MODEL_STEM)

    @property
    def dtype(self) -> Any:
        """Dtype of the weights and of what is computed."""
        return self.encoder.conv_in.conv.weight.dtype

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, F', C, h, w] of `pixels` [B, 3, F, H, W] in [-1, 1].

        Neither is scaled, and logvar is not clamped; `sample_posterior` does that.

        Raises:
            FactoryError: not such a video, or height or width no multiple of 8.
        """
        check_pixels(self.config, pixels.shape, str(pixels.dtype), is_floating=pixels.is_floating_point())
        size = 4 * self.frame_batch
        moments = self._run(pixels, self._encode_batch, size=size, in_scale=self.config.spatial_scale, out_scale=1)
        mean, logvar = ops.chunk(moments.transpose(0, 2, 1, 3, 4), 2, axis=2)
        return mean, logvar

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, F', H, W], about [-1, 1], of unscaled `latents` [B, F, C, h, w].

        Raises:
            FactoryError: not such latents.
        """
        check_latents(self.config, latents.shape, str(latents.dtype), is_floating=latents.is_floating_point())
        return self._run(
            latents.transpose(0, 2, 1, 3, 4), self._decode_batch, size=self.frame_batch, in_scale=1,
            out_scale=self.config.spatial_scale,
        )  # fmt: skip

    def _run(self, video: Tensor, coder: Coder, *, size: int, in_scale: int, out_scale: int) -> Tensor:
        """Code `video` [B, C, F, H, W] by slices, tiles and batches of `size` frames."""

        def code(part: Tensor) -> Tensor:
            return ops.concat(list(_code_batches(part, coder, size)), axis=2)

        tiles = self.tiles
        if (
            tiles is not None
            and video.shape[3] <= tiles[0].size * in_scale
            and video.shape[4] <= tiles[1].size * in_scale
        ):
            tiles = None
        video = video.astype(self.dtype)
        at_once = 1 if self.use_slicing else video.shape[0]
        parts = [video[start : start + at_once] for start in range(0, video.shape[0], at_once)]
        if tiles is None:
            return ops.concat([code(part) for part in parts])
        return ops.concat([run_tiled(code, part, *tiles, in_scale=in_scale, out_scale=out_scale) for part in parts])

    def _encoded(self, x: Tensor, before: Tails) -> tuple[Tensor, Tails]:
        x, tails = self.encoder(x, before)
        return (x if self.quant_conv is None else self.quant_conv(x)), tails

    def _decoded(self, x: Tensor, before: Tails) -> tuple[Tensor, Tails]:
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder(x, before)


def _code_batches(video: Tensor, coder: Coder, size: int) -> Iterator[Tensor]:
    """Yield the coded frame batches of `video` [B, C, F, H, W]."""
    tails: Tails = ()
    for start, stop in frame_batches(video.shape[2], size):
        coded, tails = coder(video[:, :, start:stop], tails)
        tails = ms.mutable(tails)  # or a graph would take them for constants, and be compiled anew for the next ones
        yield coded


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + std * noise, all of one shape; logvar is clamped to [-30, 20] as diffusers does.

    A CPU has no arithmetic in bfloat16, which caches are in, so it is done in float32 and rounded.
    """
    dtype = mean.dtype

    def kept(x: Tensor) -> Tensor:  # each result is rounded to the dtype, as where it can be computed in
        return x.astype(dtype).astype(ms.float32)

    std = kept(ops.exp(kept(0.5 * logvar.astype(ms.float32).clamp(-30.0, 20.0))))
    return (mean.astype(ms.float32) + kept(std * kept(noise.astype(ms.float32)))).astype(dtype)


def pixels_from_uint8(frames: Tensor, dtype: Any = ms.float32) -> Tensor:
    """Return pixels [B, 3, F, H, W] in [-1, 1] of uint8 `frames` [B, F, H, W, 3]."""
    assert frames.dtype == ms.uint8
    assert frames.shape[-1] == 3
    return (frames.astype(ms.float32).transpose(0, 4, 1, 2, 3) / 127.5 - 1.0).astype(dtype)


def uint8_from_pixels(pixels: Tensor) -> Tensor:
    """Return uint8 frames [B, F, H, W, 3] of `pixels` [B, 3, F, H, W], clamped to [-1, 1] and rounded."""
    unit = (pixels.transpose(0, 2, 3, 4, 1).astype(ms.float32) * 0.5 + 0.5).clamp(0.0, 1.0)
    return ops.round(unit * 255.0).astype(ms.uint8)
