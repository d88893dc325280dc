"""The blending of the seams of tiles."""

import pytest
import torch

from cogvideox_factory.diffusion.tiles import TileAxis
from cogvideox_factory.torch_engine.vae_tiling import run_tiled


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
