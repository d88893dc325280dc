"""Encoder and decoder of the causal VAE, built from `vae_layers` (CogVideoX, arXiv 2408.06072, section 2.1).

Four stages of residual blocks; between stages the size halves (or doubles), in the first two also in time. Time is
halved by a plain mean of neighbours and doubled by repetition; a chunk with an odd number of frames keeps its first
frame alone.
"""

from collections.abc import Iterator
from itertools import count

from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine.vae_layers import (
    CausalConv,
    FrameConv,
    GroupNorm,
    PointwiseConv,
    SpatialNorm,
    Tails,
    double_frames,
    stretch,
)
from cogvideox_factory.models import VaeConfig

# Legend: B batch, T frames of a chunk, H W height and width, C channels. All activations are [B, C, T, H, W].


class ResnetBlock(nn.Cell):
    """Norm, SiLU, convolution, twice, and a shortcut."""

    def __init__(
        self, config: VaeConfig, in_channels: int, out_channels: int, *, is_decoder: bool, places: Iterator[int]
    ) -> None:
        super().__init__()

        def norm(channels: int) -> GroupNorm | SpatialNorm:
            if is_decoder:
                return SpatialNorm(channels, config.norm_num_groups, config.latent_channels)
            return GroupNorm(channels, config.norm_num_groups, config.norm_eps)

        self.norm1, self.norm2 = norm(in_channels), norm(out_channels)
        self.conv1 = CausalConv(in_channels, out_channels, place=next(places))
        self.conv2 = CausalConv(out_channels, out_channels, place=next(places))
        self.conv_shortcut = PointwiseConv(in_channels, out_channels) if in_channels != out_channels else None

    def construct(self, x: Tensor, latents: Tensor | None, before: Tails) -> tuple[Tensor, Tails]:
        """Map `x` [B, C, T, H, W]; return it and the tails of both convolutions."""
        hidden, first = self.conv1(ops.silu(self.norm1(x, latents)), before)
        hidden, second = self.conv2(ops.silu(self.norm2(hidden, latents)), before)
        residual = x if self.conv_shortcut is None else self.conv_shortcut(x)
        return residual + hidden, (first, second)


class Upsample(nn.Cell):
    """Nearest upsampling and a 3x3 convolution of each frame."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = FrameConv(channels, stride=1)
        self.in_time = in_time

    def construct(self, x: Tensor) -> Tensor:
        """Return `x` [B, C, T, H, W] at twice the size."""
        frames, height, width = x.shape[2:]
        x = self.conv(stretch(x, (frames, 2 * height, 2 * width)))
        return double_frames(x) if self.in_time else x  # equal frames have equal convolutions


class Downsample(nn.Cell):
    """Mean of neighbouring frames, and a 3x3 convolution of stride 2."""

    def __init__(self, channels: int, *, in_time: bool) -> None:
        super().__init__()
        self.conv = FrameConv(channels, stride=2)
        self.in_time = in_time

    def construct(self, x: Tensor) -> Tensor:
        """Return `x` [B, C, T, H, W] at half the size."""
        batch, channels, frames, height, width = x.shape
        if not self.in_time or frames == 1:
            return self.conv(x)
        single = frames % 2  # a first frame that stays alone
        pairs = x[:, :, single:].reshape(batch, channels, frames // 2, 2, height * width)
        mean = (pairs[:, :, :, 0] + pairs[:, :, :, 1]) / 2
        mean = mean.reshape(batch, channels, frames // 2, height, width)
        return self.conv(ops.concat((x[:, :, :1], mean), axis=2) if single else mean)


class Stage(nn.Cell):
    """Residual blocks of one size, and what changes the size behind them, if anything does."""

    def __init__(
        self,
        config: VaeConfig,
        in_channels: int,
        out_channels: int,
        num_layers: int,
        *,
        is_decoder: bool,
        places: Iterator[int],
    ) -> None:
        super().__init__()
        channels = [in_channels] + [out_channels] * num_layers
        self.resnets = nn.CellList(
            [
                ResnetBlock(config, channels[i], channels[i + 1], is_decoder=is_decoder, places=places)
                for i in range(num_layers)
            ]
        )
        self.downsamplers = self.upsamplers = None

    def construct(self, x: Tensor, latents: Tensor | None, before: Tails) -> tuple[Tensor, Tails]:
        """Map `x` [B, C, T, H, W]; return it and the tails of its convolutions."""
        tails = ()
        for resnet in self.resnets:
            x, own = resnet(x, latents, before)
            tails = tails + own
        if self.downsamplers is not None:
            x = self.downsamplers[0](x)
        if self.upsamplers is not None:
            x = self.upsamplers[0](x)
        return x, tails


class Encoder(nn.Cell):
    """Pixels to moments of the latents: 2 * latent_channels, mean first."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, places = config.block_out_channels, count()
        self.conv_in = CausalConv(config.in_channels, channels[0], place=next(places))
        self.down_blocks = nn.CellList()
        for level, (before, after) in enumerate(zip((channels[0], *channels), channels)):
            stage = Stage(config, before, after, config.layers_per_block, is_decoder=False, places=places)
            if level < len(channels) - 1:
                stage.downsamplers = nn.CellList([Downsample(after, in_time=level < config.num_time_levels)])
            self.down_blocks.append(stage)
        self.mid_block = Stage(config, channels[-1], channels[-1], 2, is_decoder=False, places=places)
        self.norm_out = GroupNorm(channels[-1], config.norm_num_groups, 1e-6)
        self.conv_out = CausalConv(channels[-1], 2 * config.latent_channels, place=next(places))

    def construct(self, x: Tensor, before: Tails) -> tuple[Tensor, Tails]:
        """Map one chunk `x` [B, 3, T, H, W] to moments [B, 2 Z, F, h, w]; return them and all tails."""
        x, tail = self.conv_in(x, before)
        tails = (tail,)
        for stage in self.down_blocks:
            x, own = stage(x, None, before)
            tails = tails + own
        x, own = self.mid_block(x, None, before)
        x, tail = self.conv_out(ops.silu(self.norm_out(x, None)), before)
        return x, (*tails, *own, tail)


class Decoder(nn.Cell):
    """Latents to pixels; the latents also steer every norm."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        channels, places = config.block_out_channels[::-1], count()
        self.conv_in = CausalConv(config.latent_channels, channels[0], place=next(places))
        self.mid_block = Stage(config, channels[0], channels[0], 2, is_decoder=True, places=places)
        self.up_blocks = nn.CellList()
        for level, (before, after) in enumerate(zip((channels[0], *channels), channels)):
            stage = Stage(config, before, after, config.layers_per_block + 1, is_decoder=True, places=places)
            if level < len(channels) - 1:
                stage.upsamplers = nn.CellList([Upsample(after, in_time=level < config.num_time_levels)])
            self.up_blocks.append(stage)
        self.norm_out = SpatialNorm(channels[-1], config.norm_num_groups, config.latent_channels)
        self.conv_out = CausalConv(channels[-1], config.out_channels, place=next(places))

    def construct(self, latents: Tensor, before: Tails) -> tuple[Tensor, Tails]:
        """Map one chunk of latents [B, Z, F, h, w] to pixels [B, 3, T, H, W]; return them and all tails."""
        x, tail = self.conv_in(latents, before)
        x, own = self.mid_block(x, latents, before)
        tails = (tail, *own)
        for stage in self.up_blocks:
            x, own = stage(x, latents, before)
            tails = tails + own
        x, tail = self.conv_out(ops.silu(self.norm_out(x, latents)), before)
        return x, (*tails, tail)
