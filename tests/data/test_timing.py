from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from cogvideox_factory.data.reasons import USABLE, ClipError
from cogvideox_factory.data.timing import ClipSpec, compact, plan_frames
from cogvideox_factory.data.video_info import VideoInfo


def source(times, *, tick=1e-4, last=None) -> VideoInfo:
    times = np.asarray(times, dtype=np.float64)
    gap = float(np.median(np.diff(times))) if len(times) > 1 else 0.125
    return VideoInfo(
        path=Path("x.mp4"), codec="h264", pixel_format="yuv420p", width=48, height=32,
        fps=1 / gap, num_frames=len(times), duration_seconds=float(times[-1]) + (last or gap), rotation=0,
        mirrored=False, sample_aspect_ratio=1.0, bit_depth=8, has_alpha=False, interlaced=False,
        variable_rate=False, times=times, tick_seconds=tick, pts=None,
    )  # fmt: skip


def spec(num_frames, fps=8.0, **more) -> ClipSpec:
    return ClipSpec(num_frames=num_frames, height=32, width=48, fps=fps, **more)


@given(st.integers(1, 60), st.integers(0, 20), st.sampled_from([8, 16, 23.976, 24, 25, 29.97, 30, 60]))
@settings(max_examples=100, deadline=None)
def test_a_source_at_the_asked_rate_is_taken_frame_by_frame(wanted, more, fps):
    plan = plan_frames(source(np.arange(wanted + more) / fps), spec(wanted, fps))
    assert plan.indices.tolist() == list(range(wanted))
    assert plan.state == ("trimmed" if more else "used")


@pytest.mark.parametrize("fps", [8, 16, 24, 25, 30, 50])
def test_millisecond_stamps_do_not_shift_frames(fps):
    times = np.floor(np.arange(200) * 1000 / fps + 0.5) / 1000
    assert plan_frames(source(times, tick=1e-3), spec(100, fps)).indices.tolist() == list(range(100))


@given(st.lists(st.integers(1, 40), min_size=2, max_size=80), st.integers(1, 30), st.floats(2, 40))
@settings(max_examples=200, deadline=None)
def test_resampling_takes_the_frame_on_screen(gaps, wanted, fps):
    times = np.concatenate([[0], np.cumsum(gaps)]) / 100
    info = source(times)
    try:
        plan = plan_frames(info, spec(wanted, fps))
    except ClipError as error:
        assert error.code == "video.too_short"  # noqa: PT017
        assert (wanted - 1) / fps >= info.duration_seconds - 1e-4
        return
    moments = np.arange(wanted) / fps
    following = np.append(times, np.inf)[plan.indices + 1]
    assert (times[plan.indices] <= moments + 2e-4).all()
    assert (following > moments).all()
    assert (np.diff(plan.indices) >= 0).all()
    assert plan.state in USABLE
    assert plan.speed == 1


@given(st.integers(1, 200), st.integers(1, 60), st.sampled_from(["reject", "repeat_last"]))
@settings(max_examples=200, deadline=None)
def test_stretching_covers_the_whole_source_without_repeats(num_source, wanted, short):
    info = source(np.arange(num_source) / 25)
    try:
        plan = plan_frames(info, spec(wanted, fps_policy="stretch", short_policy=short))
    except ClipError as error:
        assert error.code == "video.too_short"  # noqa: PT017
        assert num_source < wanted
        assert short == "reject"
        return
    assert len(plan.indices) == wanted
    assert plan.indices[0] == 0
    if wanted > 1:
        assert plan.indices[-1] == num_source - 1
    kept = plan.indices[: wanted - plan.num_padded]
    assert (np.diff(kept) > 0).all()
    assert plan.num_padded == max(0, wanted - num_source)


