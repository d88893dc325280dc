"""Numbers about any video that need no network: sharpness, flicker, consistency, motion, fidelity, likeness.

All take uint8 [F, H, W, 3] (or [H, W, 3] for pictures) and return plain floats. They describe; they do not say what is
good: a foggy scene is less sharp than a brick wall, and a cut is inconsistent. Compare like with like.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

_LUMA = np.array([0.2126, 0.7152, 0.0722], np.float32)  # BT.709
_MIN_SSIM_SIDE = 11


def measure(video: np.ndarray) -> dict[str, float]:
    """Return `sharpness`, `flicker`, `consistency` and `motion` of a video [F, H, W, 3]."""
    return {
        "sharpness": sharpness(video),
        "flicker": flicker(video),
        "consistency": consistency(video),
        "motion": motion_amount(video),
    }


def sharpness(video: np.ndarray) -> float:
    """Return the mean over frames of the standard deviation of the Laplacian, in grey levels of 255.

    Pech-Pacheco et al., "Diatom autofocusing in brightfield microscopy" (ICPR 2000), as a deviation instead of a
    variance. Noise counts as detail.
    """
    luma = _luma(video)
    middle = luma[:, 1:-1, 1:-1]
    around = luma[:, :-2, 1:-1] + luma[:, 2:, 1:-1] + luma[:, 1:-1, :-2] + luma[:, 1:-1, 2:]
    return float((around - 4 * middle).std(axis=(1, 2)).mean()) if middle.size else 0.0


def flicker(video: np.ndarray) -> float:
    """Return how much brightness jumps back and forth, in grey levels of 255.

    The root mean square over space and time of the second difference in time of 8x8-pixel means. A steady change, a
    fade say, gives 0; motion gives something, so compare clips of like motion.
    """
    luma = _luma(video)
    if len(luma) < 3:
        return 0.0
    blocks = _block_means(luma, 8)
    return float(np.sqrt(np.mean(np.diff(blocks, n=2, axis=0) ** 2)))


def consistency(video: np.ndarray) -> float:
    """Return the mean SSIM between successive frames, 1 for a video that stands still."""
    if len(video) < 2:
        return 1.0
    return float(np.mean([ssim(first, second) for first, second in pairwise(video)]))


def motion_amount(video: np.ndarray) -> float:
    """Return the typical speed of what moves, in pixels a frame.

    The least-squares size of the normal flow, sum(|I_t| |grad I|) / sum(|grad I|^2), on slightly blurred luma: the
    brightness constancy equation of Horn and Schunck, "Determining optical flow" (1981), eq. 4. Exact for a shift that
    is small against the details, an underestimate beyond; edges that stand still lower it.
    """
    luma = _blur(_luma(video), sigma=1.5)
    if len(luma) < 2 or min(luma.shape[1:]) < 3:
        return 0.0
    change = abs(np.diff(luma, axis=0))
    middle = (luma[1:] + luma[:-1]) / 2
    down, across = np.gradient(middle, axis=(1, 2))
    gradient = np.hypot(down, across)
    total = float((gradient**2).sum())
    return float((change * gradient).sum()) / total if total > 1e-6 * gradient.size else 0.0


def psnr(first: np.ndarray, second: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite when they are equal."""
    _require_same(first, second)
    error = float(np.mean((first.astype(np.float32) - second.astype(np.float32)) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def ssim(first: np.ndarray, second: np.ndarray) -> float:
    """Return the structural similarity of two pictures uint8 [H, W, 3] on luma, 1 when they are equal.

    Wang et al., "Image quality assessment" (2004), eq. 13 with its constants: a Gaussian window of 11 pixels and
    sigma 1.5, K1 0.01, K2 0.03, averaged where the window fits.

    Raises:
        ValueError: different shapes, or sides below 11 pixels.
    """
    _require_same(first, second)
    if min(first.shape[:2]) < _MIN_SSIM_SIDE:
        raise ValueError(f"pictures of {first.shape[1]}x{first.shape[0]}: SSIM needs at least 11 pixels a side.")
    x, y = _luma(first[None])[0].astype(np.float64), _luma(second[None])[0].astype(np.float64)
    stack = np.stack([x, y, x * x, y * y, x * y])
    mean_x, mean_y, xx, yy, xy = _blur(stack, sigma=1.5, radius=5)[:, 5:-5, 5:-5]
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * (xy - mean_x * mean_y) + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (xx - mean_x**2 + yy - mean_y**2 + c2)
    return float((above / below).mean())


def first_frame_fidelity(video: np.ndarray, image: np.ndarray) -> dict[str, float]:
    """Return `first_frame_psnr` and `first_frame_ssim` of a video against the picture [H, W, 3] it was given."""
    return {"first_frame_psnr": psnr(video[0], image), "first_frame_ssim": ssim(video[0], image)}


def features(video: np.ndarray) -> np.ndarray:
    """Return simple statistics of a video [F, H, W, 3] that `similarity` compares, float64 [11].

    Mean and spread of each colour channel, colourfulness, detail at two scales, change between frames, and the share
    of the change that is even over the picture.
    """
    values = video.astype(np.float32)
    pixels = values.reshape(-1, 3)
    luma = _luma(video)
    change = np.diff(luma, axis=0) if len(luma) > 1 else np.zeros_like(luma)
    saturation = pixels.max(axis=1) - pixels.min(axis=1)
    detail = [_detail(luma), _detail(_block_means(luma, 4))]
    moved = [float(abs(change).mean()), float(abs(change.mean(axis=(1, 2))).mean())]
    return np.array([*pixels.mean(axis=0), *pixels.std(axis=0), saturation.mean(), *detail, *moved], np.float64)


def similarity(videos: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> float:
    """Return how alike two sets of feature vectors (see `features`) are, from 0 to 1.

    1 / (1 + d), where d is the Frechet distance of two normal distributions with diagonal covariance (Dowson and
    Landau, 1982, eq. 4), each feature in units of its spread over the reference (at least two grey levels), averaged
    over features. A set and itself give 1. Coarse: it tells a wrong palette, blur, or stillness, not what is shown.
    """
    ours, theirs = np.stack(list(videos)), np.stack(list(reference))
    unit = np.maximum(theirs.std(axis=0), 2.0)
    means = (ours.mean(axis=0) - theirs.mean(axis=0)) / unit
    spreads = (ours.std(axis=0) - theirs.std(axis=0)) / unit
    return float(1 / (1 + np.mean(means**2 + spreads**2)))


def _luma(video: np.ndarray) -> np.ndarray:
    """Return float32 [F, H, W]."""
    if video.ndim != 4 or video.shape[-1] != 3 or video.dtype != np.uint8 or 0 in video.shape:
        raise ValueError(f"video is {video.dtype} {list(video.shape)}; it must be uint8 [frames, height, width, 3].")
    return video.astype(np.float32) @ _LUMA


def _detail(luma: np.ndarray) -> float:
    down, across = (abs(np.diff(luma, axis=axis)) for axis in (1, 2))
    return float((down.mean() if down.size else 0) + (across.mean() if across.size else 0))


def _block_means(luma: np.ndarray, side: int) -> np.ndarray:
    """Average [F, H, W] over blocks; what does not fill a block is left out, a smaller picture is one block."""
    frames, height, width = luma.shape
    tall, wide = min(side, height), min(side, width)
    cut = luma[:, : height // tall * tall, : width // wide * wide]
    return cut.reshape(frames, height // tall, tall, width // wide, wide).mean(axis=(2, 4))


def _blur(values: np.ndarray, *, sigma: float, radius: int | None = None) -> np.ndarray:
    """Blur [n, H, W] with a Gaussian, mirrored at the border."""
    radius = radius or math.ceil(3 * sigma)
    taps = np.exp(-(np.arange(-radius, radius + 1) ** 2) / (2 * sigma**2))
    taps = (taps / taps.sum()).astype(values.dtype)
    for axis in (1, 2):
        size = values.shape[axis]
        padding = [(radius, radius) if a == axis else (0, 0) for a in range(3)]
        padded = np.moveaxis(np.pad(values, padding, mode="symmetric"), axis, 0)
        blurred = np.zeros((size, *padded.shape[1:]), values.dtype)
        for start, tap in enumerate(taps):
            blurred += tap * padded[start : start + size]
        values = np.moveaxis(blurred, 0, axis)
    return values


def _require_same(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        raise ValueError(f"shapes {list(first.shape)} and {list(second.shape)} differ; only equal ones compare.")
