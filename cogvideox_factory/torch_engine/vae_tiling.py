"""Tiles of a frame that the VAE codes one by one, and the blending of their seams.

Tiles overlap; where two meet, a linear ramp leads from the earlier to the later one. Tiles run in row-major order and
each is blended with its upper and then its left neighbour as those came out of their own blending, so of a finished
tile only its last rows and columns need to be kept.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from cogvideox_factory.errors import FactoryError

# Legend: B batch, F frames, C channels, H W height and width; tiles are [B, C, F, H, W].


@dataclass(frozen=True, kw_only=True, slots=True)
class TileAxis:
    """Tile size and overlap along height or width, in latents."""

    size: int
    overlap: int

    @property
    def step(self) -> int:
        """Distance between the starts of two tiles."""
        return self.size - self.overlap


def tile_axis(pixels: int, overlap_factor: float, *, name: str, scale: int) -> TileAxis:
    """Return the tiling for tiles of `pixels` that share `overlap_factor` of their size with the next one.

    The overlap is cut to whole latents of `scale` pixels, at least one. Where it is whole from the start (as with
    every published model's default) this is diffusers' tiling; where not, diffusers' output has the wrong size.

    Raises:
        FactoryError: a tile that is no multiple of `scale`, or an overlap of more than half.
    """
    if pixels % scale or pixels < 2 * scale:
        nearest = max(2, round(pixels / scale)) * scale
        raise FactoryError(
            f"tile_sample_min_{name}={pixels} is no multiple of {scale} from {2 * scale} on; "
            f"one latent covers {scale} pixels. Use {nearest}."
        )
    if not 0 < overlap_factor <= 0.5:
        raise FactoryError(
            f"tile_overlap_factor_{name}={overlap_factor}: a tile shares more than 0 and at most half (0.5) of itself "
            "with the next one. Use about 0.2."
        )
    size = pixels // scale
    return TileAxis(size=size, overlap=max(1, int(size * overlap_factor + 1e-6)))


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
    corners = list(product(range(0, height, rows.step), range(0, width, columns.step)))
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
