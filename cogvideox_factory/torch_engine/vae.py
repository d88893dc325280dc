"""The 3-D causal VAE of the CogVideoX family: 8x8 pixels (and 4 frames) become one latent (arXiv 2408.06072, 2.1).

```python
vae = CogVideoXVAE.from_folder("CogVideoX-2b/vae", dtype=torch.bfloat16, device="cpu")
mean, logvar = vae.encode(pixels_from_uint8(frames))      # unscaled, as the cache keeps them
frames = uint8_from_pixels(vae.decode(mean))
```

Unusual: a video is coded in frame batches of 8 frames (2 latents), the remainder joined to the first, and group norm
sees one batch at a time. So the batch size is part of the numbers; it is the one the weights were trained with.
Parameter names are the checkpoint's own. Loaded weights are frozen; `requires_grad_(True)` makes them trainable, and
then `encode` and `decode` are differentiable (and slower).
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from cogvideox_factory import weights
from cogvideox_factory.diffusion.coding import Coding
from cogvideox_factory.diffusion.frames import frame_batches
from cogvideox_factory.diffusion.tiles import TileAxis
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.network_input import check_latents, check_pixels, check_vae_config
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.vae_blocks import Coder, Decoder, Encoder, initialize
from cogvideox_factory.torch_engine.vae_layers import Chunk, Kernels, Weights, pointwise
from cogvideox_factory.torch_engine.vae_parallel import Rows, share_out
from cogvideox_factory.torch_engine.vae_scratch import Scratch
from cogvideox_factory.torch_engine.vae_tiling import run_tiled

# Legend: B batch, F frames or latent frames, C latent channels, H W pixel height and width, h w latent ones.

STEM = "diffusion_pytorch_model"


class CogVideoXVAE(Coding, nn.Module):
    """Encoder and decoder with the options of a run: tiling, slicing, frame batches, checkpointing."""

    def __init__(self, config: VaeConfig, *, seed: int = 0) -> None:
        """Build with random weights to train from; on the meta device they stay empty."""
        super().__init__()
        check_vae_config(config)
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        latent = config.latent_channels
        self.quant_conv = Weights(2 * latent, 2 * latent, 1, 1, 1) if config.use_quant_conv else None
        self.post_quant_conv = Weights(latent, latent, 1, 1, 1) if config.use_post_quant_conv else None
        self.checkpointing = False
        """Recompute each stage in the backward pass; has no effect where autograd needs no graph."""
        self.group: dist.ProcessGroup | None = None
        """Processes that share the work (see `vae_parallel`); each codes the same videos and gets all of the result."""
        if not self.encoder.conv_in.conv.weight.is_meta:
            initialize(self, seed)

    @classmethod
    def from_folder(cls, folder: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Self:
        """Load a `vae/` folder in the diffusers layout, frozen.

        Raises:
            MissingError: no weights there.
            UnfitError: another model's weights, or damaged ones.
        """
        with torch.device("meta"):
            model = cls(VaeConfig.from_folder(Path(folder)))
        model.to(dtype).to_empty(device=device)
        model.load_arrays(weights.iterate_tensors(Path(folder), STEM), source=str(folder))
        return model.requires_grad_(False).eval()

    def load_arrays(
        self, arrays: Iterable[tuple[str, np.ndarray]], *, strict: bool = True, source: str = "weights"
    ) -> None:
        """Copy named arrays into the parameters, casting to their dtype.

        Raises:
            UnfitError: a wrong shape; if strict, also a name too many or too few.
        """
        own = dict(self.named_parameters())
        missing, strays = set(own), []
        for name, array in arrays:
            if name not in own:
                strays.append(name)
                continue
            if tuple(array.shape) != tuple(own[name].shape):
                raise UnfitError(
                    f"{source}: {name} has shape {tuple(array.shape)}, this VAE's config asks for "
                    f"{tuple(own[name].shape)}. Weights and config.json are of different models."
                )
            with torch.no_grad():
                own[name].copy_(to_tensor(array))
            missing.discard(name)
        if strict and (missing or strays):
            raise UnfitError(
                f"{source}: {len(missing)} of {len(own)} VAE weights are missing {sorted(missing)[:3]}, "
                f"{len(strays)} are strangers {sorted(strays)[:3]}. Give a vae/ folder whose config.json is its own."
            )

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return the weights by their diffusers names."""
        return {name: to_array(parameter.detach()) for name, parameter in self.named_parameters()}

    def save(self, folder: Path | str) -> None:
        """Write a `vae/` folder that diffusers loads."""
        weights.save_folder(Path(folder), self.to_arrays(), config=self.config.to_dict(), stem=STEM)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights and of what is computed."""
        return self.encoder.conv_in.conv.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.conv_in.conv.weight.device

    @property
    def spatial_scale(self) -> int:
        """Pixels a latent covers in height and width: 8."""
        return self.config.spatial_scale

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and logvar [B, F', C, h, w] of `pixels` [B, 3, F, H, W] in [-1, 1].

        Neither is scaled, and logvar is not clamped; `sample_posterior` does that.

        Raises:
            FactoryError: not such a video, or height or width no multiple of 8.
        """
        check_pixels(self.config, tuple(pixels.shape), str(pixels.dtype), is_floating=pixels.is_floating_point())
        batch, _, frames, height, width = pixels.shape
        shape = (self.num_latent_frames(frames), height // self.spatial_scale, width // self.spatial_scale)
        shape = (batch, 2 * self.config.latent_channels, *shape)
        moments = self._run(pixels, shape, self.encoder, in_scale=self.spatial_scale, out_scale=1)
        mean, logvar = moments.transpose(1, 2).chunk(2, dim=2)
        return mean.contiguous(), logvar.contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels [B, 3, F', H, W], about [-1, 1], of unscaled `latents` [B, F, C, h, w].

        Raises:
            FactoryError: not such latents.
        """
        check_latents(self.config, tuple(latents.shape), str(latents.dtype), is_floating=latents.is_floating_point())
        batch, frames, _, height, width = latents.shape
        shape = (self._pixel_frames(frames), height * self.spatial_scale, width * self.spatial_scale)
        shape = (batch, self.config.out_channels, *shape)
        return self._run(latents.transpose(1, 2), shape, self.decoder, in_scale=1, out_scale=self.spatial_scale)

    def _run(self, video: Tensor, shape: tuple[int, ...], coder: Coder, *, in_scale: int, out_scale: int) -> Tensor:
        """Code `video` [B, C, F, H, W] to a tensor of `shape`, by slices, tiles and processes as set."""
        trainable = video.requires_grad or any(parameter.requires_grad for parameter in coder.parameters())
        recording = torch.is_grad_enabled() and trainable
        group = None if self.group is None or self.group.size() == 1 else self.group
        assert group is None or not recording, "processes share no gradients of the VAE"
        kernels: Kernels = {}
        scratch = Scratch(is_active=not recording)

        def size_of(part: Tensor) -> tuple[int, ...]:
            return (len(part), *shape[1:3], *(extent // in_scale * out_scale for extent in part.shape[3:]))

        def code(part: Tensor, out: Tensor | None = None, rows: Rows | None = None) -> Tensor:
            chunks = self._code_chunks(part, coder, recording=recording, kernels=kernels, scratch=scratch, rows=rows)
            if recording:
                return torch.cat([*chunks], dim=2)
            if out is None:
                out = part.new_empty(size_of(part), dtype=self.dtype)
            start = 0
            for chunk in chunks:
                out[:, :, start : start + chunk.shape[2]] = chunk
                start += chunk.shape[2]
            return out

        def code_each(parts: Sequence[Tensor]) -> Iterator[Tensor]:
            if group is None:
                return map(code, parts)
            return share_out(code, parts, [size_of(part) for part in parts], group, dtype=self.dtype)

        tiles = self._tiles_for(video, in_scale)
        at_once = 1 if self.use_slicing else len(video)
        with torch.set_grad_enabled(recording):
            if recording and tiles is None:
                return torch.cat([code(part) for part in video.split(at_once)])
            out = video.new_empty(shape, dtype=self.dtype)
            rows = None
            if group is not None and tiles is None:
                if len(video) % group.size() == 0 or video.shape[3] // in_scale < group.size():
                    parts = video.split(min(at_once, -(-len(video) // group.size())))
                    return torch.cat([*code_each(parts)], out=out)
                rows = Rows.divide(video.shape[3] // in_scale, group)
            for start in range(0, len(video), at_once):
                part, target = video[start : start + at_once], out[start : start + at_once]
                if tiles is not None:
                    run_tiled(code_each, part, target, *tiles, in_scale=in_scale, out_scale=out_scale)
                elif rows is not None:
                    rows.join(code(rows.cut(part, in_scale), rows=rows), target)
                else:
                    code(part, target)
        return out

    def _code_chunks(
        self, video: Tensor, coder: Coder, *, recording: bool, kernels: Kernels, scratch: Scratch, rows: Rows | None
    ) -> Iterator[Tensor]:
        """Yield the frame batches of `video` [B, C, F, H, W], coded: [B, C', T, H', W']."""
        is_encoder = coder is self.encoder
        before = None if is_encoder else self.post_quant_conv
        after = self.quant_conv if is_encoder else None
        count = video.shape[2]
        tails: dict[nn.Module, Tensor] = {}
        for start, stop in frame_batches(count, self.frame_batch * (4 if is_encoder else 1)):
            chunk = Chunk(
                recording=recording, is_first=start == 0, is_last=stop == count,
                checkpointing=self.checkpointing, tails=tails, kernels=kernels, scratch=scratch, rows=rows,
            )  # fmt: skip
            x = video[:, :, start:stop].permute(0, 2, 3, 4, 1).to(self.dtype)  # [B, T, H, W, C]
            coded = coder(x if before is None else pointwise(x, before), chunk)
            yield (coded if after is None else pointwise(coded, after)).permute(0, 4, 1, 2, 3)
            scratch.give(coded)

    def _tiles_for(self, video: Tensor, in_scale: int) -> tuple[TileAxis, TileAxis] | None:
        if self.tiles is None:
            return None
        rows, columns = self.tiles
        is_larger = video.shape[3] > rows.size * in_scale or video.shape[4] > columns.size * in_scale
        return self.tiles if is_larger else None

    def num_latent_frames(self, num_frames: int) -> int:
        """Return how many latent frames `encode` makes of `num_frames`."""
        total = 0
        for start, stop in frame_batches(num_frames, 4 * self.frame_batch):
            frames = stop - start
            for _ in range(self.config.num_time_levels):
                frames = (frames + 1) // 2
            total += frames
        return total

    def _pixel_frames(self, num_latents: int) -> int:
        total = 0
        for start, stop in frame_batches(num_latents, self.frame_batch):
            single = (stop - start) % 2
            total += single + (stop - start - single) * 2**self.config.num_time_levels
        return total


def sample_posterior(mean: Tensor, logvar: Tensor, noise: Tensor) -> Tensor:
    """Return mean + std * noise, all of one shape; logvar is clamped to [-30, 20] as diffusers does."""
    return mean + torch.exp(0.5 * logvar.clamp(-30.0, 20.0)) * noise.to(mean.dtype)


def pixels_from_uint8(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return pixels [B, 3, F, H, W] in [-1, 1] of uint8 `frames` [B, F, H, W, 3], on their device."""
    assert frames.dtype == torch.uint8
    assert frames.shape[-1] == 3
    return frames.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0).to(dtype)


def uint8_from_pixels(pixels: Tensor) -> Tensor:
    """Return uint8 frames [B, F, H, W, 3] of `pixels` [B, 3, F, H, W], clamped to [-1, 1] and rounded."""
    unit = pixels.permute(0, 2, 3, 4, 1).to(torch.float32, copy=True).mul_(0.5).add_(0.5).clamp_(0.0, 1.0)
    return unit.mul_(255.0).round_().to(torch.uint8).contiguous()
