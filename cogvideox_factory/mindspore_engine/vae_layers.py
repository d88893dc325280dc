"""Layers of the 3-D causal VAE (CogVideoX, arXiv 2408.06072, section 2.1), with the checkpoint's parameter names.

A video passes in frame batches. What a convolution in time must remember from one to the next, its last two input
frames, comes in and goes out as an element of one flat tuple: each convolution knows its place in it. So a frame batch
is a pure function of tensors, which compiles; an empty tuple is the beginning of a video.

The decoder's norms are modulated by the latents (spatially adaptive norm, arXiv 2209.09002): scale and shift are 1x1
convolutions of the upsampled latents. Nearest upsampling commutes with those, so they are computed at latent size.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine import device
from cogvideox_factory.mindspore_engine.linear import empty

# Legend: B batch, T frames of a chunk, H W height and width, C channels, F h w Z the chunk's latents, G norm groups.
# All activations are [B, C, T, H, W].

Tails = tuple[Tensor, ...]
"""The last input frames of convolutions in time, each [B, C, 2, H, W], in the order they run."""


class Weights(nn.Cell):
    """A `weight` and a `bias` under one name; the layer above knows what to do with them."""

    def __init__(self, out_channels: int, *shape: int) -> None:
        super().__init__()
        self.weight, self.bias = empty(out_channels, *shape), empty(out_channels)


class PointwiseConv(Weights):
    """A 1x1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(out_channels, in_channels, 1, 1, 1)
        self.in_channels, self.out_channels = in_channels, out_channels

    def construct(self, x: Tensor) -> Tensor:
        """Map `x` [B, C, T, H, W]."""
        batch, channels, *size = x.shape
        weight = self.weight.astype(x.dtype).reshape(1, self.out_channels, self.in_channels)
        weight = ops.broadcast_to(weight, (batch, self.out_channels, self.in_channels))
        out = ops.BatchMatMul()(weight, x.reshape(batch, channels, -1)) + self.bias.astype(x.dtype)[:, None]
        return out.reshape(batch, self.out_channels, *size)


class WrappedPointwiseConv(nn.Cell):
    """A 1x1x1 convolution under the name the decoder's norms give it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = PointwiseConv(in_channels, out_channels)

    def construct(self, x: Tensor) -> Tensor:
        """Map `x` [B, C, T, H, W]."""
        return self.conv(x)


class CausalConv(nn.Cell):
    """A 3x3x3 convolution that sees no later frame; before the first frame it sees copies of it."""

    def __init__(self, in_channels: int, out_channels: int, *, place: int) -> None:
        super().__init__()
        self.conv = Weights(out_channels, in_channels, 3, 3, 3)
        self.convolve = device.causal_conv3d(out_channels)
        self.place = place

    def construct(self, x: Tensor, before: Tails) -> tuple[Tensor, Tensor]:
        """Return the convolution of `x` [B, C, T, H, W] behind what is `before` it, and its own tail."""
        if len(before) == 0:
            batch, channels, _, height, width = x.shape
            earlier = ops.broadcast_to(x[:, :, :1], (batch, channels, 2, height, width))
        else:
            earlier = before[self.place]
        padded = ops.concat((earlier, x), axis=2)  # [B, C, 2 + T, H, W]
        bias = self.conv.bias.astype(x.dtype).reshape(1, -1, 1, 1, 1)
        return self.convolve(padded, self.conv.weight.astype(x.dtype)) + bias, padded[:, :, -2:]


class FrameConv(Weights):
    """A 3x3 convolution of each frame, padded all around; with stride 2, at the bottom and right only."""

    def __init__(self, channels: int, *, stride: int) -> None:
        super().__init__(channels, channels, 3, 3)
        pad = (1, 1, 1, 1) if stride == 1 else (0, 1, 0, 1)
        self.convolve = ops.Conv2D(channels, kernel_size=3, pad_mode="pad", pad=pad, stride=stride)

    def construct(self, x: Tensor) -> Tensor:
        """Map `x` [B, C, T, H, W]."""
        batch, channels, frames, height, width = x.shape
        images = x.transpose(0, 2, 1, 3, 4).reshape(batch * frames, channels, height, width)
        out = self.convolve(images, self.weight.astype(x.dtype)) + self.bias.astype(x.dtype).reshape(1, -1, 1, 1)
        return out.reshape(batch, frames, *out.shape[1:]).transpose(0, 2, 1, 3, 4)


class GroupNorm(Weights):
    """Group norm in float32; the statistics span all frames of a chunk."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(channels)
        self.groups, self.eps = groups, eps

    def construct(self, x: Tensor, latents: Tensor | None) -> Tensor:
        """Normalise `x` [B, C, T, H, W]; `latents` are what the decoder's norms look at, and this one does not."""
        groups = x.astype(ms.float32).reshape(x.shape[0], self.groups, -1)
        centred = groups - groups.mean(-1, keep_dims=True)
        variance = centred.square().mean(-1, keep_dims=True)
        normed = (centred * ops.rsqrt(variance + self.eps)).reshape(x.shape)
        weight, bias = (p.astype(ms.float32).reshape(1, -1, 1, 1, 1) for p in (self.weight, self.bias))
        return (normed * weight + bias).astype(x.dtype)


class SpatialNorm(nn.Cell):
    """Group norm whose result is scaled and shifted, place by place, by the latents it decodes."""

    def __init__(self, channels: int, groups: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(channels, groups, 1e-6)
        self.conv_y = WrappedPointwiseConv(latent_channels, channels)
        self.conv_b = WrappedPointwiseConv(latent_channels, channels)

    def construct(self, x: Tensor, latents: Tensor) -> Tensor:
        """Normalise `x` [B, C, T, H, W] by `latents` [B, Z, F, h, w]."""
        scale, shift = stretch(self.conv_y(latents), x.shape[2:]), stretch(self.conv_b(latents), x.shape[2:])
        return self.norm_layer(x, None) * scale + shift


def stretch(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """Repeat the values of `x` [B, C, F, h, w] so that each covers a box of [B, C, T, H, W], `size` its last three.

    When T is odd the first frame belongs to the first latent frame alone, as everywhere in this VAE.
    """
    frames, height, width = size
    if x.shape[2] == 1 or frames % 2 == 0:
        return _repeat(x, frames // x.shape[2], height // x.shape[3], width // x.shape[4])
    rows, columns = height // x.shape[3], width // x.shape[4]
    rest = _repeat(x[:, :, 1:], (frames - 1) // (x.shape[2] - 1), rows, columns)
    return ops.concat((_repeat(x[:, :, :1], 1, rows, columns), rest), axis=2)


def double_frames(x: Tensor) -> Tensor:
    """Repeat every frame of `x` [B, C, T, H, W]; an odd T keeps its first frame single, a lone frame stays alone."""
    frames = x.shape[2]
    if frames == 1:
        return x
    return stretch(x, (2 * frames - frames % 2, x.shape[3], x.shape[4]))


def _repeat(x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
    """Repeat each value of `x` [B, C, T, H, W] so many times along time, height and width."""
    batch, channels, t, h, w = x.shape
    x = x.reshape(batch * channels, t, 1, h, 1, w, 1)
    x = ops.broadcast_to(x, (batch * channels, t, frames, h, rows, w, columns))
    return x.reshape(batch, channels, t * frames, h * rows, w * columns)
