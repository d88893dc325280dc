"""Batches of a run: step N as a dict of arrays, from a cache or from raw clips, with all its random numbers.

A batch depends on the seed and the step alone. Every number is drawn for (purpose, epoch, clip), which names
a place in a run once, so batches are the same for any number of ranks and threads and after any restart.
Threads read ahead; they change when a batch is made, never what is in it.

B batch, F latent frames (P of them padding in front), C latent channels, h w latent height and width; N, H, W
frames, height and width in pixels; S text tokens, E text width.

| key | shape | from |
|---|---|---|
| mean, logvar | [B, F, C, h, w] bf16 | cache |
| prompt_embeds | [B, S, E] bf16 | cache; the empty caption's where `caption_keep` is False |
| image_mean, image_logvar | [B, 1, C, h, w] bf16 | cache, i2v: one noised first frame drawn from those kept |
| pixels | [B, N, H, W, 3] uint8 | raw clips, already flipped where `flipped` |
| image_pixels | [B, H, W, 3] uint8 | raw clips, i2v, where some have images of their own: those, or first frames |
| captions | list of B | raw clips; empty where `caption_keep` is False |
| flipped | [B] bool | raw clips |
| image_noise_sigma, image_pixel_noise | [B], [B, H, W, 3] f32 | raw clips, i2v |
| image_posterior_noise, image_keep | [B, 1, C, h, w] f32, [B] bool | i2v |
| timesteps | [B] int64, uniform in [0, 1000) | |
| noise | [B, P + F, C, h, w] f32 | |
| posterior_noise | [B, F, C, h, w] f32 | |
| caption_keep | [B] bool | |
| clip_ids | list of B | |
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.cache_index import CachedClip, CacheIndex
from cogvideox_factory.data.condition import read_condition
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.sampler import Pick, Sampler
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, num_latent_frames
from cogvideox_factory.draws import generator, normal

Batch = dict[str, Any]
NUM_TRAIN_TIMESTEPS = 1000
# log sigma of the noise on the first frame, as the models were trained (CogVideoX, arXiv 2408.06072).
IMAGE_LOG_SIGMA_MEAN, IMAGE_LOG_SIGMA_STD = -3.0, 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Draws:
    """What is drawn for each sample, and how often things are dropped."""

    seed: int
    patch_size_t: int | None = None
    """Latent frames the model patches together; what a clip lacks is padded in front, and gets noise too."""
    caption_dropout: float = 0.0
    image_dropout: float = 0.0
    flip_probability: float = 0.0
    """Raw clips only."""
    image_to_video: bool = False
    image_noise: bool = True
    """Image-to-video: whether first frames are noised."""

    def generator(self, purpose: str, pick: Pick) -> np.random.Generator:
        """Return the generator of one purpose at one place of the run."""
        return generator(self.seed, purpose, pick.epoch, pick.clip_id)

    def timestep(self, pick: Pick) -> int:
        """Return the timestep of one place of the run."""
        return int(self.generator("timestep", pick).integers(NUM_TRAIN_TIMESTEPS))

    def sample(self, pick: Pick, latent_shape: tuple[int, ...]) -> dict[str, Any]:
        """Return the draws both kinds of source share; `latent_shape` is (F, C, h, w) of the clip's moments."""
        frames, *rest = latent_shape
        num_front_padding = -frames % (self.patch_size_t or 1)
        drawn: dict[str, Any] = {
            "timesteps": np.int64(self.timestep(pick)),
            "noise": self._normal("noise", pick, (num_front_padding + frames, *rest)),
            "posterior_noise": self._normal("posterior noise", pick, latent_shape),
            "caption_keep": np.bool_(self.generator("caption", pick).random() >= self.caption_dropout),
        }
        if self.image_to_video:
            drawn["image_posterior_noise"] = self._normal("image posterior noise", pick, (1, *rest))
            drawn["image_keep"] = np.bool_(self.generator("image", pick).random() >= self.image_dropout)
        return drawn

    def _normal(self, purpose: str, pick: Pick, shape: tuple[int, ...]) -> np.ndarray:
        return normal(self.seed, purpose, pick.epoch, pick.clip_id, shape=shape)


def image_sigma(rng: np.random.Generator) -> float:
    """Draw the strength of the noise on a first frame: exp(N(-3, 0.5)), for pixels in [-1, 1]."""
    return float(np.exp(rng.normal(IMAGE_LOG_SIGMA_MEAN, IMAGE_LOG_SIGMA_STD)))


