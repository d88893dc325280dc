"""Entries of a cache in the making, but for the model's part: what they are read from, and how they are written.

Both engines read and write through here, in threads of their own; between the two stands what encodes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.data import apart
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.reasons import ClipError, printable
from cogvideox_factory.errors import DataError, UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.preparation import Work


class Job(NamedTuple):
    """An entry to be made: of a clip, or of the image of its own that it starts from."""

    clip: Clip
    is_image: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Pixels:
    """What an entry is made of."""

    frames: np.ndarray
    """uint8 [F, H, W, 3], one frame of an image."""
    sigma: np.ndarray | None
    """[K] of the first frame, where its moments belong to the entry."""
    noise: np.ndarray | None
    """[K, H, W, 3]."""
    crop: Mapping[str, int]
    """Where a clip's pixels were cut from."""


def jobs_of(work: Work) -> list[Job]:
    """Return the entries of `work` that a VAE makes."""
    return [Job(clip, False) for clip in work.clips] + [Job(clip, True) for clip in work.images]


def read_pixels(work: Work, job: Job) -> Pixels | ClipError | None:
    """Read a clip or its image and draw the noise of its first frame; None if another process has encoded it since."""
    clip = job.clip
    assert clip.path is not None
    assert clip.spec is not None
    if work.cache.has_image(clip) if job.is_image else work.cache.has_clip(clip):
        return None
    draw = work.seed, "crop", clip.footage
    crop: Mapping[str, int] = {}
    try:
        if job.is_image:
            pixels = apart.read_condition(clip, draw=draw)[None]
        else:
            pixels, crop = apart.read_clip(clip.path, clip.spec, draw=draw, stamp=clip.stamp)
    except ClipError as error:
        return error
    sigma = noise = None
    count = work.cache.settings.video.image_variants
    if count and (job.is_image or not clip.image_content):
        content = clip.image_content or "" if job.is_image else clip.footage
        sigma, noise = image_variants(content, count, pixels[0].shape, seed=work.seed)
    return Pixels(frames=pixels, sigma=sigma, noise=noise, crop=crop)


def write_entry(work: Work, job: Job, arrays: dict[str, np.ndarray], crop: Mapping[str, int]) -> ClipError | None:
    """Write moments as the entry of `job`; return what is wrong with them, if anything is.

    `arrays` hold `mean` and `logvar` [F, C, H, W] of a clip, and `image_mean`, `image_logvar` [K, C, H, W] and
    `image_sigmas` [K] where the entry has those of a first frame.
    """
    sigmas = cast(list[float], arrays.pop("image_sigmas").tolist()) if "image_sigmas" in arrays else []
    try:
        if job.is_image:
            work.cache.write_image(job.clip, **arrays, image_sigmas=sigmas)
        else:
            work.cache.write_clip(job.clip, **arrays, image_sigmas=sigmas, crop=crop)
    except UnfitError as error:
        return ClipError("latent.nonfinite", str(error))
    return None


class Failures:
    """What could not be encoded, by what `preparation.Engine.encode` returns it under, and a line for each clip."""

    def __init__(self, work: Work) -> None:
        self.by_entry: dict[str, ClipError] = {}
        self._work = work
        self._lines: dict[str, str] = {}

    def note(self, job: Job, error: ClipError | None) -> None:
        """Keep `error`, if there is one."""
        if error:
            clip = job.clip
            self.by_entry[self._work.cache.image_file(clip) if job.is_image else clip.footage] = error
            self._lines[clip.id] = f"{clip.place} {clip.name}: {error}"

    def tell(self) -> None:
        """Say what failed."""
        for line in self._lines.values():
            say(line)


def image_variants(content: str, count: int, shape: tuple[int, ...], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sigma [K] and pixel noise [K, H, W, 3] of the first frame of what has this hash: index 0 is clean.

    sigma = exp(N(-3, 0.5)), the augmentation the image-to-video models were trained with.
    """
    draw = draws.generator(seed, "image noise", content)
    sigma = np.exp(draw.normal(-3.0, 0.5, size=count)).astype(np.float32)
    sigma[0] = 0.0
    return sigma, draw.standard_normal((count, *shape), dtype=np.float32)


def report_cut_captions(
    truncated_tokens: Callable[[str, int], int], captions: list[str], length: int, *, strict: bool,
    called: str = "captions",
) -> None:  # fmt: skip
    """Say which captions, or what else they are `called`, are longer than the model reads and how much is lost.

    `truncated_tokens` is the text encoder's: how many tokens of a caption do not fit.

    Raises:
        DataError: there are some and `strict` is set.
    """
    cut = {text: count for text in captions if (count := truncated_tokens(text, length))}
    if not cut:
        return
    worst = sorted(cut, key=lambda text: -cut[text])[:20]
    lines = [f"{len(cut)} of {len(captions)} {called} are longer than {length} tokens and will be cut; the longest:"]
    lines += [f"  {cut[text]} tokens lost: {printable(text[:60])}…" for text in worst]
    if strict:
        raise DataError("\n".join([*lines, "Shorten them, or turn --data.strict off."]))
    say("\n".join(lines))
