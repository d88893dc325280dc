"""Frames of videos side by side in one picture, for where a page cannot go."""

from collections.abc import Sequence

import numpy as np

_GAP = 4


def before_after(
    before: Sequence[np.ndarray], after: Sequence[np.ndarray], *, num_frames: int = 3, scale: int = 2
) -> np.ndarray:
    """Return a picture uint8 [H, W, 3]: videos before in the upper row, after in the lower one.

    Args:
        before: videos uint8 [F, H, W, 3], all of one size.
        after: as many, of the same prompts.
        num_frames: frames shown of each, spread evenly from the first to the last.
        scale: how many times larger a pixel is drawn.
    """
    assert len(before) == len(after) > 0
    rows = [_row(videos, num_frames) for videos in (before, after)]
    gap = np.full((_GAP, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([rows[0], gap, rows[1]]).repeat(scale, axis=0).repeat(scale, axis=1)


def _row(videos: Sequence[np.ndarray], num_frames: int) -> np.ndarray:
    parts = []
    for video in videos:
        chosen = np.linspace(0, len(video) - 1, num_frames).round().astype(int)
        parts += [*video[chosen], np.full((video.shape[1], _GAP, 3), 255, np.uint8)]
    return np.concatenate(parts[:-1], axis=1)


def rows_of_frames(videos: Sequence[np.ndarray], *, num_frames: int = 3, max_width: int = 960) -> np.ndarray:
    """Return a picture uint8 [H, W, 3] with a row for each video: frames from the first to the last.

    Args:
        videos: uint8 [F, H, W, 3]; rows of smaller ones end in white.
        num_frames: frames shown of each.
        max_width: pixels; larger pictures are thinned out by whole steps.
    """
    rows = [_row([video], num_frames) for video in videos]
    step = -(-max(row.shape[1] for row in rows) // max_width)
    rows = [row[::step, ::step] for row in rows]
    width = max(row.shape[1] for row in rows)
    parts = []
    for row in rows:
        padded = np.full((row.shape[0] + _GAP, width, 3), 255, np.uint8)
        padded[: row.shape[0], : row.shape[1]] = row
        parts.append(padded)
    return np.concatenate(parts)[:-_GAP]