@given(st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_padding_repeats_only_the_last_frame(num_source, wanted):
    plan = plan_frames(source(np.arange(num_source) / 8), spec(wanted, short_policy="repeat_last"))
    assert plan.indices.tolist() == [min(i, num_source - 1) for i in range(wanted)]
    assert plan.num_padded == max(0, wanted - num_source)
    assert (plan.state == "padded") == (plan.num_padded > 0)


def test_the_whole_clip_is_not_cut_to_its_first_half():
    """The originals took 49 of 97 frames at stride 1 and never saw the rest."""
    plan = plan_frames(source(np.arange(97) / 16), spec(49, fps_policy="stretch"))
    assert plan.indices.tolist() == list(range(0, 97, 2))
    assert plan.speed == pytest.approx(1.0)
    assert plan.state == "retimed"


def test_a_slower_source_repeats_frames_and_says_so():
    plan = plan_frames(source(np.arange(20) / 8), spec(9, 16))
    assert plan.indices.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    assert plan.num_repeated == 4
    assert plan.state == "retimed"
    assert plan.unused_seconds > 1


def test_too_short_says_needed_and_found():
    with pytest.raises(ClipError, match=r"lasts 1\.960 s, which gives 16 frames at 8 fps; 49 need more than 6\.000 s"):
        plan_frames(source(np.arange(49) / 25), spec(49))
    with pytest.raises(ClipError, match=r"has 1 frames; 9 are asked"):
        plan_frames(source([0.0]), spec(9, fps_policy="stretch"))


@given(st.lists(st.integers(0, 5), min_size=1, max_size=10))
@settings(max_examples=50, deadline=None)
def test_compact_frame_numbers_can_be_read_back(steps):
    indices = np.cumsum(steps)
    assume(len(indices) > 0)
    text = compact(indices)
    if ":" in text:
        first, last, step = map(int, text.split(":"))
        assert list(range(first, last + 1, step)) == indices.tolist()
    else:
        assert [int(part) for part in text.split(",")] == indices.tolist()


@given(st.integers(1, 60), st.integers(2, 60), st.sampled_from([4.0, 8.0, 25.0]), st.floats(1, 8))
@settings(max_examples=300, deadline=None)
def test_slowing_fills_the_clip_with_the_whole_source_within_its_bound(num_source, wanted, rate, bound):
    info = source(np.arange(num_source) / rate)
    slow = spec(wanted, short_policy="slow", max_slowdown=bound)
    needed = wanted / 8 / info.duration_seconds
    try:
        plan = plan_frames(info, slow)
    except ClipError as error:
        assert error.code == "video.too_short"  # noqa: PT017
        assert needed > bound - 1e-9
        asked = float(error.message.split("slowed ")[1].split(" times")[0])
        assert needed - 1e-9 <= asked <= needed + 0.011
        assert f"max_slowdown is {bound:g}." in error.message  # noqa: PT017
        return
    try:
        enough = plan_frames(info, spec(wanted))
    except ClipError:
        assert needed <= bound + 1e-9
        assert plan.speed == pytest.approx(1 / needed)
        assert plan.state == "retimed"
        assert plan.unused_seconds == plan.num_padded == 0
        # Frame k of the clip is the one on screen k / wanted of the way through the source.
        way = np.arange(wanted) * (num_source / wanted)
        assert (np.abs(plan.indices - np.floor(way + 1e-3)) <= (np.abs(way - np.round(way)) < 2e-3)).all()
    else:
        assert (plan.indices == enough.indices).all()
        assert plan.speed == 1


def test_slowing_does_not_change_what_is_long_enough_and_says_what_is_needed():
    info = source(np.arange(10) / 8)
    assert plan_frames(info, spec(9, short_policy="slow")).to_json() == plan_frames(info, spec(9)).to_json()
    slowed = plan_frames(info, spec(20, short_policy="slow"))
    assert slowed.indices.tolist() == [i // 2 for i in range(20)]
    assert (slowed.state, slowed.speed, slowed.num_repeated) == ("retimed", 0.5, 10)
    with pytest.raises(
        ClipError, match=r"lasts 1\.250 s, which gives 10 frames.*slowed 2\.1 times, and max_slowdown is 2\."
    ):
        plan_frames(info, spec(21, short_policy="slow"))
