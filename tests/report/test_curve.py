"""A chart as a picture: lines where their points are, and none where there are none."""

import numpy as np

from cogvideox_factory.report.curve import curve

BLUE, ORANGE = (43, 108, 176), (221, 107, 32)
TEXT = 30
"""Rows at the top that hold the names."""


def places(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    rows, columns = np.nonzero((picture[TEXT:] == colour).all(axis=-1))
    return np.stack([columns, rows + TEXT], axis=1)


def test_a_line_falls_from_its_highest_point_to_zero_and_a_flat_one_stays_in_the_middle():
    picture = curve({"loss": [(0, 2.0), (10, 0.0)], "other": [(0, 1.0), (10, 1.0)]}, x_label="steps")
    falling, flat = places(picture, BLUE), places(picture, ORANGE)
    first, last = falling[falling[:, 0].argmin()], falling[falling[:, 0].argmax()]
    assert first[1] < flat[:, 1].min() < last[1]
    assert np.ptp(flat[:, 1]) <= 4  # a line and the dots on it
    assert abs(flat[:, 1].mean() - (first[1] + last[1]) / 2) <= 4
    assert picture.dtype == np.uint8


def test_what_is_not_finite_and_what_is_alone_are_drawn_as_they_can_be():
    with_gap = curve({"loss": [(1, 1.0), (2, float("nan")), (3, 0.5)]}, x_label="steps")
    without = curve({"loss": [(1, 1.0), (3, 0.5)]}, x_label="steps")
    np.testing.assert_array_equal(with_gap, without)
    assert len(places(curve({"loss": [(5, 1.0)]}, x_label="steps"), BLUE))
    assert not len(places(curve({}, x_label="steps"), BLUE))
