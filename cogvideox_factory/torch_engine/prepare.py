"""`prepare`: videos and captions to a cache of latents and text embeddings, the part that takes a model.

Captions are encoded first, then clips, each in its turn with only its own model loaded. Four things go on at once:
threads decode the clips to come (and draw their noise), pinned memory is copied to the device, the model runs, and
threads bring back and write what it made. The model's thread waits for none of the others as long as they keep up.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from cogvideox_factory import preparation
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache_index import CacheIndex
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.entries import Failures, Job, Pixels, jobs_of, read_pixels, report_cut_captions, write_entry
from cogvideox_factory.metrics import progress_bar
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.device import (
    DTYPES,
    dtype_name,
    pick_device,
    pick_dtype,
    pin,
    set_determinism,
    set_tf32,
    take_card,
)
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE

_CAPTIONS_AT_ONCE = 8
_READERS, _WRITERS = 2, 2


class TorchEngine:
    """This engine's part in `preparation.run`."""

    def auto_dtype(self, device: str, transformer: TransformerConfig) -> str:
        """Return what `auto` comes to on `device`."""
        return dtype_name(pick_dtype("auto", pick_device(device), transformer))

    def encode(self, work: preparation.Work) -> dict[str, ClipError]:
        """Write the entries of `work`; return what went wrong, as `preparation.Engine.encode`."""
        take_card(work.device)
        device = pick_device(work.device)
        set_determinism(work.deterministic)
        set_tf32(False, device)  # a cache that says float32 holds float32
        if work.captions:
            _encode_captions(work, device)
        return _encode_clips(work, device) if work.clips or work.images else {}


def engine_of(config: Config) -> TorchEngine:
    """Return what `preparation.run` asks for."""
    return TorchEngine()


def run(config: Config) -> CacheIndex:
    """Fill the cache of the settings and return what it holds.

    Raises:
        FactoryError: settings, data, model, cache or disk unfit; see the classes in `errors`.
    """
    index = preparation.run(config, TorchEngine)
    assert index is not None, "only a shard leaves something to others"
    return index


def _encode_captions(work: preparation.Work, device: torch.device) -> None:
    cache, captions = work.cache, work.captions
    encoder = TextEncoder.from_folder(work.folder, dtype=DTYPES[work.dtype], device=device)
    length = cache.settings.text.max_sequence_length
    report_cut_captions(encoder.truncated_tokens, captions, length, strict=work.strict)

    def encoded() -> Iterator[tuple[list[str], Tensor | None]]:
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            chunk = captions[start : start + _CAPTIONS_AT_ONCE]
            missing = [text for text in chunk if not cache.has_caption(text)]  # another process may have made it since
            yield missing, encoder.encode(missing, length) if missing else None

    def write(made: tuple[list[str], Tensor | None]) -> None:
        chunk, embeds = made
        if embeds is not None:
            for caption, array in zip(chunk, to_array(embeds), strict=True):
                cache.write_caption(caption, array)

    with progress_bar("captions", len(captions)) as advance:
        done = 0
        for _ in ordered_map(write, encoded(), num_workers=_WRITERS):
            for _ in captions[done : done + _CAPTIONS_AT_ONCE]:
                advance()
            done += _CAPTIONS_AT_ONCE


class _Pixels(NamedTuple):
    """What an entry is made of on its way to the device, in page-locked memory where that helps."""

    frames: Tensor
    """uint8 [F, H, W, 3], one frame of an image."""
    sigma: Tensor | None
    """[K] of the first frame, where its moments belong to the entry."""
    noise: Tensor | None
    """[K, H, W, 3]."""
    crop: Mapping[str, int]
    """Where a clip's pixels were cut from."""


class _Moments(NamedTuple):
    """What becomes an entry."""

    tensors: dict[str, Tensor]
    """On the device."""
    crop: Mapping[str, int]


Made = _Moments | ClipError | None
"""What becomes an entry, what went wrong, or nothing to do."""


def _encode_clips(work: preparation.Work, device: torch.device) -> dict[str, ClipError]:
    """Encode and write; return what went wrong, as `preparation.Engine.encode`."""
    vae = CogVideoXVAE.from_folder(work.folder / "vae", dtype=DTYPES[work.dtype], device=device)
    if work.cache.settings.video.tiling:
        vae.enable_tiling()
    encoder = Encoder(vae, None, max_sequence_length=0)
    jobs, failures = jobs_of(work), Failures(work)

    def encoded() -> Iterator[tuple[Job, Made]]:
        decoded = ordered_map(lambda job: _decode(work, job), jobs, num_workers=_READERS)
        for job, pixels in zip(jobs, decoded, strict=True):
            yield job, _moments(pixels, encoder, device, job) if isinstance(pixels, _Pixels) else pixels

    with progress_bar("clips and images" if work.images else "clips", len(jobs)) as advance:
        written = ordered_map(lambda made: _write(work, *made), encoded(), num_workers=_WRITERS)
        for job, error in zip(jobs, written, strict=True):
            failures.note(job, error)
            advance()
    failures.tell()
    return failures.by_entry


def _decode(work: preparation.Work, job: Job) -> _Pixels | ClipError | None:
    """Read what an entry is made of into page-locked memory; None if another process has made it since."""
    read = read_pixels(work, job)
    if not isinstance(read, Pixels):
        return read
    sigma, noise = (None if array is None else pin(to_tensor(array)) for array in (read.sigma, read.noise))
    return _Pixels(pin(to_tensor(read.frames)), sigma, noise, read.crop)


def _moments(pixels: _Pixels, encoder: Encoder, device: torch.device, job: Job) -> _Moments:
    """Return what the VAE makes of a clip or an image, on the device and perhaps still in the making there."""
    frames = pixels.frames.to(device, non_blocking=True)
    made: dict[str, Tensor] = {}
    if not job.is_image:
        mean, logvar = encoder.video(frames[None])
        made = {"mean": mean[0], "logvar": logvar[0]}
    if pixels.sigma is not None and pixels.noise is not None:
        sigma, noise = (drawn.to(device, non_blocking=True) for drawn in (pixels.sigma, pixels.noise))
        images = [encoder.image(frames[:1], s[None], n[None]) for s, n in zip(sigma, noise, strict=True)]
        made["image_mean"] = torch.cat([mean[0, :1] for mean, _ in images])
        made["image_logvar"] = torch.cat([logvar[0, :1] for _, logvar in images])
        made["image_sigmas"] = pixels.sigma
    return _Moments(made, pixels.crop)


def _write(work: preparation.Work, job: Job, made: Made) -> ClipError | None:
    """Bring moments back from the device and write them."""
    if not isinstance(made, _Moments):
        return made
    return write_entry(work, job, {name: to_array(tensor) for name, tensor in made.tensors.items()}, made.crop)
