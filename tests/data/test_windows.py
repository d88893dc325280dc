import json
import sys
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.data import look as look_module
from cogvideox_factory.data import memo as memo_module
from cogvideox_factory.data import scenes as scenes_module
from cogvideox_factory.data import video as video_module
from cogvideox_factory.data.auto_buckets import auto_buckets
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.container import open_video, probe
from cogvideox_factory.data.glimpse import look_closer, thumbnails
from cogvideox_factory.data.manifest import read_manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.survey import measure, survey
from cogvideox_factory.data.timing import ClipSpec, plan_frames
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.data.windows import FIRST, Windows, cut_source
from cogvideox_factory.errors import MissingError

SPEC = ClipSpec(num_frames=9, height=32, width=48, fps=8)
ALL = Windows(policy="all")
SCENES = Windows(policy="scenes")


def cut(info, spec, windows):
    return cut_source(info, spec, windows, shape=lambda part: part).specs


def taken(info, windows):
    """The source frames of each window."""
    return [plan_frames(info, window).indices.tolist() for window in windows]


SOURCES = st.builds(
    lambda gaps, tick: (np.concatenate([[0], np.cumsum(gaps)]) * tick, tick),
    st.one_of(
        st.lists(st.integers(1, 40), min_size=1, max_size=120),
        st.builds(lambda gap, count: [gap] * count, st.integers(1, 40), st.integers(1, 200)),
    ),
    st.sampled_from([1e-3, 4e-3, 1e-2]),
)
SIZES = st.tuples(st.integers(1, 30), st.sampled_from([4.0, 7.992, 8.0, 16.0, 30.0]))


@given(SOURCES, SIZES)
@settings(max_examples=150, deadline=None)
def test_windows_are_whole_in_order_share_no_frame_and_leave_no_room(source, times, size):
    info, spec = source(*times), replace(SPEC, num_frames=size[0], fps=size[1])
    try:
        found = cut(info, spec, ALL)
    except ClipError as error:
        with pytest.raises(ClipError) as plain:
            plan_frames(info, spec)
        assert error.code == plain.value.code  # noqa: PT017
        return
    assert found[0] == spec, "the first window is the clip that `first` takes"
    frames = taken(info, found)
    assert all(len(window) == spec.num_frames for window in frames)
    # Stamps are rounded: a frame within a tick of a moment is the one on screen.
    assert all(info.times[window[0]] - info.times[one.start] <= times[1] + 1e-9 for window, one in zip(frames, found))
    assert all(before[-1] < after[0] for before, after in pairwise(frames))
    length = spec.num_frames / spec.fps
    borders = np.append(info.times, info.duration_seconds)
    for before, after in pairwise(found):  # the next begins at the first frame that comes a whole clip later
        assert borders[after.start] >= borders[before.start] + length - 2e-3 * 8
        assert after.start == before.start + 1 or borders[after.start - 1] < borders[before.start] + length
    after = next((i for i in range(found[-1].start + 1, info.num_frames)
                  if borders[i] >= borders[found[-1].start] + length), None)  # fmt: skip
    if after is not None:
        left = info.duration_seconds - borders[after]
        assert left <= (spec.num_frames - 1) / spec.fps + 1e-5, "one more window would have fitted"


@given(SOURCES, SIZES, st.integers(1, 9))
@settings(max_examples=150, deadline=None)
def test_uniform_takes_some_of_all_from_both_ends(source, times, size, most):
    info, spec = source(*times), replace(SPEC, num_frames=size[0], fps=size[1], short_policy="repeat_last")
    every = cut(info, spec, ALL)
    some = cut(info, spec, Windows(policy="uniform", most=most))
    assert len(some) == min(most, len(every))
    places = [every.index(window) for window in some]
    assert places[0] == 0
    if len(some) > 1:
        assert places[-1] == len(every) - 1
        steps = np.diff(places)
        assert steps.max() - steps.min() <= 1


