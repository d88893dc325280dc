"""What would make a video smaller in memory while it is made, from numbers alone; estimates."""

from dataclasses import dataclass

from cogvideox_factory.models import TransformerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One video to be made, as numbers."""

    model: TransformerConfig
    num_frames: int
    height: int
    width: int
    item_bytes: int
    tiling: bool
    """The VAE decodes in tiles."""


_TILE = 240 * 360
_WIDEST = 128
"""Channels of the VAE's features at full size."""


def generation_savings(video: Generation, *, accelerator: bool) -> list[tuple[int, str]]:
    """Return (bytes saved, what to set) for what would make `video` smaller in memory, the most first; estimates.

    The transformer's pass, with and without the prompt, takes some 12 units of each beside the weights; the VAE, three
    maps of its widest features.
    """
    pixels = video.num_frames * video.height * video.width
    latents = pixels // (8 * 8 * video.model.temporal_compression_ratio)
    patch = video.model.patch_size**2 * (video.model.patch_size_t or 1)
    stream = 2 * 12 * latents // patch * video.model.width * video.item_bytes
    found, fewer = [], (video.num_frames // 16) * 8 + 1
    if fewer < video.num_frames:
        found.append((stream - stream * fewer // video.num_frames, f"--generate.num-frames {fewer}"))
    if video.item_bytes == 4 and accelerator:
        found.append((2 * video.model.num_parameters + stream // 2, "--run.dtype bfloat16"))
    if not video.tiling and video.height * video.width > _TILE:
        maps = 3 * _WIDEST * 8 * video.item_bytes
        found.append((maps * (video.height * video.width - _TILE), "--sampling.tiling True"))
    return sorted(found, reverse=True)
