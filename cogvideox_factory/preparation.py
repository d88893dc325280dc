"""`prepare`, but for the encoding: what the cache lacks, who makes it, and the list at the end.

Everything that can be known without a model is known first, for all clips at once and without a framework; an engine
is asked for only when something must be encoded. So running a finished preparation again costs a look at each file's
state and at each entry's header.

Several processes may prepare one cache at once. Entries never change and are looked for again right before they are
made, so they cannot spoil one another's work; to share it, each takes a shard (`Shard`). The one that ends last lists
the clips, and so does a plain run afterwards.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, Self

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache import Cache
from cogvideox_factory.data.cache_index import CacheIndex, recorded_dtype, text_hash
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.reasons import ClipError
from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, num_latent_frames
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.launcher import num_processes, rank_of
from cogvideox_factory.metrics import say
from cogvideox_factory.models import TransformerConfig, facts_for
from cogvideox_factory.publish import require_room, sweep
from cogvideox_factory.shapes import check_task


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """One of `count` equal parts of the work, chosen by content, so that every process cuts alike."""

    number: int = 1
    """From 1 to `count`."""
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read "2/4".

        Raises:
            FactoryError: not of that form, or no such part.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        number, count = map(int, match.groups()) if match else (0, 0)
        if not 1 <= number <= count:
            raise FactoryError(f"shard {text!r} is no part of the work; give I/N with I from 1 to N, such as 2/4.")
        return cls(number=number, count=count)

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def of_process(cls, environment: Mapping[str, str]) -> Self | None:
        """Return the part of this process where a launcher started several, by what it tells each of them."""
        count = num_processes(environment)
        return cls(number=rank_of(environment) + 1, count=count) if count > 1 else None

    def takes(self, digest: str) -> bool:
        """Tell whether what has this SHA-256 is of this part."""
        return int(digest, 16) % self.count == self.number - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """What is to be encoded, and how."""

    folder: Path
    """The model."""
    cache: Cache
    manifest: Manifest
    captions: list[str]
    """Distinct captions without an entry."""
    clips: list[Clip]
    """Clips without an entry, one an entry."""
    images: list[Clip]
    """Clips with an image of their own that has no entry, one an entry."""
    device: str
    deterministic: bool
    strict: bool
    """Whether a caption that is cut is an error."""
    seed: int

    @property
    def dtype(self) -> str:
        """What the encoders run in."""
        return self.cache.settings.video.dtype

    def lacking(self, manifest: Manifest) -> "Work":
        """Return what the cache lacks now of the clips of `manifest`."""
        clips = manifest.usable
        return replace(
            self, manifest=manifest, captions=self.cache.missing_captions(clips),
            clips=self.cache.missing_clips(clips), images=self.cache.missing_images(clips),
        )  # fmt: skip

    def of(self, shard: Shard) -> "Work":
        """Return the part of it that is of `shard`."""
        return replace(
            self,
            captions=[text for text in self.captions if shard.takes(text_hash(text))],
            clips=[clip for clip in self.clips if shard.takes(text_hash(clip.footage))],
            images=[clip for clip in self.images if shard.takes(clip.image_content or "0")],
        )

    @property
    def is_empty(self) -> bool:
        """Whether everything is there."""
        return not (self.captions or self.clips or self.images)

    def __str__(self) -> str:
        """How much it is."""
        images = f"; {len(self.images)} images of their own to encode" if self.images else ""
        return f"{len(self.clips)} to encode; {len(self.captions)} captions to encode{images}"


class Engine(Protocol):
    """What an engine does for it."""

    def auto_dtype(self, device: str, transformer: TransformerConfig) -> str:
        """Return what `auto` comes to on `device`."""
        ...

    def encode(self, work: Work) -> dict[str, ClipError]:
        """Write the entries of `work`; return what went wrong: by the footage of a clip that could not be encoded, by
        the entry (`Cache.image_file`) of an image of its own."""
        ...


def run(config: Config, engine: Callable[[], Engine], *, shard: Shard | None = None) -> CacheIndex | None:
    """Fill the cache of the settings and return what it holds, or None while other shards' clips are missing.

    Args:
        config: the settings.
        engine: loads the framework; called only when there is something for it to do.
        shard: encode only this part.

    Raises:
        FactoryError: settings, data, model, cache or disk unfit; see the classes in `errors`.
    """
    work = find_work(config, engine)
    mine = work.of(shard or Shard())
    where = f" (shard {shard})" if shard else ""
    say(f"{len(work.manifest.usable)} clips, {mine}{where} -> {work.cache.folder}")
    failed = {} if mine.is_empty else engine().encode(mine)
    manifest = work.manifest.map_usable(lambda clip: _with_failure(clip, failed, work.cache))
    if failed:
        manifest.require_good(strict=config.data.strict, max_bad=config.data.max_bad)
    left = work.lacking(manifest) if shard else None
    if left and not left.is_empty:
        images = f", {len(left.images)} images" if left.images else ""
        say(
            f"this shard is done; {len(left.clips)} clips{images} and {len(left.captions)} captions are with others, "
            "the last to end lists all"
        )
        return None
    index = work.cache.publish(manifest, intake.source_of(config))
    intake.say_counts(manifest)
    return index


def find_work(config: Config, engine: Callable[[], Engine]) -> Work:
    """Check settings, model and clips, make room, and return what the cache lacks.

    Raises:
        FactoryError: as `run`.
    """
    if not config.cache.dir:
        raise FactoryError("where to? give --cache.dir FOLDER")
    if not config.data_sets:
        raise FactoryError("which clips? give --data.root FOLDER")
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    transformer = intake.transformer_config(config, folder)
    check_task(config.task, transformer, source=str(folder))
    spec = intake.clip_spec(config, intake.training_shape(config, transformer))
    memo = Memo(Path(config.cache.dir) / "survey.jsonl")
    manifest = intake.checked_manifest(config, spec, transformer, memo=memo)
    dtype = choose_dtype(config, transformer, engine)
    cache = Cache(Path(config.cache.dir), intake.cache_settings(config, folder, transformer, spec, dtype, memo=memo))
    work = Work(
        folder=folder, cache=cache, manifest=manifest, captions=[], clips=[], images=[], device=config.run.device,
        deterministic=config.run.deterministic, strict=config.data.strict, seed=config.run.seed,
    ).lacking(manifest)  # fmt: skip
    _check_room(work, transformer)
    if cache.folder.exists():
        sweep(cache.folder)
    memo.save()
    return work


def choose_dtype(config: Config, transformer: TransformerConfig, engine: Callable[[], Engine]) -> str:
    """Return what the encoders are to run in.

    `auto` comes out differently on a card and on a CPU. A finished cache knows how it came out for it and is gone on
    with in the same way, wherever that is; else the engine is asked.
    """
    if config.run.dtype != "auto":
        return config.run.dtype
    if config.run.device == "cpu":
        return "float32"
    assert config.cache.dir is not None
    try:
        recorded = recorded_dtype(Path(config.cache.dir))
    except UnfitError:  # damaged, so it is written anew
        recorded = None
    if recorded in ("float32", facts_for(transformer).dtype):
        return recorded
    return engine().auto_dtype(config.run.device, transformer)


def _with_failure(clip: Clip, failed: dict[str, ClipError], cache: Cache) -> Clip:
    error = failed.get(clip.footage)
    if clip.image_content and not error:
        error = failed.get(cache.image_file(clip))
    return clip.rejected(error) if error else clip


def _check_room(work: Work, transformer: TransformerConfig) -> None:
    settings = work.cache.settings
    values = 0
    variants = settings.video.image_variants
    for clip, is_image in [(clip, False) for clip in work.clips] + [(clip, True) for clip in work.images]:
        spec = clip.spec
        assert spec is not None
        latents = (spec.height // SPATIAL_COMPRESSION) * (spec.width // SPATIAL_COMPRESSION)
        frames = 0 if is_image else num_latent_frames(spec.num_frames)
        values += 2 * latents * (frames + (variants if is_image or not clip.image_content else 0))
    a_caption = settings.text.max_sequence_length * transformer.text_embed_dim
    wanted = 2 * (values * transformer.out_channels + len(work.captions) * a_caption)  # bf16
    require_room(work.cache.folder, wanted, what=f"the cache of {len(work.clips)} clips")
