from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from cogvideox_factory.data.container import missing_end, probe, upright
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video_info import Limits


def reason(path: Path, **more) -> str:
    with pytest.raises(ClipError) as caught:
        probe(path, **more)
    return caught.value.code


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov", ".avi", ".ts"])
def test_what_a_clip_is(tmp_path, make_video, suffix):
    info = probe(make_video(tmp_path / f"a{suffix}", 20, fps=25, height=48, width=64))
    assert (info.num_frames, info.height, info.width, info.codec) == (20, 48, 64, "h264")
    assert info.fps == pytest.approx(25, abs=0.3)
    assert info.duration_seconds == pytest.approx(0.8, abs=0.01)
    assert not info.variable_rate
    assert (info.rotation, info.mirrored, info.has_alpha) == (0, False, False)


def test_webm_vp9(tmp_path, make_video):
    info = probe(make_video(tmp_path / "a.webm", 6, codec="libvpx-vp9"))
    assert (info.num_frames, info.codec) == (6, "vp9")


def test_variable_rate_and_late_start(tmp_path, make_video):
    pts = [1000, 1125, 1250, 1500, 2000, 2100]
    info = probe(make_video(tmp_path / "a.mkv", 6, pts=pts, time_base=Fraction(1, 1000)))
    assert info.variable_rate
    assert np.allclose(info.times, (np.array(pts) - 1000) / 1000, atol=1e-3)


def test_rotation_and_wide_pixels_give_the_shown_size(tmp_path, make_video):
    assert (probe(make_video(tmp_path / "r.mp4", rotation=90)).rotation) == 90
    turned = probe(make_video(tmp_path / "s.mp4", rotation=270))
    assert (turned.height, turned.width) == (48, 32)
    wide = probe(make_video(tmp_path / "w.mp4", aspect=Fraction(4, 3)))
    assert (wide.height, wide.width, wide.sample_aspect_ratio) == (32, 64, pytest.approx(4 / 3))


@pytest.mark.parametrize("content", [b"", b"hello world\n" * 50, bytes(range(256)) * 20])
def test_no_video_at_all(tmp_path, content):
    (tmp_path / "x.mp4").write_bytes(content)
    assert reason(tmp_path / "x.mp4") == "video.unreadable"


def test_playlists_in_disguise_are_not_followed(tmp_path, make_video):
    make_video(tmp_path / "good.mp4")
    playlist = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\ngood.mp4\n#EXT-X-ENDLIST\n"
    for name, text in (
        ("a.mp4", "ffconcat version 1.0\nfile good.mp4\n"),
        ("b.m3u8", playlist),
        ("c.mp4", playlist),
    ):
        (tmp_path / name).write_text(text)
        assert reason(tmp_path / name) == "video.unreadable"


def test_audio_only_and_cover_art(tmp_path):
    for name, cover in (("a.mp4", False), ("b.mp4", True)):
        with av.open(str(tmp_path / name), "w") as container:
            audio = container.add_stream("aac", rate=16000)
            picture = container.add_stream("mjpeg", rate=1) if cover else None
            if picture:
                picture.width, picture.height, picture.pix_fmt = 48, 32, "yuvj420p"
                picture.disposition = av.stream.Disposition.attached_pic
                frame = av.VideoFrame.from_ndarray(np.zeros((32, 48, 3), np.uint8), format="rgb24")
                container.mux(picture.encode(frame))
                container.mux(picture.encode(None))
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            sound.sample_rate = 16000
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
        assert reason(tmp_path / name) == "video.no_stream"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, -3])
@pytest.mark.parametrize(
    ("suffix", "options"), [(".mp4", {}), (".mp4", {"movflags": "faststart"}), (".mkv", {}), (".avi", {})]
)
def test_a_cut_file_is_truncated(tmp_path, make_video, suffix, options, share):
    path = make_video(tmp_path / f"a{suffix}", 24, options=options)
    assert missing_end(path) is None
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share) if share > 0 else share])
    assert reason(path) in ("video.truncated", "video.unreadable")
    if suffix != ".mp4" or abs(share) > 0.1:
        assert missing_end(path) is not None
        assert reason(path) == "video.truncated"


def test_junk_after_the_last_box_is_no_loss(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4")
    path.write_bytes(path.read_bytes() + b"\xff\xfe\x00\x00junk and more junk")
    assert missing_end(path) is None
    assert probe(path).num_frames == 12


def test_limits(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4")
    assert reason(path, limits=Limits(max_pixels=32 * 48 - 1)) == "video.too_large"
    assert reason(path, limits=Limits(max_frames=11)) == "video.too_long"
    assert reason(path, limits=Limits(max_seconds=1.4)) == "video.too_long"
    assert probe(path, limits=Limits(max_pixels=32 * 48, max_frames=12, max_seconds=1.5)).num_frames == 12


def test_hdr_is_refused(tmp_path, make_video):
    assert reason(make_video(tmp_path / "a.mp4", color_trc=16)) == "video.hdr"


def test_gone(tmp_path):
    assert reason(tmp_path / "nowhere.mp4") == "path.missing"


@pytest.mark.parametrize("mirrored", [False, True])
def test_upright_turns_counter_clockwise_after_mirroring(mirrored):
    picture = np.arange(6, dtype=np.uint8).reshape(2, 3, 1)
    shown = upright(picture, rotation=90, mirrored=mirrored)[..., 0]
    assert shown.tolist() == ([[0, 3], [1, 4], [2, 5]] if mirrored else [[2, 5], [1, 4], [0, 3]])