class Source(Protocol):
    """Where samples come from."""

    def sample(self, pick: Pick, draws: Draws) -> dict[str, Any]:
        """Return one sample, without the batch axis."""
        ...

    def name(self, clip_id: str) -> str:
        """Return what to call a clip in an error."""
        ...


class CacheSource:
    """Samples from a prepared cache. Each entry's checksum is computed the first time it is read."""

    def __init__(self, index: CacheIndex) -> None:
        self.counts: dict[str, int] = index.recorded.get("counts", {})
        """Clips of the list by the state they ended in."""
        self._clips: dict[str, CachedClip] = {clip.id: clip for clip in index.clips}
        self._empty = read_entry(index.empty_file, verify=True)[0]["prompt_embeds"]
        self._empty.flags.writeable = False  # many batches share it
        self._verified: set[Any] = set()

    @property
    def buckets(self) -> dict[str, str]:
        """Shape key of each clip, for `Sampler`."""
        return {clip.id: clip.bucket for clip in self._clips.values()}

    @property
    def sets(self) -> dict[str, str]:
        """Data set of each clip, for `Sampler`."""
        return {clip.id: clip.set for clip in self._clips.values()}

    def name(self, clip_id: str) -> str:
        """Return the clip's path in the list it came from."""
        return self._clips[clip_id].name

    def sample(self, pick: Pick, draws: Draws) -> dict[str, Any]:
        """Read moments and embedding of one clip."""
        clip = self._clips[pick.clip_id]
        moments = self._read(clip.clip_file)
        drawn = draws.sample(pick, moments["mean"].shape)
        sample = {"mean": moments["mean"], "logvar": moments["logvar"], **drawn}
        keep = drawn["caption_keep"]
        sample["prompt_embeds"] = self._read(clip.text_file)["prompt_embeds"] if keep else self._empty
        if draws.image_to_video:
            if clip.image_file:
                moments = self._read(clip.image_file)
            variant = self._variant(len(moments["image_mean"]), pick, draws)
            for key in ("image_mean", "image_logvar"):
                sample[key] = moments[key][variant : variant + 1]
        return sample

    def _variant(self, kept: int, pick: Pick, draws: Draws) -> int:
        """Choose the clean first frame (0), or one of the noised ones where some are kept and wanted."""
        if not draws.image_noise or kept == 1:
            return 0
        return int(draws.generator("image variant", pick).integers(1, kept))

    def _read(self, path: Any) -> dict[str, np.ndarray]:
        arrays, _ = read_entry(path, verify=path not in self._verified)
        self._verified.add(path)
        return arrays


