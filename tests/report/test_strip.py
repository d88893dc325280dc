import numpy as np

from cogvideox_factory.report.strip import before_after


def test_frames_stand_where_they_should():
    before = [np.full((9, 8, 8, 3), 10 * index, np.uint8) for index in range(2)]
    after = [video + np.arange(9, dtype=np.uint8)[:, None, None, None] for video in before]
    strip = before_after(before, after, num_frames=3, scale=2)
    assert strip.shape == (2 * (8 + 4 + 8), 2 * (3 * 8 + 4 + 3 * 8), 3)
    assert [int(strip[0, x, 0]) for x in (0, 16, 32, 48, 56)] == [0, 0, 0, 255, 10]
    assert [int(strip[-1, x, 0]) for x in (0, 16, 32, 48, 56)] == [0, 4, 8, 255, 10]
