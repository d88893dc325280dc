"""Geometry of tiles and the blending of their seams."""

import pytest
import torch

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.torch_engine.vae_tiling import TileAxis, run_tiled, tile_axis


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


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 22), (20, 9), (5, 40)])
@pytest.mark.parametrize("scales", [(8, 1), (1, 8)])
def test_tiles_of_a_constant_map_join_without_a_trace(height: int, width: int, scales: tuple[int, int]) -> None:
    """With a code that only changes the size, the seams vanish whatever the tiles are."""
    in_scale, out_scale = scales
    image = torch.rand(1, 2, 1, height, width, dtype=torch.float64)
    video = image.repeat_interleave(in_scale, 3).repeat_interleave(in_scale, 4)

    def code(tile: torch.Tensor) -> torch.Tensor:
        small = tile[..., ::in_scale, ::in_scale]
        return small.repeat_interleave(out_scale, 3).repeat_interleave(out_scale, 4)

    out = torch.full((1, 2, 1, height * out_scale, width * out_scale), torch.nan, dtype=torch.float64)
    rows, columns = TileAxis(size=6, overlap=2), TileAxis(size=8, overlap=3)
    run_tiled(lambda tiles: map(code, tiles), video, out, rows, columns, in_scale=in_scale, out_scale=out_scale)
    torch.testing.assert_close(out, code(video))
