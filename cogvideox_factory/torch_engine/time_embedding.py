"""Time (and ofs) as the norms of the transformer come to know it.

All that depends on time alone can be told before a video is begun: `Instant` is that of one step, for every block and
for both halves of guidance.

Legend: B batch, D width, N layers.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.linear import Linear


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Instant:
    """What one time, or the times of B samples, say to every adaptive norm."""

    blocks: tuple[Tensor, ...]
    """`block.VECTORS_PER_BLOCK` for each block, each [D], or [B, 1, D] where samples have times of their own."""
    output: tuple[Tensor, Tensor]
    """Shift and scale of the last norm, each [1, 1, D] or [B, 1, D]."""


class TimeEmbedding(nn.Module):
    """Two Linears with SiLU between."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, out_features)
        self.linear_2 = Linear(out_features, out_features)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in] to [B, out]."""
        return self.linear_2(F.silu(self.linear_1(x)))


def sinusoids(values: Tensor, dim: int, config: TransformerConfig) -> Tensor:
    """Return sines and cosines of `values` [B] at `dim` / 2 frequencies from 1 down to 1 / 10,000: float32 [B, dim]."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float32, device=values.device) / (half - config.freq_shift)
    angles = values[:, None].float() * torch.exp(exponents * -math.log(10_000))  # [B, dim / 2]
    parts = (angles.cos(), angles.sin()) if config.flip_sin_to_cos else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)
