"""Where in the picture something happens, so that a crop can be placed on it.

Salient is what moves and what has structure: the mean change from frame to frame and the mean gradient inside frames,
each as a share of its total over the picture, motion counting twice. The crop is the window with the most of it; one
for the whole clip, so nothing jumps. Plain arithmetic on the frames themselves: no model, no random number.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from cogvideox_factory.data.resize import Fit, Resizer

_CELLS = 32
"""Cells along the shorter side of the crop: places are found to within one of them."""
_MOTION, _DETAIL = 2.0, 1.0
_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709


def smart_fit(
    fit: Fit, height: int, width: int, frames: Callable[[Resizer], Iterable[np.ndarray]], *, rotation: int,
    mirrored: bool,
) -> Fit:  # fmt: skip
    """Return `fit` with its crop of `height` x `width` on what is salient, or as it is where nothing is cropped off.

    Args:
        fit: of the whole picture.
        height: pixels.
        width: pixels.
        frames: gives the frames of the clip, each brought to a small size by what it is handed.
        rotation: see `Resizer`.
        mirrored: see `Resizer`.
    """
    if (fit.scaled_height, fit.scaled_width) == (height, width):
        return fit
    coarse = coarse_fit(fit, height, width)
    small = (coarse.scaled_height, coarse.scaled_width)
    see = Resizer(coarse, *small, rotation=rotation, mirrored=mirrored)
    return placed(fit, height, width, saliency(frames(see)))


def coarse_fit(fit: Fit, height: int, width: int) -> Fit:
    """Return how frames are scaled, uncropped, to look for the place of a crop of `height` x `width`."""
    cell = max(1.0, min(height, width) / _CELLS)
    return Fit(
        scaled_height=max(1, round(fit.scaled_height / cell)), scaled_width=max(1, round(fit.scaled_width / cell)),
        top=0, left=0,
    )  # fmt: skip


def saliency(frames: Iterable[np.ndarray]) -> np.ndarray:
    """Return the share of motion and detail at each place of uint8 [h, w, 3] `frames`, float64 [h, w]; 0 if flat."""
    motion = detail = np.zeros(())
    last: np.ndarray | None = None
    for frame in frames:
        luma = frame.astype(np.float32) @ _LUMA  # [h, w]
        rows, columns = np.diff(luma, axis=0, append=luma[-1:]), np.diff(luma, axis=1, append=luma[:, -1:])
        detail = detail + np.hypot(rows, columns, dtype=np.float64)
        if last is not None:
            motion = motion + np.abs(luma - last, dtype=np.float64)
        last = luma
    return _MOTION * _share(motion) + _DETAIL * _share(detail)


def _share(values: np.ndarray) -> np.ndarray:
    total = values.sum()
    return values / total if total > 0 else values


def best_window(weights: np.ndarray, height: int, width: int) -> tuple[int, int]:
    """Return (top, left) of the `height` x `width` window of `weights` [h, w] with the largest sum.

    Of equal ones (to a millionth of all) the nearest to the centre, so flat pictures are cropped there.
    """
    table = np.pad(weights.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # [h + 1, w + 1]
    sums = table[height:, width:] - table[:-height, width:] - table[height:, :-width] + table[:-height, :-width]
    rows, columns = np.indices(sums.shape)
    off_centre = np.hypot(rows - (sums.shape[0] - 1) / 2, columns - (sums.shape[1] - 1) / 2)
    off_centre[sums < sums.max() - 1e-6 * max(float(table[-1, -1]), 1e-12)] = np.inf
    top, left = np.unravel_index(int(off_centre.argmin()), sums.shape)
    return int(top), int(left)


def placed(fit: Fit, height: int, width: int, weights: np.ndarray) -> Fit:
    """Return `fit` with its crop of `height` x `width` on the most salient part; `weights` is of the coarse frames."""
    rows, columns = weights.shape
    window = (
        min(rows, max(1, round(height * rows / fit.scaled_height))),
        min(columns, max(1, round(width * columns / fit.scaled_width))),
    )
    top, left = best_window(weights, *window)
    return replace(
        fit,
        top=_scaled(top, rows - window[0], fit.scaled_height - height),
        left=_scaled(left, columns - window[1], fit.scaled_width - width),
    )


def _scaled(place: int, places: int, slack: int) -> int:
    """Return the place among `slack` + 1 that stands for `place` among `places` + 1; the centre where there is one."""
    return round(place * slack / places) if places else slack // 2
