"""Tiles of a frame that the VAE codes one by one, and the blending of their seams; `diffusion.tiles` places them.

Each tile is blended with its upper and then its left neighbour as those came out of their own blending, so of a
finished tile only its last rows and columns need to be kept.
"""

from collections.abc import Callable

import numpy as np
from mindspore import Tensor, ops

from cogvideox_factory.diffusion.tiles import TileAxis, tile_corners

# Legend: B batch, F frames, C channels, H W height and width; tiles are [B, C, F, H, W].


def run_tiled(
    code: Callable[[Tensor], Tensor],
    video: Tensor,
    rows: TileAxis,
    columns: TileAxis,
    *,
    in_scale: int,
    out_scale: int,
) -> Tensor:
    """Return [B, C', F', H', W'], the joined tiles of `video` [B, C, F, H, W] that `code` coded one by one.

    `in_scale` and `out_scale` are the pixels a latent covers on either side: 8 or 1.
    """
    height, width = (size // in_scale for size in video.shape[3:])
    above: dict[int, Tensor] = {}
    left_edge = None
    lines: list[list[Tensor]] = []
    for top, left in tile_corners(height, width, rows, columns):
        down, right = (top + rows.size) * in_scale, (left + columns.size) * in_scale
        tile = code(video[:, :, :, top * in_scale : down, left * in_scale : right])
        if top > 0:
            tile = _blend(above[left], tile, axis=3)
        if left > 0:
            assert left_edge is not None
            tile = _blend(left_edge, tile, axis=4)
        else:
            lines.append([])
        above[left] = tile[:, :, :, -rows.overlap * out_scale :]
        left_edge = tile[:, :, :, :, -columns.overlap * out_scale :]
        lines[-1].append(tile[:, :, :, : rows.step * out_scale, : columns.step * out_scale])
    return ops.concat([ops.concat(line, axis=4) for line in lines], axis=3)


def _blend(before: Tensor, tile: Tensor, *, axis: int) -> Tensor:
    """Lead from `before`, the last rows (columns) of the earlier tile, over to the first of `tile`."""
    extent = min(before.shape[axis], tile.shape[axis])
    ramp = Tensor((np.arange(extent) / extent).astype(np.float32)).astype(tile.dtype)
    if axis == 3:
        ramp = ramp[:, None]
        before, edge, rest = before[:, :, :, -extent:], tile[:, :, :, :extent], tile[:, :, :, extent:]
    else:
        before, edge, rest = before[..., -extent:], tile[..., :extent], tile[..., extent:]
    mixed = before + (edge - before) * ramp
    return mixed if rest.shape[axis] == 0 else ops.concat((mixed, rest), axis=axis)
