"""Encoder and decoder of the causal VAE, built from `vae_layers` (CogVideoX, arXiv 2408.06072, section 2.1).

Four stages of residual blocks; between stages the size halves (or doubles), in the first two also in time. Time is
halved by a plain mean of neighbours and doubled by repetition; a chunk with an odd number of frames keeps its first
frame alone.
"""

from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cogvideox_factory import draws
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.torch_engine import vae_conv
from cogvideox_factory.torch_engine.vae_layers import (
    CausalConv,
    Chunk,
    GroupNorm,
    SpatialNorm,
    Weights,
    norm_silu_pad,
    pointwise,
)

# Legend: B batch, T frames of a chunk, H W height and width, C channels. All activations are [B, T, H, W, C].


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(self, config: VaeConfig, in_channels: int, out_channels: int, *, is_decoder: bool) -> None:
        super().__init__()

        def norm(channels: int) -> GroupNorm | SpatialNorm:
            if is_decoder:
                return SpatialNorm(channels, config.norm_num_groups, config.latent_channels)
            return GroupNorm(channels, config.norm_num_groups, config.norm_eps)

        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1, self.conv2 = CausalConv(in_channels, out_channels), CausalConv(out_channels, out_channels)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = Weights(out_channels, in_channels, 1, 1, 1)

    def forward(self, x: Tensor, chunk: Chunk, *, is_doubled: bool = False) -> Tensor:
        """Map `x` [B, T, H, W, C], which is overwritten unless recording.

        `is_doubled` says that `x` holds only one of each pair of equal frames; the result holds them all.
        """
        residual = x if self.conv_shortcut is None else pointwise(x, self.conv_shortcut)
        padded = norm_silu_pad(self.norm1, x, chunk, self.conv1, is_doubled=is_doubled)
        if residual is not x:
            chunk.scratch.give(x)
        hidden = self.conv1.forward_doubled(padded, chunk) if is_doubled else self.conv1(padded, chunk)
        chunk.scratch.give(padded)
        padded = norm_silu_pad(self.norm2, hidden, chunk, self.conv2)
        chunk.scratch.give(hidden)
        if is_doubled:
            doubled = double_frames(residual)
            chunk.scratch.give(residual)
            residual = doubled
        out = self.conv2(padded, chunk, onto=residual)
        chunk.scratch.give(padded)
        return out


def double_frames(x: Tensor) -> Tensor:
    """Repeat every frame of `x` [B, T, H, W, C]; an odd T keeps its first frame single, a lone frame stays alone."""
    if x.shape[1] % 2 == 0:
        return x.repeat_interleave(2, 1)
    return torch.cat([x[:, :1], x[:, 1:].repeat_interleave(2, 1)], dim=1)


class Upsample(nn.Module):
    """Nearest upsampling and a 3x3 convolution of each frame."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = Weights(channels, channels, 3, 3)
        self.in_time = in_time

    def forward(self, x: Tensor, chunk: Chunk) -> tuple[Tensor, bool]:
        """Return `x` [B, T, H, W, C] at twice the size, and whether its frames are still to be doubled."""
        in_time = self.in_time and x.shape[1] > 1
        if chunk.recording:
            large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
            out = vae_conv.conv_frames(large, self.conv.weight, self.conv.bias)
            return (double_frames(out) if in_time else out), False
        batch, frames, height, width, channels = x.shape
        if chunk.rows is not None:
            padded, inner = chunk.room(x)
            inner.copy_(x)
            chunk.rows.fill_edges(padded)
            chunk.scratch.give(x)
            x = padded
        kernels = chunk.kernel(vae_conv.subpixel_kernels, self.conv.weight)
        out = chunk.scratch.take(x, batch, frames, 2 * height, 2 * width, channels)
        vae_conv.subpixel(x, kernels, self.conv.bias, out, padding=chunk.padding)
        chunk.scratch.give(x)
        return out, in_time


class Downsample(nn.Module):
    """Mean of neighbouring frames, and a 3x3 convolution of stride 2 padded at the bottom and right only."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = Weights(channels, channels, 3, 3)
        self.in_time = in_time

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return `x` [B, T, H, W, C] at half the size."""
        single = x.shape[1] % 2 if self.in_time else x.shape[1]  # frames that stay alone
        early, late = x[:, single::2], x[:, single + 1 :: 2]
        if chunk.recording:
            mean = torch.cat([x[:, :single], (early + late) / 2], dim=1)
            padded = F.pad(mean, (0, 0, 0, 1, 0, 1))
        else:
            batch, frames, height, width, channels = x.shape
            shape = (batch, single + (frames - single) // 2, height + 1, width + 1, channels)
            padded = chunk.scratch.take(x, *shape)
            padded[:, :, height] = 0
            padded[:, :, :, width] = 0
            padded[:, :single, :height, :width] = x[:, :single]
            torch.lerp(early, late, 0.5, out=padded[:, single:, :height, :width])
            chunk.scratch.give(x)
            if chunk.rows is not None:
                chunk.rows.fill_edges(padded, above=False)
        out = vae_conv.conv_frames(padded, self.conv.weight, self.conv.bias, stride=2, padding=(0, 0))
        chunk.scratch.give(padded)
        return out


class Stage(nn.Module):
    """Residual blocks of one size; the decoder's and encoder's lists of samplers stay empty where size stays."""

    def __init__(
        self, config: VaeConfig, in_channels: int, out_channels: int, num_layers: int, *, is_decoder: bool
    ) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.ModuleList(
            ResnetBlock(config, channels[i], channels[i + 1], is_decoder=is_decoder) for i in range(num_layers)
        )
        self.downsamplers = nn.ModuleList()
        self.upsamplers = nn.ModuleList()

    def forward(self, x: Tensor, chunk: Chunk, *, is_doubled: bool = False) -> tuple[Tensor, bool]:
        """Map `x` [B, T, H, W, C]; on both sides a flag says whether its frames are still to be doubled."""
        for resnet in self.resnets:
            x, is_doubled = resnet(x, chunk, is_doubled=is_doubled), False
        for downsample in self.downsamplers:
            x = downsample(x, chunk)
        for upsample in self.upsamplers:
            x, is_doubled = upsample(x, chunk)
        return x, is_doubled


class Coder(nn.Module):
    """What encoder and decoder share: a convolution, stages in order, and norm, SiLU, convolution at the end."""

    conv_in: CausalConv
    norm_out: GroupNorm | SpatialNorm
    conv_out: CausalConv

    def stages(self) -> list[nn.Module]:
        """Return the stages in the order they run."""
        raise AssertionError("set by encoder and decoder")

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map one chunk `x` [B, T, H, W, C] to [B, T', H', W', C']."""
        padded = self.conv_in.pad(x, chunk)
        x, is_doubled = self.conv_in(padded, chunk), False
        chunk.scratch.give(padded)
        for stage in self.stages():
            if chunk.recording and chunk.checkpointing:
                x = _checkpointed(stage, x, chunk)
            else:
                x, is_doubled = stage(x, chunk, is_doubled=is_doubled)
        assert not is_doubled
        padded = norm_silu_pad(self.norm_out, x, chunk, self.conv_out)
        chunk.scratch.give(x)
        out = self.conv_out(padded, chunk)
        chunk.scratch.give(padded)
        return out


