"""Layers of the 3-D causal VAE (CogVideoX, arXiv 2408.06072, section 2.1), with the checkpoint's parameter names.

A video passes in frame batches. What a layer must remember from one to the next (the last two input frames of each
convolution in time) lies in a `Chunk`, outside the layers. Every layer runs in two ways that give the same numbers:

- recording: plain differentiable operations, when autograd needs the graph;
- otherwise in place: norm, modulation and SiLU write straight into a buffer that already has room for the two
  earlier frames, residuals are added to their target, and convolutions take the forms of `vae_conv`. Frames
  that upsampling in time would only repeat are carried once (`doubled`) until a convolution tells them apart.
  Only this way can processes divide the rows of the pictures (`vae_parallel`).

The decoder's norms are modulated by the latents (spatially adaptive norm, arXiv 2209.09002): scale and shift are 1x1
convolutions of the upsampled latents. Nearest upsampling commutes with those, so they are computed at latent size.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_factory.torch_engine import vae_conv
from cogvideox_factory.torch_engine.vae_parallel import Rows
from cogvideox_factory.torch_engine.vae_scratch import Scratch

# Legend: B batch, T frames of a chunk, H W height and width, C channels, F h w Z the chunk's latents, G norm groups.
# All activations are [B, T, H, W, C].

Kernels = dict[tuple[Callable[[Tensor], Any], int], Any]


@dataclass(kw_only=True, slots=True)
class Chunk:
    """One frame batch on its way through the encoder or decoder, and what is kept between batches."""

    recording: bool
    """Whether autograd needs the graph."""
    is_first: bool = True
    is_last: bool = True
    latents: Tensor | None = None
    """What the decoder's norms look at, [B, F, h, w, Z]."""
    checkpointing: bool = False
    """Recompute blocks in the backward pass instead of keeping their activations."""
    tails: dict[nn.Module, Tensor] = field(default_factory=dict)
    """Last input frames of each convolution in time."""
    kernels: Kernels = field(default_factory=dict)
    """Rearranged weights; they live as long as one call, so they are never stale."""
    scratch: Scratch = field(default_factory=Scratch)
    """Where the paths that record nothing get their large buffers."""
    rows: Rows | None = None
    """Which rows of the pictures these are, where processes divide them."""

    @property
    def padding(self) -> tuple[int, int]:
        """Zeros that convolutions put around their input: rows of others come with it."""
        return vae_conv.ALL_AROUND if self.rows is None else (0, 1)

    def room(self, x: Tensor, *, before: int = 0) -> tuple[Tensor, Tensor]:
        """Return a buffer for `x` [B, T, H, W, C] and what a convolution sees around it, and the part that is for `x`.

        Those are `before` frames, and where processes divide the rows one row above and one below.
        """
        edge = 0 if self.rows is None else 1
        batch, frames, height, width, channels = x.shape
        padded = self.scratch.take(x, batch, before + frames, height + 2 * edge, width, channels)
        return padded, padded[:, before:, edge : edge + height]

    def kernel(self, make: Callable[[Tensor], Any], weight: Tensor) -> Any:
        """Return `make(weight)`, made once a call."""
        key = make, id(weight)
        if key not in self.kernels:
            self.kernels[key] = make(weight)
        return self.kernels[key]

    def cache_bytes(self) -> int:
        """Return the bytes kept for the next chunk."""
        return sum(tail.numel() * tail.element_size() for tail in self.tails.values())


class Weights(nn.Module):
    """A `weight` and a `bias` under one name; the layer above knows what to do with them."""

    def __init__(self, out_channels: int, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, *shape))
        self.bias = nn.Parameter(torch.empty(out_channels))


