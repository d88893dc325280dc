"""Geometry of tiles."""

import pytest

from cogvideox_factory.diffusion.tiles import tile_axis
from cogvideox_factory.errors import FactoryError


@pytest.mark.parametrize(
    ("pixels", "factor", "size", "overlap"),
    [(240, 1 / 6, 30, 5), (360, 1 / 5, 45, 9), (64, 0.25, 8, 2), (48, 0.5, 6, 3), (64, 1 / 6, 8, 1), (16, 0.1, 2, 1)],
)
def test_overlap_is_whole_latents(pixels: int, factor: float, size: int, overlap: int) -> None:
    axis = tile_axis(pixels, factor, name="height", scale=8)
    assert (axis.size, axis.overlap, axis.step) == (size, overlap, size - overlap)


@pytest.mark.parametrize(("pixels", "factor", "way_out"), [(100, 0.2, "Use 96"), (8, 0.2, "Use 16"), (64, 0.6, "0.2")])
def test_impossible_tiles_say_what_to_use(pixels: int, factor: float, way_out: str) -> None:
    with pytest.raises(FactoryError, match=way_out):
        tile_axis(pixels, factor, name="width", scale=8)
