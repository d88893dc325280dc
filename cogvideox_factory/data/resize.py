"""From a decoded frame to RGB of the asked size: colours, square pixels, upright, covered and cropped.

FFmpeg's scaler does colour conversion and resizing in one step before RGB is ever stored at full size. Its
bicubic filter widens when it shrinks, so nothing aliases. Colours are converted by the matrix the stream
names; a stream that names none gets what players assume, BT.709 for HD and BT.601 below.
"""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace, Interpolation, VideoReformatter

from cogvideox_factory.data.container import has_alpha, upright

_FILTER = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_MATRIX_UNSPECIFIED = (2, 3)  # AVCOL_SPC_UNSPECIFIED, AVCOL_SPC_RESERVED


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """How a picture is scaled and cropped, in display orientation."""

    scaled_height: int
    scaled_width: int
    top: int
    left: int

    @classmethod
    def of(
        cls,
        source_height: int,
        source_width: int,
        height: int,
        width: int,
        *,
        crop: Literal["center", "random", "smart", "stretch"],
        rng: np.random.Generator | None = None,
    ) -> "Fit":
        """Cover `height` x `width` with the smallest scaling that keeps the shape, then place the crop.

        "random" draws its place from `rng`; "stretch" scales to exactly the asked size, whatever that
        distorts. "smart" begins as "center"; what is in the frames moves it (`saliency.placed`).
        """
        if crop == "stretch":
            return cls(scaled_height=height, scaled_width=width, top=0, left=0)
        scale = max(height / source_height, width / source_width)
        # 1e-9: a product that is whole up to rounding must not gain a row.
        scaled_height = max(height, math.ceil(source_height * scale - 1e-9))
        scaled_width = max(width, math.ceil(source_width * scale - 1e-9))
        if crop == "random":
            assert rng is not None, "a random crop needs a generator"
            top = int(rng.integers(scaled_height - height + 1))
            left = int(rng.integers(scaled_width - width + 1))
        else:
            top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
        return cls(scaled_height=scaled_height, scaled_width=scaled_width, top=top, left=left)

    def to_json(self) -> dict[str, int]:
        """Return what a report keeps of the crop, in pixels of the scaled picture."""
        return {"top": self.top, "left": self.left, "height": self.scaled_height, "width": self.scaled_width}


class Resizer:
    """Brings frames of one stream to `height` x `width`.

    Args:
        fit: where to scale and crop.
        height: pixels.
        width: pixels.
        rotation: degrees counter-clockwise that bring the coded picture upright.
        mirrored: whether it is mirrored before that.
    """

    def __init__(self, fit: Fit, height: int, width: int, *, rotation: int, mirrored: bool) -> None:
        self._fit = fit
        self._size = (height, width)
        self._rotation, self._mirrored = rotation, mirrored
        self._reformatter = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """Return `frame` as uint8 [height, width, 3] (a view; copy what you keep)."""
        fit, (height, width) = self._fit, self._size
        turned = self._rotation % 180 != 0
        pixels = to_rgb(
            frame,
            height=fit.scaled_width if turned else fit.scaled_height,
            width=fit.scaled_height if turned else fit.scaled_width,
            reformatter=self._reformatter,
        )
        pixels = upright(pixels, rotation=self._rotation, mirrored=self._mirrored)
        return pixels[fit.top : fit.top + height, fit.left : fit.left + width]


def to_rgb(frame: VideoFrame, *, height: int, width: int, reformatter: VideoReformatter) -> np.ndarray:
    """Scale and convert a frame to uint8 [height, width, 3]; transparent parts are laid on black."""
    hd = frame.width >= 1280 or frame.height > 576
    transparent = has_alpha(frame)
    result = reformatter.reformat(
        frame,
        width=width,
        height=height,
        format="rgba" if transparent else "rgb24",
        src_colorspace=(Colorspace.ITU709 if hd else Colorspace.ITU601)
        if frame.colorspace in _MATRIX_UNSPECIFIED
        else None,
        interpolation=_FILTER,
        threads=1,
    ).to_ndarray()
    if not transparent:
        return result
    alpha = result[..., 3:].astype(np.uint16)
    return ((result[..., :3] * alpha + 127) // 255).astype(np.uint8)
