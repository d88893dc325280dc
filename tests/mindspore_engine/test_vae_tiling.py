"""The blending of the seams of tiles."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.diffusion.tiles import TileAxis
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.vae_tiling import run_tiled


@pytest.mark.parametrize(("height", "width"), [(8, 8), (13, 22), (20, 9), (5, 40)])
@pytest.mark.parametrize("scales", [(8, 1), (1, 8)])
def test_tiles_of_a_map_join_without_a_trace(height, width, scales):
    """With a code that only changes the size, the seams vanish whatever the tiles are."""
    in_scale, out_scale = scales
    image = draws.normal(0, "tiles", shape=(1, 2, 1, height, width))

    def enlarged(x, scale):
        return x.repeat(scale, axis=3).repeat(scale, axis=4)

    def code(tile):
        return to_tensor(enlarged(to_array(tile)[..., ::in_scale, ::in_scale], out_scale))

    video, rows, columns = (
        to_tensor(enlarged(image, in_scale)),
        TileAxis(size=6, overlap=2),
        TileAxis(size=8, overlap=3),
    )
    out = run_tiled(code, video, rows, columns, in_scale=in_scale, out_scale=out_scale)
    np.testing.assert_allclose(to_array(out), enlarged(image, out_scale), rtol=0, atol=1e-6)
