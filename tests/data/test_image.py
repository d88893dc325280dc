import struct
from fractions import Fraction

import av
import numpy as np
import pytest

from cogvideox_factory.data.image import exif_orientation, is_picture, probe_picture, read_image
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
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


@pytest.mark.parametrize(
    ("codec", "pix_fmt"), [("png", "rgb24"), ("mjpeg", "yuvj420p"), ("libwebp", "yuv420p"), ("png", "rgba")]
)
def test_a_picture_is_known_by_its_bytes_and_described_upright(tmp_path, codec, pix_fmt):
    picture = quarters()
    if pix_fmt == "rgba":
        picture = np.concatenate([picture, np.full((64, 96, 1), 255, np.uint8)], axis=2)
    path = tmp_path / "named.mp4"
    path.write_bytes(encode(codec, pix_fmt, picture))
    assert is_picture(path)
    info = probe_picture(path)
    assert (info.num_frames, info.width, info.height, info.still) == (1, 96, 64, True)
    assert info.has_alpha is (pix_fmt == "rgba")


def test_what_is_no_picture_is_not_taken_for_one(tmp_path, make_video):
    assert not is_picture(make_video(tmp_path / "a.mp4", 2))
    assert not is_picture(make_video(tmp_path / "a.avi", 2, codec="mpeg4"))  # RIFF like WebP
    for content in (b"", b"\x89PNG", b"\xff\xd8", b"RIFF1234WAVE", b"BM"):
        (tmp_path / "x.png").write_bytes(content)
        assert not is_picture(tmp_path / "x.png")
    assert not is_picture(tmp_path / "nowhere.png")


def test_a_turned_picture_has_the_size_it_is_shown_in(tmp_path):
    data = encode("mjpeg", "yuvj420p", quarters())
    body = b"Exif\0\0MM" + struct.pack(">HIHHHIHHI", 42, 8, 1, 0x0112, 3, 1, 6, 0, 0)
    (tmp_path / "x.jpg").write_bytes(data[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + data[2:])
    info = probe_picture(tmp_path / "x.jpg")
    assert (info.width, info.height, info.rotation) == (64, 96, 270)


def test_moving_pictures_are_refused(tmp_path):
    frames = [quarters(), quarters()[::-1]]
    with av.open(str(tmp_path / "a.apng"), "w", format="apng") as container:
        stream = container.add_stream("apng", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "rgb24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    with av.open(str(tmp_path / "a.webp"), "w", format="webp") as container:
        stream = container.add_stream("libwebp_anim", rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode(None))
    for name in ("a.apng", "a.webp"):
        with pytest.raises(ClipError, match="animated") as caught:
            probe_picture(tmp_path / name)
        assert caught.value.code == "video.codec"


@pytest.mark.parametrize("seed", range(30))
def test_one_flipped_bit_of_a_png_never_changes_it_silently(tmp_path, seed):
    rng = np.random.default_rng(seed)
    path = write_png(tmp_path / "x.png", quarters(32, 48))
    good, data = read_image(path, 32, 48), bytearray(path.read_bytes())
    data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)
    try:
        assert (read_image(path, 32, 48) == good).all()
    except DataError:
        return