class Encoder(Coder):
    """Pixels to moments of the latents: 2 * latent_channels, mean first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.block_out_channels
        self.conv_in = CausalConv(config.in_channels, channels[0])
        self.down_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip((channels[0], *channels), channels)):
            stage = Stage(config, before, after, config.layers_per_block, is_decoder=False)
            if level < len(channels) - 1:
                stage.downsamplers.append(Downsample(after, in_time=level < config.num_time_levels))
            self.down_blocks.append(stage)
        self.mid_block = Stage(config, channels[-1], channels[-1], 2, is_decoder=False)
        self.norm_out = GroupNorm(channels[-1], config.norm_num_groups, 1e-6)
        self.conv_out = CausalConv(channels[-1], 2 * config.latent_channels)

    def stages(self) -> list[nn.Module]:
        """Return the stages in the order they run."""
        return [*self.down_blocks, self.mid_block]


class Decoder(Coder):
    """Latents to pixels; the latents also steer every norm."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels = config.block_out_channels[::-1]
        self.conv_in = CausalConv(config.latent_channels, channels[0])
        self.mid_block = Stage(config, channels[0], channels[0], 2, is_decoder=True)
        self.up_blocks = nn.ModuleList()
        for level, (before, after) in enumerate(zip((channels[0], *channels), channels)):
            stage = Stage(config, before, after, config.layers_per_block + 1, is_decoder=True)
            if level < len(channels) - 1:
                stage.upsamplers.append(Upsample(after, in_time=level < config.num_time_levels))
            self.up_blocks.append(stage)
        self.norm_out = SpatialNorm(channels[-1], config.norm_num_groups, config.latent_channels)
        self.conv_out = CausalConv(channels[-1], config.out_channels)

    def stages(self) -> list[nn.Module]:
        """Return the stages in the order they run."""
        return [self.mid_block, *self.up_blocks]

    def forward(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Map one chunk of latents `x` [B, F, h, w, Z] to pixels [B, T, H, W, 3]."""
        return super().forward(x, replace(chunk, latents=x))


def _checkpointed(stage: nn.Module, x: Tensor, chunk: Chunk) -> Tensor:
    """Run `stage`, keeping only its input and its convolutions' tails for the backward pass.

    The tails are handed over explicitly: by the time of the second forward pass, `chunk` holds later ones.
    """
    convs = [module for module in stage.modules() if isinstance(module, CausalConv)]
    before = {conv: chunk.tails[conv] for conv in convs if conv in chunk.tails}

    def run(x: Tensor) -> tuple[Tensor, ...]:
        inner = replace(chunk, tails=dict(before))
        out, _ = stage(x, inner)
        return out, *(inner.tails[conv] for conv in convs if not chunk.is_last)

    out, *tails = checkpoint(run, x, use_reentrant=False)
    chunk.tails.update(zip(convs, tails))
    return out


# 1.7 undoes SiLU; with silent second convolutions every block starts as its shortcut.
_GAINS = {"conv1": 1.7, "conv2": 0.0}


def initialize(model: nn.Module, seed: int) -> None:
    """Draw weights to train from: every convolution keeps the variance (He et al., arXiv 1502.01852), norms do nothing.

    The residual branches start at zero, so that the whole is nearly linear at first and learns to carry a picture
    before it learns to refine one. The decoder's norms start around plain group norms, steered by the latents from the
    first step on, and its last convolution starts small.
    """
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        value = np.zeros(parameter.shape, dtype=np.float32)
        if parameter.ndim > 1:
            gain = next((gain for part, gain in _GAINS.items() if part in parts), 1.0)
            if name.startswith("decoder.conv_out"):
                gain = 0.3
            fan_in = parameter[0].numel()
            value = gain / fan_in**0.5 * draws.normal(seed, "vae weights", name, shape=tuple(parameter.shape))
        elif "conv_y" in parts or parts[-1] == "weight":
            value += 1.0
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(value))
