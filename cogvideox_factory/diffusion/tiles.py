"""Where the VAE cuts a large picture into tiles, in latents.

Tiles overlap; where two meet, a linear ramp leads from the earlier to the later one. They run in row-major order.
"""

from dataclasses import dataclass
from itertools import product

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import VaeConfig

ROW_OVERLAP, COLUMN_OVERLAP = 1 / 6, 1 / 5
"""Parts of a tile's height and width that it shares with the next one, as in diffusers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TileAxis:
    """Tile size and overlap along height or width, in latents."""

    size: int
    overlap: int

    @property
    def step(self) -> int:
        """Distance between the starts of two tiles."""
        return self.size - self.overlap


def tile_axes(
    config: VaeConfig,
    height: int | None = None,
    width: int | None = None,
    height_overlap: float | None = None,
    width_overlap: float | None = None,
) -> tuple[TileAxis, TileAxis]:
    """Return the tiling of rows and of columns; sizes in pixels, overlaps as fractions of a tile.

    Defaults are diffusers': half of the config's sample size, sharing 1/6 of its height and 1/5 of its width.

    Raises:
        FactoryError: as `tile_axis`.
    """
    scale = config.spatial_scale
    height = height or max(2, config.sample_height // (2 * scale)) * scale
    width = width or max(2, config.sample_width // (2 * scale)) * scale
    rows = tile_axis(height, height_overlap or ROW_OVERLAP, name="height", scale=scale)
    return rows, tile_axis(width, width_overlap or COLUMN_OVERLAP, name="width", scale=scale)


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


def tile_corners(height: int, width: int, rows: TileAxis, columns: TileAxis) -> list[tuple[int, int]]:
    """Return (top, left) of every tile of a picture of `height` x `width` latents, in the order they are coded."""
    return list(product(range(0, height, rows.step), range(0, width, columns.step)))
