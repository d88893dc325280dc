"""Where a video token is: rotary tables of both kinds, the 3-D sin-cos table, and which of them a model adds.

Tokens run frame by frame, row by row. A rotary table covers the video tokens only (text gets no rotation)
and is *pairwise*: channels 2i and 2i + 1 of a head rotate by the angle in column i, so a table has head_dim
/ 2 columns: the first quarter of the head for time, the rest half for height and half for width.

- CogVideoX 1.0 ("linspace"): the H x W grid is stretched over the region of the checkpoint's own grid that
  it would fill after resize and centre crop.
- CogVideoX1.5 ("slice"): integer positions, so a grid larger than the checkpoint's own is outside what it
  has seen.

Angles are rounded to float32 on the way, because that is what the checkpoints were trained with (position
80 in float64 differs from it in the sixth digit); sines and cosines are then taken in float64.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, TEMPORAL_COMPRESSION
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import TransformerConfig

_THETA = 10_000


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PositionTables:
    """Positions of one shape of video and text: S joint tokens, text first, N of them the video's."""

    text_length: int
    num_video_tokens: int
    rotary: tuple[np.ndarray, np.ndarray] | None
    """cos and sin, each float32 [S, 1, head_dim / 2], 1 and 0 in text rows; None for a model without."""
    added: np.ndarray | None
    """What is added to the video tokens, float32 [N, width]; None for nothing, or for the model's own buffer."""
    learned: bool
    """Whether the model adds its learned buffer."""


def position_tables(
    config: TransformerConfig, latent_frames: int, latent_height: int, latent_width: int, text_length: int
) -> PositionTables:
    """Return the positions of one video of that size, behind `text_length` text tokens. Frames count front padding.

    Raises:
        FactoryError: a size the checkpoint has no positions for, or a text length it cannot take.
    """
    if not 0 <= text_length <= config.max_text_seq_length:
        raise FactoryError(
            f"{text_length} text tokens; this checkpoint takes at most {config.max_text_seq_length}. "
            f"Set --text.max-sequence-length {config.max_text_seq_length}."
        )
    shape = (config, latent_frames, latent_height, latent_width)
    how = added_positions(*shape)
    if how != "none" and text_length != config.max_text_seq_length:
        raise FactoryError(
            f"{text_length} text tokens; this checkpoint adds a position table made for exactly "
            f"{config.max_text_seq_length}. Set --text.max-sequence-length {config.max_text_seq_length}."
        )
    frames, height, width = token_grid(*shape)
    rotary = None
    if config.use_rotary_positional_embeddings:
        cos, sin = rotary_table(*shape)
        rotary = _with_text(cos, text_length, 1), _with_text(sin, text_length, 0)
    return PositionTables(
        text_length=text_length,
        num_video_tokens=frames * height * width,
        rotary=rotary,
        added=sincos_table(*shape) if how == "sincos" else None,
        learned=how == "learned",
    )


def _with_text(table: np.ndarray, text_length: int, value: float) -> np.ndarray:
    """Put rows of `value` for the text tokens before `table` [N, K / 2]: [S, 1, K / 2]."""
    text = np.full((text_length, table.shape[1]), value, dtype=table.dtype)
    return np.concatenate([text, table])[:, None]