class RawSource:
    """Samples decoded from clips at every step.

    Args:
        clips: surveyed usable clips.
        latent_channels: of the VAE that will encode them.
        counts: clips of the list by the state they ended in.
    """

    def __init__(self, clips: list[Clip], *, latent_channels: int, counts: Mapping[str, int] | None = None) -> None:
        self.counts = dict(counts or {})
        self._clips = {clip.id: clip for clip in clips}
        self._latent_channels = latent_channels
        self._has_images = any(clip.image_path for clip in clips)

    @property
    def buckets(self) -> dict[str, str]:
        """Shape key of each clip, for `Sampler`."""
        specs = {clip_id: _spec(clip) for clip_id, clip in self._clips.items()}
        return {clip_id: Bucket(s.num_frames, s.height, s.width).key for clip_id, s in specs.items()}

    @property
    def sets(self) -> dict[str, str]:
        """Data set of each clip, for `Sampler`."""
        return {clip_id: clip.set for clip_id, clip in self._clips.items()}

    def name(self, clip_id: str) -> str:
        """Return the clip's path in the list it came from."""
        return self._clips[clip_id].name

    @property
    def captions(self) -> list[str]:
        """Every distinct caption, the empty one first."""
        return list(dict.fromkeys(["", *(clip.caption for clip in self._clips.values())]))

    def sample(self, pick: Pick, draws: Draws) -> dict[str, Any]:
        """Decode one clip; crop and flip are drawn once for all its frames."""
        clip = self._clips[pick.clip_id]
        assert clip.path is not None
        spec = _spec(clip)
        size = (spec.height // SPATIAL_COMPRESSION, spec.width // SPATIAL_COMPRESSION)
        sample = draws.sample(pick, (num_latent_frames(spec.num_frames), self._latent_channels, *size))
        pixels = read_clip(clip.path, spec, rng=draws.generator("crop", pick), stamp=clip.stamp).pixels
        flipped = np.bool_(draws.generator("flip", pick).random() < draws.flip_probability)
        sample["pixels"] = pixels[:, :, ::-1] if flipped else pixels
        sample["flipped"] = flipped
        sample["captions"] = clip.caption if sample["caption_keep"] else ""
        if draws.image_to_video:
            rng = draws.generator("image noise", pick)
            sample["image_noise_sigma"] = np.float32(image_sigma(rng) if draws.image_noise else 0)
            sample["image_pixel_noise"] = rng.standard_normal(pixels.shape[1:], dtype=np.float32)
            if self._has_images:
                image = read_condition(clip, draws.generator("crop", pick)) if clip.image_path else pixels[0]
                sample["image_pixels"] = image[:, ::-1] if flipped else image
        return sample


def _spec(clip: Clip) -> ClipSpec:
    assert clip.spec is not None, f"{clip.name} has not been surveyed"
    return clip.spec


class Loader:
    """Makes the batches of one data-parallel rank.

    Args:
        source: samples.
        sampler: which clips a step has.
        draws: random numbers.
        rank: data-parallel rank of this process.
        num_ranks: data-parallel ranks.
        num_micros: accumulation steps a step.
        num_workers: threads that read ahead; 0 reads when asked.
        ahead: batches kept ready or in the making.
    """

    def __init__(
        self,
        source: Source,
        sampler: Sampler,
        draws: Draws,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        num_micros: int = 1,
        num_workers: int = 2,
        ahead: int | None = None,
    ) -> None:
        self._source, self._sampler, self._draws = source, sampler, draws
        self.rank, self.num_ranks, self.num_micros = rank, num_ranks, num_micros
        self._num_workers, self._ahead = num_workers, ahead
        self.picks(0)  # an uneven batch is known now, not at the first step

    def picks(self, step: int, micro: int = 0, *, rank: int | None = None) -> list[Pick]:
        """Return which clips this rank (or another) computes in accumulation step `micro` of `step`."""
        rank = self.rank if rank is None else rank
        return self._sampler.share(
            step, rank=rank, num_ranks=self.num_ranks, micro=micro, num_micros=self.num_micros
        )  # fmt: skip

    def name(self, clip_id: str) -> str:
        """Return what to call a clip."""
        return self._source.name(clip_id)

    def batch(self, step: int, micro: int = 0) -> Batch:
        """Return the batch of accumulation step `micro` of `step`, made here and now.

        Raises:
            UnfitError: a damaged cache entry.
            ClipError: a clip that cannot be decoded. Both name the clip.
        """
        picks = self.picks(step, micro)
        return collate([self._sample(pick, step) for pick in picks], picks)

    def _sample(self, pick: Pick, step: int) -> dict[str, Any]:
        try:
            return self._source.sample(pick, self._draws)
        except Exception as error:
            error.add_note(f"while reading clip {self._source.name(pick.clip_id)} ({pick.clip_id}) for step {step}")
            raise

    def batches(self, start: int, stop: int | None = None) -> Iterator[Batch]:
        """Yield the batches of steps `start`, `start` + 1, … below `stop`, each step's accumulation steps in
        turn.

        An error in a thread is raised here, at its batch's turn.
        """
        places = ((step, micro) for step in _count(start, stop) for micro in range(self.num_micros))
        make = partial(_call, self.batch)
        return ordered_map(make, places, num_workers=self._num_workers, ahead=self._ahead)


def _call(function: Any, place: tuple[int, int]) -> Batch:
    return function(*place)


def _count(start: int, stop: int | None) -> Iterator[int]:
    while stop is None or start < stop:
        yield start
        start += 1


def collate(samples: list[dict[str, Any]], picks: list[Pick]) -> Batch:
    """Stack samples along a new first axis; text stays a list. A batch of one is made of views, not copied."""
    batch: Batch = {"clip_ids": [pick.clip_id for pick in picks]}
    for key, first in samples[0].items():
        values = [sample[key] for sample in samples]
        if isinstance(first, str):
            batch[key] = values
        else:
            batch[key] = first[None] if len(values) == 1 else np.stack(values)
    return batch


def shape_of(batch: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Return the shape of each array of a batch."""
    return {key: value.shape for key, value in batch.items() if isinstance(value, np.ndarray)}
