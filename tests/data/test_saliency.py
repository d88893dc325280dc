import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.resize import Fit
from cogvideox_factory.data.saliency import best_window, coarse_fit, placed, saliency
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip


@given(st.integers(1, 12), st.integers(1, 12), st.data())
@settings(max_examples=150, deadline=None)
def test_the_window_has_the_largest_sum_by_brute_force(rows, columns, data):
    height, width = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
    weights = np.array(data.draw(st.lists(st.integers(0, 5), min_size=rows * columns, max_size=rows * columns)), float)
    weights = weights.reshape(rows, columns)
    sums = {
        (top, left): weights[top : top + height, left : left + width].sum()
        for top in range(rows - height + 1)
        for left in range(columns - width + 1)
    }
    chosen = best_window(weights, height, width)
    assert sums[chosen] == max(sums.values())

    def off_centre(place):
        return np.hypot(place[0] - (rows - height) / 2, place[1] - (columns - width) / 2)

    best = [place for place, value in sums.items() if value == max(sums.values())]
    assert off_centre(chosen) == pytest.approx(min(map(off_centre, best)))


@given(st.integers(16, 400), st.integers(16, 400), st.integers(16, 200), st.integers(16, 200), st.integers(0, 9))
@settings(max_examples=150, deadline=None)
def test_a_crop_always_lies_inside_and_reaches_both_edges(source_height, source_width, height, width, seed):
    fit = Fit.of(source_height, source_width, height, width, crop="smart")
    coarse = coarse_fit(fit, height, width)
    shape = (coarse.scaled_height, coarse.scaled_width)
    weights = np.random.default_rng(seed).random(shape)
    found = placed(fit, height, width, weights)
    assert 0 <= found.top <= found.scaled_height - height
    assert 0 <= found.left <= found.scaled_width - width
    assert (found.scaled_height, found.scaled_width) == (fit.scaled_height, fit.scaled_width)
    assert placed(fit, height, width, np.zeros(shape)).top == pytest.approx(fit.top, abs=max(1, height / 32))
    ends = []
    for corner in (0, -1):
        lit = np.zeros(shape)
        lit[corner, corner] = 1
        ends.append(placed(fit, height, width, lit))
    assert ends[0].top <= found.top <= ends[1].top or fit.scaled_height == height
    last = (fit.scaled_height - height, fit.scaled_width - width)
    if max(shape[0] - 1, 1) * min(height, width) > 64 * 32 and last[0] > height / 16:
        assert (ends[0].top, ends[1].top) == (0, last[0])


def test_nothing_is_salient_in_a_flat_picture_and_motion_counts_more_than_detail():
    flat = [np.full((8, 8, 3), 90, np.uint8)] * 3
    assert (saliency(flat) == 0).all()
    frames = np.zeros((4, 8, 16, 3), np.uint8)
    frames[:, 2:6:2, 2] = 255  # a still pattern
    frames[::2, 2:6:2, 13] = 255  # one that blinks
    weights = saliency(frames)
    assert weights[:, 8:].sum() > 1.5 * weights[:, :8].sum()
    assert weights.sum() == pytest.approx(3)


def moving_dot(x: int, *, height=64, width=192, num_frames=9) -> list[np.ndarray]:
    pictures = []
    for k in range(num_frames):
        picture = np.full((height, width, 3), 60, np.uint8)
        picture[20 + 2 * k : 30 + 2 * k, x : x + 10] = 230
        pictures.append(picture)
    return pictures


SPEC = ClipSpec(num_frames=9, height=64, width=64, fps=8, crop="smart")


@pytest.mark.parametrize("x", [4, 60, 91, 150, 178])
def test_the_crop_follows_what_moves_and_is_one_for_the_clip(tmp_path, make_video, x):
    path = make_video(tmp_path / "a.mp4", pictures=moving_dot(x), height=64, width=192)
    clip = read_clip(path, SPEC)
    assert clip.facts["crop"] == {"top": 0, "left": clip.fit.left, "height": 64, "width": 192}
    for k, frame in enumerate(clip.pixels):
        dot = (frame[20 + 2 * k : 30 + 2 * k, :, 0] > 150).all(axis=0)
        assert dot.sum() >= 9, "all of the dot is in the picture, on its way down"
    again = read_clip(path, SPEC)
    assert (again.pixels == clip.pixels).all()
    assert again.fit == clip.fit


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_a_turned_video_is_cropped_as_it_is_shown(tmp_path, make_video, rotation):
    path = make_video(tmp_path / "a.mp4", pictures=moving_dot(150), height=64, width=192, rotation=rotation)
    assert (read_clip(path, SPEC).pixels[..., 0] > 150).sum(axis=(1, 2)).min() >= 80


def test_without_slack_or_motion_the_crop_is_the_centre(tmp_path, make_video):
    path = make_video(tmp_path / "a.mp4", pictures=[np.full((64, 192, 3), 120, np.uint8)] * 9, height=64, width=192)
    assert read_clip(path, SPEC).fit == Fit.of(64, 192, 64, 64, crop="center")
    square = make_video(tmp_path / "b.mp4", pictures=moving_dot(4, width=64), height=64, width=64)
    centre = ClipSpec(num_frames=9, height=64, width=64, fps=8)
    assert (read_clip(square, SPEC).pixels == read_clip(square, centre).pixels).all()