def token_grid(
    config: TransformerConfig, latent_frames: int, latent_height: int, latent_width: int
) -> tuple[int, int, int]:
    """Return how many tokens a video has along (time, height, width).

    Raises:
        FactoryError: a latent size the patches do not divide.
    """
    patch = config.patch_size
    if latent_height % patch or latent_width % patch or min(latent_height, latent_width) < patch:
        pixels = patch * SPATIAL_COMPRESSION
        raise FactoryError(
            f"latent size {latent_height}x{latent_width} (video {latent_height * SPATIAL_COMPRESSION}x"
            f"{latent_width * SPATIAL_COMPRESSION}) cannot be cut into {patch}x{patch} patches. "
            f"Height and width of the video must be multiples of {pixels}."
        )
    assert latent_frames >= 1
    return -(-latent_frames // (config.patch_size_t or 1)), latent_height // patch, latent_width // patch


def rotary_table(
    config: TransformerConfig, latent_frames: int, latent_height: int, latent_width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return (cos, sin), each float32 `[N, head_dim / 2]`, for the N video tokens.

    `latent_frames` counts the front padding of CogVideoX1.5.

    Raises:
        FactoryError: a size the patches do not divide, or (1.5) larger than the checkpoint's own.
    """
    frames, height, width = token_grid(config, latent_frames, latent_height, latent_width)
    base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
    if config.patch_size_t is None:
        rows, columns = _stretched(height, width, base)
    else:
        _check_within(config, height, width, base)
        rows, columns = np.arange(height, dtype=np.float32), np.arange(width, dtype=np.float32)

    dim = config.attention_head_dim
    angles = _broadcast(
        _angles(np.arange(frames, dtype=np.float32), dim // 4),
        _angles(rows, dim // 8 * 3),
        _angles(columns, dim // 8 * 3),
    ).astype(np.float64)
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def sincos_table(config: TransformerConfig, latent_frames: int, latent_height: int, latent_width: int) -> np.ndarray:
    """Return the sin-cos embedding added to the N video tokens of CogVideoX-2B, float32 `[N, width]`.

    A quarter of the channels for time, then 3/8 for *width*, then 3/8 for height; within each, sines before
    cosines. Text tokens get zeros. Works at any size; positions are divided by the config's interpolation
    scales.

    Raises:
        FactoryError: a size the patches do not divide.
    """
    frames, height, width = token_grid(config, latent_frames, latent_height, latent_width)
    spatial, temporal = config.spatial_interpolation_scale, config.temporal_interpolation_scale
    dim = config.width
    over_time = _sincos(frames, temporal, dim // 4)
    over_height = _sincos(height, spatial, dim * 3 // 8)
    over_width = _sincos(width, spatial, dim * 3 // 8)
    table = _broadcast(over_time, over_height, over_width)  # [N, time | height | width]
    quarter, rest = dim // 4, dim * 3 // 8
    return np.concatenate(
        [table[:, :quarter], table[:, quarter + rest :], table[:, quarter : quarter + rest]], axis=1
    ).astype(np.float32)


def added_positions(
    config: TransformerConfig, latent_frames: int, latent_height: int, latent_width: int
) -> Literal["none", "sincos", "learned"]:
    """Say what is *added* to the tokens: nothing, `sincos_table`, or the checkpoint's own buffer.

    "learned" is CogVideoX-5B-I2V: its buffer `patch_embed.pos_embedding` `[1, text + N, width]` (text rows
    included, text padded to `max_text_seq_length`) fits one grid only. With another frame count at the same
    height and width the model is fed the plain sin-cos table instead, as the published pipeline does;
    another height or width has no answer. Whoever wants to go on without the buffer clears
    `use_learned_positional_embeddings` in the config.

    Raises:
        FactoryError: learned positions at another height or width than the checkpoint's.
    """
    if not config.use_learned_positional_embeddings:
        return "none" if config.use_rotary_positional_embeddings else "sincos"
    if (latent_height, latent_width) != (config.sample_height, config.sample_width):
        size = SPATIAL_COMPRESSION
        raise FactoryError(
            f"size {latent_height * size}x{latent_width * size} (height x width): this checkpoint has "
            f"learned positions (CogVideoX-5B-I2V) that exist only at {config.sample_height * size}x"
            f"{config.sample_width * size}. Use that size, ignore the learned positions, or "
            "use CogVideoX1.5-5B-I2V."
        )
    native = (config.sample_frames - 1) // TEMPORAL_COMPRESSION + 1
    return "learned" if latent_frames == native else "sincos"


def _stretched(height: int, width: int, base: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return row and column coordinates of a grid laid over its crop region of the base grid."""
    base_height, base_width = base
    if height / width > base_height / base_width:
        region = base_height, round(base_height / height * width)
    else:
        region = round(base_width / width * height), base_width

    def spread(count: int, size: int, whole: int) -> np.ndarray:
        start = round((whole - size) / 2)
        # The published formula scales the *end coordinate* by (count - 1) / count, crop offset included, and
        # takes a float32 step from both ends; at the checkpoint's own size all that is exact: 0, 1, 2, ...
        first, last = np.float32(start), np.float32((start + size) * (count - 1) / count)
        step = np.float64((last - first) / np.float32(max(count - 1, 1)))
        index = np.arange(count)
        both_ends = np.where(index < max(count // 2, 1), first + step * index, last - step * index[::-1])
        return both_ends.astype(np.float32)

    return spread(height, region[0], base_height), spread(width, region[1], base_width)


def _check_within(config: TransformerConfig, height: int, width: int, base: tuple[int, int]) -> None:
    if height <= base[0] and width <= base[1]:
        return
    pixels = config.patch_size * SPATIAL_COMPRESSION
    raise FactoryError(
        f"size {height * pixels}x{width * pixels} (height x width) is a grid of {height}x{width} tokens; "
        f"this checkpoint's positions end at {base[0]}x{base[1]} (sample_height={config.sample_height}, "
        f"sample_width={config.sample_width}). Use at most {base[0] * pixels}x{base[1] * pixels}."
    )


def _angles(positions: np.ndarray, dim: int) -> np.ndarray:
    """Return float32 [positions, dim / 2] of position x frequency (Su et al., RoFormer, section 3.2.2)."""
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = np.float32(1) / np.power(np.float64(_THETA), exponents).astype(np.float32)
    return np.outer(positions, frequencies)


def _sincos(count: int, scale: float, dim: int) -> np.ndarray:
    """Return float64 [count, dim] of the 1-D embedding at 0, 1 / scale, 2 / scale, ..."""
    positions = np.arange(count, dtype=np.float32) / np.float32(scale)
    frequencies = 1 / _THETA ** (np.arange(dim // 2) / (dim / 2))
    angles = np.outer(positions.astype(np.float64), frequencies)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _broadcast(time: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return [F * H * W, channels of all three side by side] from [F, a], [H, b], [W, c]."""
    grid = (len(time), len(rows), len(columns))
    parts = (time[:, None, None], rows[None, :, None], columns[None, None, :])
    joined = np.concatenate([np.broadcast_to(part, (*grid, part.shape[-1])) for part in parts], axis=-1)
    return joined.reshape(-1, joined.shape[-1])
