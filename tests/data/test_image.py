import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from cogvideox_factory.data.export import write_png
from cogvideox_factory.data.image import exif_orientation, read_image
from cogvideox_factory.errors import DataError


def quarters(height=64, width=96) -> np.ndarray:
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2] = (220, 20, 20)
    picture[: height // 2, width // 2 :] = (20, 220, 20)
    picture[height // 2 :, : width // 2] = (20, 20, 220)
    picture[height // 2 :, width // 2 :] = (220, 220, 220)
    return picture


def corners(pixels: np.ndarray) -> str:
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    return "".join(names[tuple((pixels[y, x] > 120).astype(int).tolist())] for y in (4, -5) for x in (4, -5))


def encode(codec: str, pix_fmt: str, picture: np.ndarray) -> bytes:
    context = av.CodecContext.create(codec, "w")
    context.height, context.width = picture.shape[:2]
    context.pix_fmt, context.time_base = pix_fmt, Fraction(1)
    frame = av.VideoFrame.from_ndarray(picture, format="rgb24" if picture.shape[2] == 3 else "rgba")
    frame = frame.reformat(format=pix_fmt)
    return b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)])


@pytest.mark.parametrize(
    ("codec", "pix_fmt"),
    [("png", "rgb24"), ("mjpeg", "yuvj420p"), ("libwebp", "yuv420p"), ("bmp", "bgr24")],
)
def test_formats(tmp_path, codec, pix_fmt):
    path = tmp_path / "picture"  # the name tells nothing, the bytes do
    path.write_bytes(encode(codec, pix_fmt, quarters()))
    pixels = read_image(path, 32, 48)
    assert pixels.shape == (32, 48, 3)
    assert pixels.dtype == np.uint8
    assert corners(pixels) == "rgbw"


@pytest.mark.parametrize("order", [">", "<"])
@pytest.mark.parametrize(
    ("tag", "shown"),
    [(1, "rgbw"), (2, "grwb"), (3, "wbgr"), (4, "bwrg"), (5, "rbgw"), (6, "brwg"), (7, "wgbr"), (8, "gwrb")],
)
def test_exif_orientation_is_applied(tmp_path, tag, shown, order):
    data = encode("mjpeg", "yuvj420p", quarters())
    mark = b"MM" if order == ">" else b"II"
    tiff = mark + struct.pack(order + "HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, tag, 0, 0)
    body = b"Exif\0\0" + tiff
    data = data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:]
    assert exif_orientation(data) == tag
    (tmp_path / "x.jpg").write_bytes(data)
    size = (64, 96) if tag < 5 else (96, 64)
    assert corners(read_image(tmp_path / "x.jpg", *size)) == shown


@pytest.mark.parametrize("cut", [0, 1, 5, 12, 20, 30])
def test_broken_exif_is_ignored(cut):
    data = b"\xff\xd8\xff\xe1\x00\x20Exif\0\0MM\x00*\x00\x00\x00\x08\x00\x01"
    assert exif_orientation(data[:cut]) is None
    assert exif_orientation(data) is None


def test_cover_and_crop(tmp_path):
    path = write_png(tmp_path / "x.png", quarters(64, 64))
    assert corners(read_image(path, 32, 64)) == "rgbw"
    assert corners(read_image(path, 32, 64, crop="stretch")) == "rgbw"


def test_transparent_parts_are_black(tmp_path):
    picture = np.full((16, 16, 4), 200, np.uint8)
    picture[:8, :, 3], picture[8:, :, 3] = 255, 0
    (tmp_path / "x.png").write_bytes(encode("png", "rgba", picture))
    pixels = read_image(tmp_path / "x.png", 16, 16)
    assert pixels[:8].min() >= 199
    assert pixels[8:].max() == 0


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n1234"])
def test_no_picture(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.png"):
        read_image(tmp_path / "x.png", 16, 16)


def test_missing_and_cut_pictures(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_image(tmp_path / "nowhere.png", 16, 16)
    path = write_png(tmp_path / "x.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(DataError):
        read_image(path, 16, 16)