@given(SOURCES, SIZES, st.integers(1, 40))
@settings(max_examples=150, deadline=None)
def test_stride_is_the_way_between_starts(source, times, size, stride):
    info, spec = source(*times), replace(SPEC, num_frames=size[0], fps=size[1], short_policy="repeat_last")
    starts = [window.start for window in cut(info, spec, Windows(policy="all", stride=stride))]
    for before, after in pairwise(starts):
        wanted = info.times[before] + stride / spec.fps
        assert after == before + 1 or info.times[after - 1] < wanted
        assert after == before + 1 or info.times[after] >= wanted - times[1] - 1e-9


def test_windows_of_a_source_at_the_asked_rate(source):
    info = source(np.arange(30) / 8)
    assert taken(info, cut(info, SPEC, ALL)) == [list(range(a, a + 9)) for a in (0, 9, 18)]
    assert [w.start for w in cut(info, SPEC, Windows(policy="all", stride=4))] == [0, 4, 8, 12, 16, 20]
    assert [w.start for w in cut(info, SPEC, Windows(policy="uniform", most=2))] == [0, 18]
    assert cut(info, SPEC, FIRST) == [SPEC]
    states = [plan_frames(info, w).state for w in cut(info, SPEC, ALL)]
    assert states == ["trimmed"] * 3


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=6),
    st.sampled_from([8, 24, 30]),
    st.sampled_from(["reject", "slow"]),
)
@settings(max_examples=150, deadline=None)
def test_no_window_crosses_a_cut_and_every_scene_is_counted(source, lengths, rate, short):
    borders = np.cumsum([0, *lengths]).tolist()
    scenes = list(pairwise(borders))
    info = source(np.arange(borders[-1]) / rate)
    spec = replace(SPEC, short_policy=short)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scenes_module, "find_scenes", lambda *_, **__: scenes)
        try:
            found = cut_source(info, spec, SCENES, shape=lambda part: part)
        except ClipError as error:
            assert error.code == "video.too_short"  # noqa: PT017
            found = None
    frames = taken(info, found.specs) if found else []
    homes = [[scene for scene in scenes if scene[0] <= w[0] and w[-1] < scene[1]] for w in frames]
    assert all(len(home) == 1 for home in homes)
    assert len({window.window for window in found.specs} if found else []) == len(frames)
    with_clip = {home[0] for home in homes}
    for first, stop in scenes:  # a scene gives a clip exactly if one taken alone from it would fit
        alone = replace(spec, start=first, stop=stop)
        try:
            plan_frames(info, alone)
            assert (first, stop) in with_clip
        except ClipError:
            assert (first, stop) not in with_clip
    if found:
        assert found.facts["scenes"] == len(scenes)
        assert found.facts.get("scenes_without_clip", 0) == len(scenes) - len(with_clip)


def test_the_end_of_a_scene_is_part_of_a_window_only_where_it_decides(source, monkeypatch):
    monkeypatch.setattr(scenes_module, "find_scenes", lambda *_, **__: [(0, 12), (12, 20), (20, 40)])
    info = source(np.arange(40) / 8)
    slow = replace(SPEC, short_policy="slow")
    assert [window.window for window in cut(info, slow, SCENES)] == ["", "@12-20", "@20", "@29"]
    assert plan_frames(info, cut(info, slow, SCENES)[1]).state == "retimed"
    with pytest.raises(ClipError, match=r"no scene of 3 gives a clip; the longest: x.mp4 lasts 2.500 s"):
        cut(info, replace(SPEC, num_frames=49), SCENES)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".webm", ".avi"])
@pytest.mark.parametrize("start", [1, 5, 6, 17, 31])
def test_a_window_has_the_pixels_that_decoding_from_the_start_gives(tmp_path, make_video, numbers, suffix, start):
    codec = "libvpx-vp9" if suffix == ".webm" else "libx264"
    path = make_video(tmp_path / f"a{suffix}", 40, codec=codec)
    everything = read_clip(path, replace(SPEC, num_frames=40))
    window = read_clip(path, replace(SPEC, start=start))
    assert (window.pixels == everything.pixels[start : start + 9]).all()
    assert numbers(window.pixels) == list(range(start, start + 9))


