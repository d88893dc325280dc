"""`prepare`: videos and captions to a cache of latents and text embeddings, the part that takes a model.

Captions are encoded first, then clips, each in its turn with only its own model loaded. Threads decode the clips to
come and write what is made; the model runs in the main one.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from cogvideox_factory import preparation
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache_index import CacheIndex
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.entries import Failures, Job, Pixels, jobs_of, read_pixels, report_cut_captions, write_entry
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import progress_bar
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import (
    Mode,
    dtype_name,
    pick_device,
    pick_dtype,
    set_determinism,
)
from cogvideox_factory.mindspore_engine.encode import Encoder
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE
from cogvideox_factory.models import TransformerConfig

_READERS, _WRITERS = 2, 2


class MindSporeEngine:
    """This tower's part in `preparation.run`."""

    def __init__(self, *, graph: bool, jit_level: str) -> None:
        self._graph, self._jit_level = graph, jit_level

    def auto_dtype(self, device: str, transformer: TransformerConfig) -> str:
        """Return what `auto` comes to on `device`."""
        pick_device(device)
        return dtype_name(pick_dtype("auto", transformer))

    def encode(self, work: preparation.Work) -> dict[str, ClipError]:
        """Write the entries of `work`; return what went wrong, as `preparation.Engine.encode`."""
        pick_device(work.device)
        set_determinism(work.deterministic)
        mode, dtype = Mode(graph=self._graph, jit_level=self._jit_level), pick_dtype(work.dtype)
        if work.captions:
            text_encoder = TextEncoder.from_folder(work.folder, dtype=dtype, mode=mode)
            _encode_captions(work, text_encoder)
            del text_encoder
        if not work.clips and not work.images:
            return {}
        return _encode_clips(work, CogVideoXVAE.from_folder(work.folder / "vae", dtype=dtype, mode=mode))


def engine_of(config: Config) -> MindSporeEngine:
    """Return what `preparation.run` asks for.

    Raises:
        FactoryError: an amp level, which is for the transformer.
    """
    if config.mindspore.amp_level is not None:
        raise FactoryError(
            f"mindspore.amp_level={config.mindspore.amp_level} has no effect here: the VAE and the text encoder run in "
            "run.dtype; remove it"
        )
    return MindSporeEngine(graph=config.mindspore.mode == 0, jit_level=config.mindspore.jit_level)


def run(config: Config) -> CacheIndex:
    """Fill the cache of the settings and return what it holds.

    Raises:
        FactoryError: settings, data, model, cache or disk unfit; see the classes in `errors`.
    """
    index = preparation.run(config, lambda: engine_of(config))
    assert index is not None, "only a shard leaves something to others"
    return index


def _encode_captions(work: preparation.Work, encoder: TextEncoder) -> None:
    cache, captions = work.cache, work.captions
    length = cache.settings.text.max_sequence_length
    report_cut_captions(encoder.truncated_tokens, captions, length, strict=work.strict)
    with progress_bar("captions", len(captions)) as advance:
        for caption in captions:  # one by one, so that one graph serves all
            if not cache.has_caption(caption):  # another process may have made it since
                cache.write_caption(caption, to_array(encoder.encode([caption], length))[0])
            advance()


class _Moments(NamedTuple):
    """What becomes an entry."""

    arrays: dict[str, np.ndarray]
    crop: Mapping[str, int]


def _moments(read: Pixels, encoder: Encoder, job: Job) -> _Moments:
    """Return what the VAE makes of a clip or an image."""
    frames, made = to_tensor(read.frames), {}
    if not job.is_image:
        mean, logvar = encoder.video(frames[None])
        made = {"mean": to_array(mean)[0], "logvar": to_array(logvar)[0]}
    if read.sigma is not None and read.noise is not None:
        drawn = zip(to_tensor(read.sigma), to_tensor(read.noise), strict=True)
        images = [encoder.image(frames[:1], sigma[None], noise[None]) for sigma, noise in drawn]
        made["image_mean"] = np.concatenate([to_array(mean)[0, :1] for mean, _ in images])
        made["image_logvar"] = np.concatenate([to_array(logvar)[0, :1] for _, logvar in images])
        made["image_sigmas"] = read.sigma
    return _Moments(made, read.crop)


def _encode_clips(work: preparation.Work, vae: CogVideoXVAE) -> dict[str, ClipError]:
    """Encode and write; return what went wrong, as `preparation.Engine.encode`."""
    if work.cache.settings.video.tiling:
        vae.enable_tiling()
    encoder = Encoder(vae, None, max_sequence_length=0)
    jobs, failures = jobs_of(work), Failures(work)

    def encoded() -> Iterator[tuple[Job, _Moments | ClipError | None]]:
        for job, read in zip(jobs, ordered_map(lambda job: read_pixels(work, job), jobs, num_workers=_READERS)):
            yield job, _moments(read, encoder, job) if isinstance(read, Pixels) else read

    def write(made: tuple[Job, _Moments | ClipError | None]) -> ClipError | None:
        job, moments = made
        if not isinstance(moments, _Moments):
            return moments
        return write_entry(work, job, moments.arrays, moments.crop)

    with progress_bar("clips and images" if work.images else "clips", len(jobs)) as advance:
        for job, error in zip(jobs, ordered_map(write, encoded(), num_workers=_WRITERS), strict=True):
            failures.note(job, error)
            advance()
    failures.tell()
    return failures.by_entry
