"""`cpu.vae.decode` and `cpu.vae.encode`: the VAE against diffusers' AutoencoderKLCogVideoX.

A small one, channels (32, 64, 64, 128), 5 latents of 20x24 and 17 frames of 160x192, float32.
"""

from dataclasses import replace

import torch
from diffusers import AutoencoderKLCogVideoX

from benchmarks.interleave import Ratio, interleave
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.torch_engine.vae import CogVideoXVAE


def run() -> list[Ratio]:
    """Return both ratios; results are compared first."""
    config = replace(VaeConfig(), block_out_channels=(32, 64, 64, 128))
    torch.manual_seed(0)
    theirs = AutoencoderKLCogVideoX.from_config(config.to_dict()).eval()
    ours = CogVideoXVAE(config)
    ours.load_arrays((name, value.numpy()) for name, value in theirs.state_dict().items())
    ours.requires_grad_(False)
    latents, pixels = torch.randn(1, 5, 16, 20, 24), torch.rand(1, 3, 17, 160, 192) * 2 - 1

    @torch.no_grad()
    def their_decode() -> torch.Tensor:
        return theirs.decode(latents.transpose(1, 2)).sample

    @torch.no_grad()
    def their_encode() -> torch.Tensor:
        return theirs.encode(pixels).latent_dist.mean.transpose(1, 2)

    pairs = (
        ("cpu.vae.decode", their_decode, lambda: ours.decode(latents), 1.3),
        ("cpu.vae.encode", their_encode, lambda: ours.encode(pixels)[0], 1.1),
    )
    ratios = []
    for name, baseline, candidate, target in pairs:
        error = (baseline() - candidate()).abs().max().item()
        assert error < 1e-4, f"{name}: results differ by {error:.1e}"
        ratios.append(interleave(name, baseline, candidate, target=target, num_rounds=7, note="f32"))
    return ratios