def test_a_late_window_does_not_decode_the_whole_file(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "a.mp4", 55)
    info, seen = probe(path), []

    class Counting:
        def __init__(self, container):
            self.seek, self.container = container.seek, container

        def demux(self, stream):
            for packet in self.container.demux(stream):
                seen.append(packet.pts)
                yield packet

    @contextmanager
    def counted(path):
        with open_video(path) as (container, stream):
            yield Counting(container), stream

    monkeypatch.setattr(video_module, "open_video", counted)
    clip = read_clip(path, replace(SPEC, start=40), info=info)
    assert clip.facts["unused_seconds"] == pytest.approx((55 - 9) / 8)
    assert len(seen) <= 9 + 6 + 2, "a key frame every six frames"


def test_damage_before_a_window_is_not_its_own(tmp_path, make_video):
    noise = np.random.default_rng(0).integers(0, 255, (40, 64, 96, 3), dtype=np.uint8)
    path = make_video(tmp_path / "a.mkv", pictures=list(noise), height=64, width=96)
    info = probe(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 8 : len(data) // 8 + 200] = bytes(200)
    path.write_bytes(data)
    with pytest.raises(ClipError, match="damaged"):
        read_clip(path, replace(SPEC, height=64, width=96), info=info)
    assert read_clip(path, replace(SPEC, height=64, width=96, start=24), info=info).pixels.std() > 30


@pytest.fixture
def long_and_short(dataset, make_video):
    """The three clips of nine frames, a long one, a copy of it, one cut in the middle, one that is too short."""
    make_video(dataset / "videos/3.mp4", 30)
    (dataset / "videos/4.mp4").write_bytes((dataset / "videos/3.mp4").read_bytes())
    make_video(dataset / "videos/5.mp4", 4)
    captions = ["a first clip", "a second clip", "a third clip", "long", "long", "short", "gone"]
    (dataset / "prompts.txt").write_text("\n".join(captions) + "\n")
    (dataset / "videos.txt").write_text("\n".join(f"videos/{number}.mp4" for number in range(7)) + "\n")
    return dataset


def test_rows_and_windows_add_up(long_and_short):
    seen = []
    manifest = survey(read_manifest(long_and_short), SPEC, windows=ALL, on_clip=seen.append)
    assert [(clip.number, clip.state) for clip in manifest.clips] == [
        (1, "used"), (2, "used"), (3, "used"), (4, "trimmed"), ("4@9", "trimmed"), ("4@18", "trimmed"),
        (5, "duplicate"), (6, "too_short"), (7, "missing"),
    ]  # fmt: skip
    assert manifest.counts() == {"used": 3, "trimmed": 3, "duplicate": 1, "missing": 1, "too_short": 1}
    assert manifest.row_counts() == {"used": 3, "trimmed": 1, "duplicate": 1, "missing": 1, "too_short": 1}
    report = manifest.to_json()
    assert report["total"] == sum(report["counts"].values()) == len(report["clips"]) == 9
    assert report["rows"]["total"] == sum(report["rows"]["counts"].values()) == 7
    assert manifest.report()[1] == (
        "  7 rows: 3 used, 1 trimmed, 1 duplicate, 1 missing, 1 too_short; 1 of them give 3 windows, "
        "the others one clip each"
    )
    assert len(seen) == 6, "once a row that names a file"
    usable = manifest.usable
    assert len({clip.id for clip in usable}) == len({clip.footage for clip in usable}) == len(usable)
    assert [clip.facts.get("window") for clip in usable[3:]] == ["1 of 3", "2 of 3", "3 of 3"]
    assert [clip.facts.get("start_seconds") for clip in usable[3:]] == [None, 1.125, 2.25]


def test_the_first_window_is_the_clip_of_before(long_and_short):
    plain = survey(read_manifest(long_and_short), SPEC)
    cut = survey(read_manifest(long_and_short), SPEC, windows=ALL)
    assert {clip.id for clip in plain.usable} == {clip.id for clip in cut.usable if not clip.window}
    assert (
        json.dumps(plain.to_json()["counts"])
        == '{"used": 3, "trimmed": 1, "duplicate": 1, "missing": 1, "too_short": 1}'
    )


def test_a_memo_recalls_every_window(long_and_short, tmp_path, monkeypatch):
    monkeypatch.setattr(memo_module, "_FRESH_NS", -1)

    def ask(windows):
        memo = Memo(tmp_path / "memo.jsonl")
        manifest = survey(read_manifest(long_and_short), SPEC, windows=windows, memo=memo)
        memo.save()
        return [(clip, clip.spec, clip.facts) for clip in manifest.clips]

    first, plain = ask(ALL), ask(FIRST)
    assert len(first) > len(plain)
    monkeypatch.setattr(look_module, "probe_clip", lambda *_, **__: pytest.fail("looked again"))
    assert ask(ALL) == first
    assert ask(FIRST) == plain


def test_windows_take_the_length_of_their_bucket(long_and_short):
    rows = read_manifest(long_and_short)
    buckets = auto_buckets(measure(rows.usable, SPEC, windows=ALL), native=Bucket(25, 32, 48), max_buckets=2)
    manifest = survey(rows, replace(SPEC, num_frames=25), windows=ALL, buckets=buckets)
    assert [(clip.number, clip.facts["bucket"]) for clip in manifest.usable] == [
        (1, "9x32x48"), (2, "9x32x48"), (3, "9x32x48"), (4, "25x32x48"),
    ]  # fmt: skip
    small = auto_buckets(measure(rows.usable, SPEC), native=Bucket(9, 32, 48), max_buckets=2)
    assert len(survey(rows, SPEC, windows=ALL, buckets=small).usable) == 6


def test_each_window_has_a_look_and_a_picture_of_its_own(long_and_short, numbers):
    manifest, glimpses = look_closer(survey(read_manifest(long_and_short), SPEC, windows=ALL), SPEC)
    assert set(glimpses) == {clip.footage for clip in manifest.usable}
    bright = [clip.facts["brightness"] for clip in manifest.usable if clip.row == 4]
    assert bright == sorted(bright)
    assert bright[0] < bright[2]
    pictures = thumbnails(manifest.usable)
    assert set(pictures) == {clip.number for clip in manifest.usable}
    assert len({pictures[place] for place in (4, "4@9", "4@18")}) == 3


def test_a_picture_is_one_window(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((32, 48, 3), np.uint8))
    (tmp_path / "a.txt").write_text("a picture")
    for windows in (ALL, SCENES, Windows(policy="uniform")):
        if windows is SCENES:
            pytest.importorskip("scenedetect")
        manifest = survey(read_manifest(tmp_path), replace(SPEC, num_frames=1), windows=windows)
        assert [clip.number for clip in manifest.usable] == [1]


def test_scenes_without_the_library_say_how_to_get_it(dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "scenedetect", None)
    with pytest.raises(MissingError, match=r"pip install 'cogvideox-factory\[scenes\]'"):
        survey(read_manifest(dataset), SPEC, windows=SCENES)


def test_variable_rates_are_cut_by_stamp(tmp_path, make_video, numbers):
    pts = np.cumsum([0, *[100, 150] * 15]).tolist()
    path = make_video(tmp_path / "a.mkv", len(pts), pts=[500 + p for p in pts], time_base=Fraction(1, 1000))
    info = probe(path)
    for window in cut(info, SPEC, ALL):
        begin = pts[window.start]
        wanted = [max(i for i, p in enumerate(pts) if p <= begin + k * 125) for k in range(9)]
        assert numbers(read_clip(path, window, info=info).pixels) == wanted
