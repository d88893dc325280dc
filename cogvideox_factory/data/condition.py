"""The picture that image-to-video starts from, where a clip has one of its own."""

import numpy as np

from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.data.video_info import file_stamp
from cogvideox_factory.errors import DataError


def read_condition(clip: Clip, rng: np.random.Generator | None = None) -> np.ndarray:
    """Return the own image of a surveyed clip, uint8 [H, W, 3], scaled and cropped as the clip's frames are.

    Args:
        clip: surveyed, with an image.
        rng: draws the place of a random crop; given as it was for the clip, an image of the clip's size is cropped at
            the clip's place.

    Raises:
        ClipError: `image.unreadable`, or `image.changed` since it was hashed.
    """
    assert clip.image_path is not None, f"{clip.name} has no image of its own"
    assert clip.spec is not None, f"{clip.name} has not been surveyed"
    try:
        before = clip.image_stamp or file_stamp(clip.image_path)
        pixels = read_image(clip.image_path, clip.spec.height, clip.spec.width, crop=clip.spec.crop, rng=rng)
        after = file_stamp(clip.image_path)
    except DataError as error:  # a ClipError too
        raise ClipError("image.unreadable", f"its image: {error}") from error
    if after != before:
        raise ClipError("image.changed", f"its image {clip.image_name} changed while clips were read; run again")
    return pixels
