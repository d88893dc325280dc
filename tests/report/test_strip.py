import numpy as np

from cogvideox_factory.report.strip import before_after, rows_of_frames


def test_frames_stand_where_they_should():
    before = [np.full((9, 8, 8, 3), 10 * index, np.uint8) for index in range(2)]
    after = [video + np.arange(9, dtype=np.uint8)[:, None, None, None] for video in before]
    strip = before_after(before, after, num_frames=3, scale=2)
    assert strip.shape == (2 * (8 + 4 + 8), 2 * (3 * 8 + 4 + 3 * 8), 3)
    assert [int(strip[0, x, 0]) for x in (0, 16, 32, 48, 56)] == [0, 0, 0, 255, 10]
    assert [int(strip[-1, x, 0]) for x in (0, 16, 32, 48, 56)] == [0, 4, 8, 255, 10]


def test_rows_show_each_video_from_its_first_to_its_last_frame():
    small, large = (np.full((5, 8, width, 3), value, np.uint8) for width, value in ((10, 40), (12, 90)))
    small[0], small[-1] = 1, 2
    picture = rows_of_frames([small, large])
    assert picture.shape == (8 + 4 + 8, 3 * 12, 3)
    assert [int(picture[0, x, 0]) for x in (0, 10, 20)] == [1, 40, 2]
    assert (picture[8:12] == 255).all()
    assert (picture[:8, 3 * 10 :] == 255).all()
    assert (picture[12:] == 90).all()


def test_large_rows_are_thinned_out():
    assert rows_of_frames([np.zeros((3, 100, 600, 3), np.uint8)]).shape[1] <= 960
