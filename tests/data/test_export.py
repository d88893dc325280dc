import logging

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.container import probe
from cogvideox_factory.data.export import encode_jpeg, export_to_video, to_uint8, write_png
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.video import ClipSpec, read_clip
from cogvideox_factory.errors import FactoryError, StorageError


def clip(num_frames=9, height=32, width=48) -> np.ndarray:
    t, y, x = np.meshgrid(*(np.linspace(0, 1, n) for n in (num_frames, height, width)), indexing="ij")
    return (np.stack([x, y, (x + t) / 2], -1) * 200 + 20).astype(np.uint8)


@pytest.mark.parametrize("fps", [8, 16, 24, 29.97, 12.5])
@pytest.mark.parametrize("num_frames", [1, 9])
def test_frame_count_size_and_rate_are_exact(tmp_path, fps, num_frames):
    path = export_to_video(clip(num_frames), tmp_path / "sub" / "v.mp4", fps=fps)
    info = probe(path)
    assert (info.num_frames, info.height, info.width, info.codec, info.pixel_format) == (
        num_frames, 32, 48, "h264", "yuv420p",
    )  # fmt: skip
    assert info.duration_seconds == pytest.approx(num_frames / fps, rel=2e-3)


def test_what_is_written_is_what_is_read(tmp_path):
    frames = clip()
    path = export_to_video(frames, tmp_path / "v.mp4", fps=8)
    back = read_clip(path, ClipSpec(num_frames=9, height=32, width=48, fps=8))
    assert back.state == "used"
    difference = back.pixels.astype(int) - frames
    assert np.abs(difference).mean() < 2
    assert np.abs(difference.mean((0, 1, 2))).max() < 1  # no shift of colour: the matrix is named in the file


def test_floats_lists_and_pictures_are_the_same_video(tmp_path):
    class Picture:
        def __init__(self, pixels):
            self.pixels = pixels

        def convert(self, mode):
            assert mode == "RGB"
            return self.pixels

    frames = clip()
    kinds = [frames, list(frames), frames.astype(np.float32) / 255, [Picture(frame) for frame in frames]]
    written = [export_to_video(kind, tmp_path / f"{i}.mp4").read_bytes() for i, kind in enumerate(kinds)]
    assert len(set(written)) == 1


def test_odd_sizes_are_padded_and_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        path = export_to_video(clip(height=33, width=47), tmp_path / "v.mp4")
    assert "33x47 padded to 34x48" in caplog.text
    info = probe(path)
    assert (info.height, info.width) == (34, 48)


@pytest.mark.parametrize(
    ("frames", "name", "fps", "message"),
    [
        ([], "v.mp4", 8, "no frames"),
        (clip(), "v.gif", 8, "end the name"),
        (clip(), "v.mp4", 0, "fps=0"),
        (clip()[0], "v.mp4", 8, "height, width, 3"),
        (clip() / 100.0, "v.mp4", 8, r"must be in \[0, 1\]"),
        (clip().astype(int), "v.mp4", 8, "int64"),
        (clip() * np.nan, "v.mp4", 8, "nan"),
        ([clip()[0], clip()[0, :16]], "v.mp4", 8, "one size"),
    ],
)
def test_what_cannot_be_written_is_refused_and_nothing_appears(tmp_path, frames, name, fps, message):
    with pytest.raises(FactoryError, match=message):
        export_to_video(frames, tmp_path / name, fps=fps)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = export_to_video(clip(), tmp_path / "v.mp4")
    before = path.read_bytes()

    def full(*_):
        raise av.error.OSError(28, "No space left on device")

    monkeypatch.setattr("cogvideox_factory.data.export._encode", full)
    with pytest.raises(StorageError):
        export_to_video(clip(), path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


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
    smooth = clip(1, 48, 72)[0]
    data = encode_jpeg(smooth)
    (tmp_path / "x.jpg").write_bytes(data)
    back = read_image(tmp_path / "x.jpg", 48, 72).astype(int)
    assert len(data) < 2000
    assert abs(back - smooth).mean() < 3
    assert abs((back - smooth).mean(axis=(0, 1))).max() < 1.5  # no tint
