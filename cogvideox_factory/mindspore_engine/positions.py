"""Where tokens are, as tensors for one shape of video; the tables are numpy and come from `diffusion.positions`.

Legend: S joint tokens (text first), N video tokens, D width, K head size.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from mindspore import Tensor

from cogvideox_factory.diffusion.positions import position_tables
from cogvideox_factory.mindspore_engine.border import to_tensor
from cogvideox_factory.models import TransformerConfig


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Positions:
    """Positions of one shape of video and text."""

    text_length: int
    num_video_tokens: int
    cos: Tensor | None
    """float32 [S, 1, K / 2], 1 in text rows; None for a model without rotary positions."""
    sin: Tensor | None
    """As `cos`, 0 in text rows."""
    added: Tensor | None
    """What is added to the video tokens, [N, D]; None for nothing, or for the model's own buffer where it has one."""


@lru_cache(maxsize=16)
def make_positions(
    config: TransformerConfig,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    text_length: int,
    dtype: Any,
) -> Positions:
    """Return the positions of one video of that size, behind `text_length` text tokens.

    Frames count front padding. `dtype` is that of the model; rotary tables stay float32. The last 16 shapes are kept.

    Raises:
        FactoryError: a size the checkpoint has no positions for, or a text length it cannot take.
    """
    tables = position_tables(config, latent_frames, latent_height, latent_width, text_length)
    cos, sin = (None, None) if tables.rotary is None else map(to_tensor, tables.rotary)
    return Positions(
        text_length=tables.text_length,
        num_video_tokens=tables.num_video_tokens,
        cos=cos,
        sin=sin,
        added=None if tables.added is None else to_tensor(tables.added, dtype),
    )
