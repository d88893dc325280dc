"""Frame and size arithmetic of the family, exactly as its causal VAE and sampling pipelines behave.

The VAE halves time twice and works in chunks: 8 pixel frames at a time when it encodes, 2 latent frames
when it decodes, the remainder joined to the first chunk. A chunk with an odd count keeps its first frame as
it is and halves (or doubles) the others. What follows, and what surprises:

    pixel frames   1  2-4  5-8   9  13  16  17  49  53  77  80  81  85  161
    latent frames  1   1    2    3   4   4   5  13  14  20  20  21  22   41
    decoded        1   1    8    9  16  16  17  49  56  80  80  81  88  161

Only 8k + 1 and 8k frames come back as many as went in; 77, the CogVideoX1.5 habit, comes back as 80.

CogVideoX1.5 patches time by `patch_size_t` = 2 and therefore needs an even latent count. An odd one gets
extra latent frames at the *front*, which are denoised like the others and dropped before decoding; the
conditioning image of image-to-video sits at index 0 of the padded sequence.
"""

from itertools import pairwise

from cogvideox_factory.errors import FactoryError

TEMPORAL_COMPRESSION = 4
SPATIAL_COMPRESSION = 8
SIZE_MULTIPLE = 16  # VAE 8 x spatial patch 2

_ENCODE_CHUNK = 8  # pixel frames
_DECODE_CHUNK = 2  # latent frames


def frame_batches(count: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of each batch of `size` frames, the remainder joined to the first."""
    assert count >= 1
    first = size + count % size if count >= size else count
    return list(pairwise([0, *range(first, count + 1, size)]))


def encode_chunks(num_frames: int) -> list[tuple[int, int]]:
    """Return the (start, stop) pixel frames of each chunk the VAE encodes, in order."""
    return frame_batches(num_frames, _ENCODE_CHUNK)


def decode_chunks(num_latents: int) -> list[tuple[int, int]]:
    """Return the (start, stop) latent frames of each chunk the VAE decodes, in order."""
    return frame_batches(num_latents, _DECODE_CHUNK)


def num_latent_frames(num_frames: int) -> int:
    """Return how many latent frames the VAE makes of `num_frames` pixel frames (ceil(n / 4) for every n)."""
    assert num_frames >= 1
    return (num_frames - 1) // TEMPORAL_COMPRESSION + 1


def num_decoded_frames(num_latents: int) -> int:
    """Return how many pixel frames the VAE makes of n latent frames: 4n - 3 if odd, 4n if even."""
    assert num_latents >= 1
    if num_latents % 2:
        return TEMPORAL_COMPRESSION * (num_latents - 1) + 1
    return TEMPORAL_COMPRESSION * num_latents


def latent_frames_for_model(num_frames: int, patch_size_t: int | None) -> tuple[int, int]:
    """Return (latent frames the transformer sees, how many of them are padding at the front).

    Drop the padding before decoding: `latents[:, padding:]`.
    """
    latents = num_latent_frames(num_frames)
    padding = -latents % (patch_size_t or 1)
    return latents + padding, padding


def check_num_frames(num_frames: int, *, patch_size_t: int | None) -> None:
    """Refuse a frame count whose last latent frame would stand for frames that do not exist.

    Allowed are 4k + 1 (8k + 1 decodes to as many frames, 8k + 5 to three more) and 8k. Whether padding is
    needed for `patch_size_t` says `latent_frames_for_model`.

    Raises:
        FactoryError: naming the nearest counts that are allowed.
    """
    if num_frames >= 1 and (num_frames % 4 == 1 or num_frames % 8 == 0):
        return
    below, above = max(num_frames - 1, 0) // 8 * 8 + 1, (max(num_frames, 2) + 6) // 8 * 8 + 1
    family = "CogVideoX1.5" if patch_size_t else "CogVideoX"
    choices = f"{below} or {above}" if below != above else f"{below}"
    raise FactoryError(
        f"num_frames={num_frames} does not fit the {family} VAE, which codes the first frame alone and then "
        f"four at a time. Use {choices} (8k + 1 comes back as many as went in); "
        "8k + 5 and 8k are possible too."
    )


def check_size(height: int, width: int) -> None:
    """Refuse a video size (pixels) the transformer cannot patch.

    Raises:
        FactoryError: naming the nearest size that is allowed.
    """
    if height >= SIZE_MULTIPLE and width >= SIZE_MULTIPLE and not (height % SIZE_MULTIPLE or width % SIZE_MULTIPLE):
        return
    near = [max(round(size / SIZE_MULTIPLE), 1) * SIZE_MULTIPLE for size in (height, width)]
    raise FactoryError(
        f"size {height}x{width} (height x width): both must be multiples of {SIZE_MULTIPLE} "
        f"(the VAE shrinks by {SPATIAL_COMPRESSION}, the transformer patches by 2). "
        f"Nearest: {near[0]}x{near[1]}."
    )
