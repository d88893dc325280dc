"""Where tokens are, as tensors for one shape of video: rotary tables over the joint stream, and what is added to it.

The tables themselves are numpy and come from `diffusion.positions`; here they go to a device, once a shape.

Legend: S joint tokens (text first), N video tokens, D width, K head size.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from cogvideox_factory.diffusion.positions import position_tables
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.sequence_parallel import Share


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Positions:
    """Positions of one shape of video and text."""

    text_length: int
    num_video_tokens: int
    rotary: tuple[Tensor, Tensor] | None
    """cos and sin, each float32 [S, 1, K / 2], 1 and 0 in text rows; None for a model without rotary positions."""
    added: Tensor | None
    """What is added to the video tokens, [N, D]; None for nothing, or for the model's own buffer (`learned`)."""
    learned: bool
    """Whether the model adds its learned buffer."""

    def rotary_of(self, share: Share) -> tuple[Tensor, Tensor] | None:
        """Return the rows of `rotary` that one rank holds; those that fill up the last rank's are not rotated."""
        if self.rotary is None:
            return None
        cos, sin = (share.cut(table, dim=0) for table in self.rotary)
        return share.fill(cos, dim=0, value=1), share.fill(sin, dim=0)


@lru_cache(maxsize=16)
def make_positions(
    config: TransformerConfig,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    text_length: int,
    device: torch.device | str,
    dtype: torch.dtype,
) -> Positions:
    """Return the positions of one video of that size, behind `text_length` text tokens.

    Frames count front padding. `dtype` is that of the model; rotary tables stay float32. The last 16 shapes are kept.

    Raises:
        FactoryError: a size the checkpoint has no positions for, or a text length it cannot take.
    """
    tables = position_tables(config, latent_frames, latent_height, latent_width, text_length)
    # Kept tables outlive the block they were made in: an inference tensor would be refused by the next training step.
    with torch.inference_mode(False):
        return Positions(
            text_length=tables.text_length,
            num_video_tokens=tables.num_video_tokens,
            rotary=None
            if tables.rotary is None
            else (to_tensor(tables.rotary[0], device), to_tensor(tables.rotary[1], device)),
            added=None if tables.added is None else to_tensor(tables.added, device, dtype),
            learned=tables.learned,
        )
