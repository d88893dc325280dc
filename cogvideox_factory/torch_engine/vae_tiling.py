"""Tiles of a frame that the VAE codes one by one, and the blending of their seams.

Tiles overlap; where two meet, a linear ramp leads from the earlier to the later one. Tiles run in row-major order and
each is blended with its upper and then its left neighbour as those came out of their own blending, so of a finished
tile only its last rows and columns need to be kept.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from cogvideox_factory.diffusion.tiles import TileAxis, tile_corners

# Legend: B batch, F frames, C channels, H W height and width; tiles are [B, C, F, H, W].


def run_tiled(
    code_each: Callable[[list[Tensor]], Iterator[Tensor]],
    video: Tensor,
    out: Tensor,
    rows: TileAxis,
    columns: TileAxis,
    *,
    in_scale: int,
    out_scale: int,
) -> None:
    """Fill `out` [B, C', F', H', W'] with the coded tiles of `video` [B, C, F, H, W].

    `code_each` codes a list of tiles and yields them one by one, in order. `in_scale` and `out_scale` are the pixels a
    latent covers on either side: 8 or 1.
    """
    height, width = (size // in_scale for size in video.shape[3:])
    corners = tile_corners(height, width, rows, columns)
    tiles = [_cut(video, top, rows.size, left, columns.size, in_scale) for top, left in corners]
    above: dict[int, Tensor] = {}
    left_edge = None
    for (top, left), tile in zip(corners, code_each(tiles), strict=True):
        if top > 0:
            tile = _blend(above[left], tile, dim=3)
        if left > 0:
            assert left_edge is not None
            tile = _blend(left_edge, tile, dim=4)
        above[left] = tile[:, :, :, -rows.overlap * out_scale :].clone()
        left_edge = tile[..., -columns.overlap * out_scale :].clone()
        target = _cut(out, top, rows.step, left, columns.step, out_scale)
        target.copy_(tile[:, :, :, : target.shape[3], : target.shape[4]])


def _cut(video: Tensor, top: int, height: int, left: int, width: int, scale: int) -> Tensor:
    return video[..., top * scale : (top + height) * scale, left * scale : (left + width) * scale]


def _blend(before: Tensor, tile: Tensor, *, dim: int) -> Tensor:
    """Lead from `before`, the last rows (columns) of the earlier tile, over to the first of `tile`."""
    extent = min(before.shape[dim], tile.shape[dim])
    shape = [1] * tile.ndim
    shape[dim] = extent
    ramp = (torch.arange(extent, device=tile.device) / extent).to(tile.dtype).view(shape)
    edge = tile.narrow(dim, 0, extent)
    before = before.narrow(dim, before.shape[dim] - extent, extent)
    edge.copy_(torch.lerp(before, edge, ramp))
    return tile
