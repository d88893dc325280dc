import logging

import av
import numpy as np
import pytest
from PIL import Image

from cogvideox_factory.data.container import probe
from cogvideox_factory.data.export import export_to_video, read_note
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.video import ClipSpec, read_clip
from cogvideox_factory.errors import FactoryError, MissingError, StorageError


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
        (clip(), "v.avi", 8, "end the name"),
        (clip(), "v.png", 8, "end the name"),
        (clip(), "v.mp4", 0, "fps=0"),
        (clip(), "v.mp4", 0.0004, "fps=0.0004: a frame rate is 0.01 to 1000"),
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


@pytest.mark.parametrize("codec", ["h264", "h265"])
def test_codecs_keep_size_rate_and_picture(tmp_path, codec):
    frames = clip(height=64, width=96)
    path = export_to_video(frames, tmp_path / "v.mp4", fps=8, codec=codec)
    assert probe(path).codec == {"h264": "h264", "h265": "hevc"}[codec]
    back = read_clip(path, ClipSpec(num_frames=9, height=64, width=96, fps=8))
    assert np.abs(back.pixels.astype(int) - frames).mean() < 2


def test_codecs_that_cannot_be_used_are_refused(tmp_path):
    with pytest.raises(MissingError, match="h264, h265"):
        export_to_video(clip(), tmp_path / "v.mp4", codec="av1")
    with pytest.raises(FactoryError, match="32x48 is too small for h265"):
        export_to_video(clip(), tmp_path / "v.mp4", codec="h265")
    assert list(tmp_path.iterdir()) == []


def test_arrays_and_pictures_are_exact(tmp_path):
    frames = clip()
    assert np.array_equal(np.load(export_to_video(frames, tmp_path / "v.npy"), allow_pickle=False), frames)
    pictures = sorted(export_to_video(frames, tmp_path / "v").iterdir())
    assert [path.name for path in pictures] == [f"{index:05}.png" for index in range(9)]
    assert all(np.array_equal(read_image(path, 32, 48), frame) for path, frame in zip(pictures, frames))


def test_a_shorter_video_leaves_no_picture_of_a_longer_one(tmp_path):
    export_to_video(clip(9), tmp_path / "v")
    assert len(list(export_to_video(clip(3), tmp_path / "v").iterdir())) == 3


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animations_last_as_long_as_the_video_and_look_like_it(tmp_path, kind):
    frames = clip(8)
    with Image.open(export_to_video(frames, tmp_path / f"v.{kind}", fps=24)) as image:
        assert (image.n_frames, image.size) == (8, (48, 32))
        seconds, shown = 0.0, []
        for index in range(8):
            image.seek(index)
            shown.append(np.asarray(image.convert("RGB")).astype(int))
            seconds += image.info["duration"] / 1000
    assert seconds == pytest.approx(8 / 24, abs=0.005)
    difference = np.abs(np.stack(shown) - frames).mean()
    assert difference == 0 if kind == "webp" else difference < 6


@pytest.mark.parametrize("name", ["v.mp4", "v.gif", "v.webp"])
def test_a_note_is_found_again(tmp_path, name):
    note = '{"prompt": "ein Fuchs im Schnee \u2603", "steps": [1, 2]}' + " " * 3000
    assert read_note(export_to_video(clip(), tmp_path / name, note=note)) == note
    assert read_note(export_to_video(clip(), tmp_path / f"bare-{name}")) is None
    (tmp_path / name).write_bytes(b"no video")
    with pytest.raises(FactoryError, match="cannot be read"):
        read_note(tmp_path / name)