def pointwise(x: Tensor, layer: Weights) -> Tensor:
    """Apply a 1x1x1 convolution to channels-last `x` [..., C]."""
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class CausalConv(nn.Module):
    """A 3x3x3 convolution that sees no later frame; before the first frame it sees copies of it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Weights(out_channels, in_channels, 3, 3, 3)

    def pad(self, x: Tensor, chunk: Chunk) -> Tensor:
        """Return `x` [B, T, H, W, C] with the two frames before it: [B, 2 + T, H, W, C]."""
        if chunk.recording:
            before = chunk.tails[self] if self in chunk.tails else x[:, :1].expand(-1, 2, -1, -1, -1)
            padded = torch.cat([before, x], dim=1)
            self._keep_tail(padded, chunk, 2)
            return padded
        padded, inner = chunk.room(x, before=2)
        inner.copy_(x)
        self.fill_halo(padded, chunk, 2)
        return padded

    def fill_halo(self, padded: Tensor, chunk: Chunk, size: int) -> None:
        """Write what surrounds the chunk into `padded`: other processes' rows, then the `size` frames before it.

        Its last frames are kept for the next chunk.
        """
        if chunk.rows is not None:
            chunk.rows.fill_edges(padded[:, size:])
        padded[:, :size] = chunk.tails[self] if self in chunk.tails else padded[:, size : size + 1]
        self._keep_tail(padded, chunk, size)

    def _keep_tail(self, padded: Tensor, chunk: Chunk, size: int) -> None:
        if chunk.is_last:
            chunk.tails.pop(self, None)
        else:
            tail = padded[:, -size:]
            chunk.tails[self] = tail if chunk.recording else tail.clone()

    def forward(self, padded: Tensor, chunk: Chunk, *, onto: Tensor | None = None) -> Tensor:
        """Convolve `padded` [B, 2 + T, H, W, C]; `onto` is added (and overwritten, unless recording)."""
        frames = padded.shape[1] - 2
        weight, bias = self.conv.weight, self.conv.bias
        if frames == 1 and chunk.is_first:
            out = vae_conv.conv_frames(padded[:, 2:], vae_conv.still_kernel(weight), bias, padding=chunk.padding)
        elif chunk.recording:
            out = vae_conv.direct(padded, weight, bias)
        elif padded.device.type == "cpu" and padded.dtype == torch.float32:
            return self._winograd(padded, chunk, onto)
        else:
            out = vae_conv.direct(padded, chunk.kernel(_channels_last, weight), bias, padding=chunk.padding)
        if onto is None:
            return out
        return onto + out if chunk.recording else onto.add_(out)

    def _winograd(self, padded: Tensor, chunk: Chunk, onto: Tensor | None) -> Tensor:
        weight, bias = self.conv.weight, self.conv.bias
        frames = padded.shape[1] - 2
        out = self._room_for(padded, frames, chunk) if onto is None else onto
        odd = frames % 2
        if odd:
            if chunk.is_first:
                first = vae_conv.conv_frames(padded[:, 2:3], vae_conv.still_kernel(weight), bias, padding=chunk.padding)
            else:
                first = vae_conv.direct(padded[:, :3], weight, bias, padding=chunk.padding)
            out[:, :1] = first if onto is None else onto[:, :1] + first
        if frames > odd:
            four = (frames - odd) % 4 == 0
            kernels = chunk.kernel(vae_conv.winograd4_kernels if four else vae_conv.winograd2_kernels, weight)
            run = vae_conv.winograd4 if four else vae_conv.winograd2
            run(padded[:, odd:], kernels, bias, out[:, odd:], add=onto is not None, padding=chunk.padding)
        return out

    def forward_doubled(self, padded: Tensor, chunk: Chunk) -> Tensor:
        """Convolve frames that stand for two equal ones each, `padded` [B, 1 + n, H, W, C], to all T frames."""
        kernels = chunk.kernel(vae_conv.doubled_kernels, self.conv.weight)
        single = int(chunk.is_first and padded.shape[1] % 2 == 0)
        out = self._room_for(padded, 2 * (padded.shape[1] - 1) - single, chunk)
        vae_conv.doubled(padded, kernels, self.conv.bias, out, padding=chunk.padding)
        return out

    def _room_for(self, padded: Tensor, frames: int, chunk: Chunk) -> Tensor:
        """Return a buffer for so many `frames` of the convolution of `padded`."""
        batch, _, height, width, _ = padded.shape
        height += 2 * (chunk.padding[0] - 1)
        return chunk.scratch.take(padded, batch, frames, height, width, len(self.conv.bias))


def _channels_last(weight: Tensor) -> Tensor:
    return weight.contiguous(memory_format=torch.channels_last_3d)


class PointwiseConv(nn.Module):
    """A 1x1x1 convolution under the name the checkpoint gives it."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = Weights(out_channels, in_channels, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Apply to `x` [..., C]."""
        return pointwise(x, self.conv)


class GroupNorm(Weights):
    """Group norm; the statistics span all frames of a chunk."""

    def __init__(self, channels: int, groups: int, eps: float) -> None:
        super().__init__(channels)
        self.groups, self.eps = groups, eps


class SpatialNorm(nn.Module):
    """Group norm whose result is scaled and shifted, place by place, by the latents it decodes."""

    def __init__(self, channels: int, groups: int, latent_channels: int) -> None:
        super().__init__()
        self.norm_layer = GroupNorm(channels, groups, 1e-6)
        self.conv_y = PointwiseConv(latent_channels, channels)
        self.conv_b = PointwiseConv(latent_channels, channels)


def norm_silu_pad(
    norm: GroupNorm | SpatialNorm, x: Tensor, chunk: Chunk, conv: CausalConv, *, is_doubled: bool = False
) -> Tensor:
    """Return SiLU(norm(x)) of `x` [B, T, H, W, C], padded in front for `conv`."""
    core, modulation = norm, None
    if isinstance(norm, SpatialNorm):
        assert chunk.latents is not None
        core, modulation = norm.norm_layer, (norm.conv_y(chunk.latents), norm.conv_b(chunk.latents))
    assert isinstance(core, GroupNorm)
    if chunk.recording:
        images = x.permute(0, 4, 1, 2, 3)  # [B, C, T, H, W]
        normed = F.group_norm(images, core.groups, core.weight, core.bias, core.eps).permute(0, 2, 3, 4, 1)
        return conv.pad(F.silu(normed if modulation is None else modulate(normed, *modulation)), chunk)
    scale, shift = _norm_as_affine(core, x, is_doubled=is_doubled, rows=chunk.rows)
    if modulation is not None:
        scale, shift = scale * modulation[0], shift * modulation[0] + modulation[1]
    halo = 1 if is_doubled else 2
    padded, inner = chunk.room(x, before=halo)
    modulate(x, scale.to(x.dtype), shift.to(x.dtype), out=inner)
    F.silu(inner, inplace=True)
    conv.fill_halo(padded, chunk, halo)
    return padded


