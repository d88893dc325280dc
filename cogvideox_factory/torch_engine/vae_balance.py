"""Latent channels mixed linearly, so that no direction of a latent drowns in another; pictures stay as they are.

A VAE is free to write most of its variance into a few directions (a background, say, that is the same everywhere) and
what matters into faint ones. A diffusion model then sees the faint ones only under the least noise and learns them
last. Here the latents are multiplied with a matrix on the way out of the encoder and with its inverse on the way into
the decoder, both inside the weights.

F latent frames, C latent channels, h w latent height and width.
"""

from dataclasses import replace

import torch
from torch import Tensor

from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.vae_layers import SpatialNorm


@torch.no_grad()
def balance_latents(vae: CogVideoXVAE, latents: Tensor, *, power: float) -> Tensor:
    """Mix the latent channels of `vae` in place and return the matrix M [C, C] it did so with.

    A latent x becomes x M. With S = U diag(w) U^T the second moments of `latents`, M is U diag(w^(-power / 2)) U^T,
    times the number that gives the result unit variance: the identity (but for that number) at power 0, and at 1 the
    whitening that changes latents least (Kessy et al., arXiv 1512.00809, ZCA). The second moment w of each direction
    becomes w^(1 - power), times a number. `scaling_factor` becomes 1.

    The posterior's variances cannot be mixed like means and stay independent; they are scaled by the columns of M as if
    all channels had the same.

    Args:
        latents: posterior means [N, F, C, h, w] of clips as the VAE will see them.
        power: 0 to 1.
    """
    assert 0 <= power <= 1, power
    samples = latents.movedim(2, -1).flatten(0, -2).double()  # [N F h w, C]
    spread, axes = torch.linalg.eigh(samples.T @ samples / len(samples))
    spread = spread.clamp(min=1e-8 * float(spread.max()))
    mixed = (axes * spread ** (-power / 2)) @ axes.T
    mixed /= (samples @ mixed).std()
    _mix_out(vae, mixed)
    _mix_in(vae, torch.linalg.inv(mixed))
    vae.config = replace(vae.config, scaling_factor=1.0)
    return mixed


def _mix_out(vae: CogVideoXVAE, matrix: Tensor) -> None:
    layer = vae.encoder.conv_out.conv if vae.quant_conv is None else vae.quant_conv
    channels = len(matrix)
    for parameter in (layer.weight, layer.bias):
        parameter[:channels] = torch.einsum("cd,c...->d...", matrix, parameter[:channels].double()).to(parameter.dtype)
    layer.bias[channels:] += matrix.square().sum(0).log().to(layer.bias.dtype)


def _mix_in(vae: CogVideoXVAE, inverse: Tensor) -> None:
    readers = [vae.decoder.conv_in.conv] if vae.post_quant_conv is None else [vae.post_quant_conv]
    if vae.post_quant_conv is None:
        for norm in vae.decoder.modules():
            readers += [norm.conv_y.conv, norm.conv_b.conv] if isinstance(norm, SpatialNorm) else []
    for layer in readers:
        weight = layer.weight
        weight.copy_(torch.einsum("dc,oc...->od...", inverse, weight.double()).to(weight.dtype))
