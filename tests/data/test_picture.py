import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.picture import encode_jpeg, to_uint8, write_png


def smooth(height=48, width=72) -> np.ndarray:
    y, x = np.meshgrid(np.linspace(0, 1, height), np.linspace(0, 1, width), indexing="ij")
    return (np.stack([x, y, x / 2], -1) * 200 + 20).astype(np.uint8)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_png_round_trip_is_exact(tmp_path_factory, height, width, seed):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    path = write_png(tmp_path_factory.mktemp("p") / "x.png", pixels)
    assert (read_image(path, height, width) == pixels).all()


def test_floats_round_to_the_nearest_level():
    levels = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    assert (to_uint8(levels / 255) == levels).all()


def test_a_jpeg_shows_the_same_picture_small(tmp_path):
    drawn = smooth()
    data = encode_jpeg(drawn)
    (tmp_path / "x.jpg").write_bytes(data)
    back = read_image(tmp_path / "x.jpg", 48, 72).astype(int)
    assert len(data) < 2000
    assert abs(back - drawn).mean() < 3
    assert abs((back - drawn).mean(axis=(0, 1))).max() < 1.5  # no tint