def modulate(x: Tensor, scale: Tensor, shift: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return `x` [B, T, H, W, C] * scale + shift, both [B, F, h, w, C], each value covering a box of `x`.

    When T is odd the first frame belongs to the first latent frame alone, as everywhere in this VAE.
    """
    frames = x.shape[1]
    if scale.shape[1] == 1 or frames % 2 == 0:
        return _modulate_boxes(x, scale, shift, out)
    if out is None:
        first = _modulate_boxes(x[:, :1], scale[:, :1], shift[:, :1], None)
        return torch.cat([first, _modulate_boxes(x[:, 1:], scale[:, 1:], shift[:, 1:], None)], dim=1)
    _modulate_boxes(x[:, :1], scale[:, :1], shift[:, :1], out[:, :1])
    _modulate_boxes(x[:, 1:], scale[:, 1:], shift[:, 1:], out[:, 1:])
    return out


def _modulate_boxes(x: Tensor, scale: Tensor, shift: Tensor, out: Tensor | None) -> Tensor:
    """Modulate by boxes; whole rows of W * C stay together, which is what makes it fast."""
    frames, height = scale.shape[1:3]
    scale, shift = (
        s.repeat_interleave(x.shape[3] // s.shape[3], 3)[:, :, None, :, None].flatten(5) for s in (scale, shift)
    )  # [B, F, 1, h, 1, W*C]

    def split(tensor: Tensor) -> Tensor:
        return tensor.flatten(3).unflatten(2, (height, -1)).unflatten(1, (frames, -1))  # [B, F, T/F, h, H/h, W*C]

    result = torch.addcmul(shift, split(x), scale, out=None if out is None else split(out))
    return result.view(x.shape) if out is None else out


def _norm_as_affine(norm: GroupNorm, x: Tensor, *, is_doubled: bool, rows: Rows | None = None) -> tuple[Tensor, Tensor]:
    """Return scale and shift [B, 1, 1, 1, C] that normalise `x` [B, T, H, W, C], at least in float32.

    Mean and variance are those of the group over all frames, and all `rows`: parts are weighed by their size, and the
    spread of their means adds to the mean of their variances (Chan et al. 1979, eq. 2.1).
    """
    if is_doubled and x.shape[1] % 2 == 1:  # the first frame stands for itself, the others for two
        parts, counts = x.split([1, x.shape[1] - 1], dim=1), [1, 2 * (x.shape[1] - 1)]
    else:
        parts, counts = [x], [1]
    found, shares = [_moments(part) for part in parts], [count / sum(counts) for count in counts]
    if rows is not None:
        found, shares = rows.gather_moments(found, shares)
    moments = [[m.unflatten(1, (norm.groups, -1)) for m in part] for part in found]  # [B, G, C/G] each
    means = [share * mean.mean(2, keepdim=True) for share, (mean, _) in zip(shares, moments)]
    group_mean = sum(means[1:], means[0])  # [B, G, 1]
    variances = [
        share * (var + (mean - group_mean).square()).mean(2, keepdim=True)
        for share, (mean, var) in zip(shares, moments)
    ]
    scale = torch.rsqrt(sum(variances[1:], variances[0]) + norm.eps) * norm.weight.unflatten(0, (norm.groups, -1))
    shift = norm.bias.unflatten(0, (norm.groups, -1)) - group_mean * scale  # [B, G, C/G]
    return scale.flatten(1)[:, None, None, None], shift.flatten(1)[:, None, None, None]


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and variance [B, C] of `x` [B, T, H, W, C], at least in float32."""
    if x.dtype in (torch.float16, torch.bfloat16):  # the input's rounding outweighs what E[x^2] - E[x]^2 loses
        mean = x.mean((1, 2, 3), dtype=torch.float32)
        root = torch.linalg.vector_norm(x, dim=(1, 2, 3), dtype=torch.float32)
        return mean, (root.square() / x[0, ..., 0].numel() - mean.square()).clamp_min(0)
    if x.device.type != "cpu":
        var, mean = torch.var_mean(x, dim=(1, 2, 3), correction=0)
        return mean, var
    # The statistics half of batch norm makes two vectorised passes; var_mean is 20 times slower here. Its float32
    # sums run down each column of pixels on its own, and are too short to lose digits.
    columns = x.flatten(3).flatten(1, 2).transpose(1, 2)[..., None]  # [B, W*C, T*H, 1]
    pairs = [torch.batch_norm_update_stats(column, None, None, 0.0) for column in columns.split(1)]
    means, variances = (torch.stack(part).unflatten(1, (x.shape[3], -1)) for part in zip(*pairs))  # [B, W, C]
    mean = means.mean(1)
    return mean, (variances + (means - mean[:, None]).square()).mean(1)
