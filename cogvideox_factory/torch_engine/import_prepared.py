"""`import-prepared`: what the older trainers' prepare_dataset wrote, checked and put into a cache of ours.

All files are read and judged first, then written. Latents and embeddings are taken as they are, rounded to bfloat16 as
in every cache; the embedding of the empty caption, which the older trainers did not have, is made with the recipe's
text encoder. That encoder and the VAE also encode a few captions and clips again, because the folder does not say what
made it: what they make must be what the folder holds.
"""

import io
import struct
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError  # a name to catch; nothing is unpickled through it
from typing import Any

import numpy as np
import torch

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config, Data
from cogvideox_factory.data.buckets import Bucket, read_buckets
from cogvideox_factory.data.cache import EMPTY_CAPTION, Cache
from cogvideox_factory.data.cache_index import CacheIndex
from cogvideox_factory.data.manifest import Clip, Manifest, Source
from cogvideox_factory.data.originals import Originals, Wanted, facts_of
from cogvideox_factory.data.paths import PathResolver
from cogvideox_factory.data.reasons import ClipError, printable
from cogvideox_factory.data.survey import count_buckets
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.diffusion.frames import encode_chunks
from cogvideox_factory.errors import DataError, FactoryError
from cogvideox_factory.metrics import progress_bar, say
from cogvideox_factory.models import TransformerConfig, VaeConfig
from cogvideox_factory.publish import sweep
from cogvideox_factory.shapes import check_buckets, check_task
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.device import dtype_name, pick_device, pick_dtype, set_determinism, set_tf32
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE

_NUM_TESTED = 3
# What a damaged tensor file raises, tried one byte at a time.
_UNREADABLE = (
    UnpicklingError, RuntimeError, EOFError, zipfile.BadZipFile, LookupError, AttributeError, TypeError,
    AssertionError, OSError, OverflowError, struct.error, ValueError,
)  # fmt: skip
# Another encoding of the same clip (the folder's mp4 went through a codec once more) is alike, another VAE is not.
_LEAST_CORRELATION = 0.7
# bfloat16 against float32 makes a few percent; another encoder, tokenizer or text makes more than half.
_MOST_ERROR = 0.15


def run(config: Config) -> CacheIndex:
    """Read the prepared folder `data.root`, fill the cache of the settings and return what it holds.

    Raises:
        FactoryError: settings, folder, model, cache or disk unfit; see the classes in `errors`.
    """
    _check_settings(config)
    _say_unused(config)
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    model = intake.transformer_config(config, folder)
    check_task(config.task, model, source=str(folder))
    spec = intake.clip_spec(config, intake.training_shape(config, model))
    originals = Originals(_source(config), _wanted(config, model, spec), read_pt=read_pt)
    manifest = _survey(originals, config, model)
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, model)
    set_determinism(config.run.deterministic)
    set_tf32(False, device)
    settings = intake.cache_settings(config, folder, model, spec, dtype_name(dtype)).as_imported()
    cache = Cache(Path(config.cache.dir or ""), settings)
    if cache.folder.exists():
        sweep(cache.folder)
    tests = _test_text(originals, manifest, cache, folder, device, dtype)
    tests |= _test_latents(originals, manifest, folder, device, dtype)
    failed = _write(originals, manifest, cache)
    manifest = manifest.map_usable(lambda clip: _with_failure(clip, failed))
    manifest.require_good(strict=config.data.strict, max_bad=config.data.max_bad)
    index = cache.publish(manifest, intake.source_of(config), imported=_described(originals, manifest, config, tests))
    intake.say_counts(manifest)
    say(f"imported into {cache.folder}; train with the same recipe and --cache.dir {cache.folder}")
    return index


def read_pt(data: bytes) -> np.ndarray:
    """Return the tensor that the bytes of a `.pt` file hold, as float32 where it was bfloat16.

    Only plain tensors are unpickled; no code of the file runs.

    Raises:
        ValueError: anything else.
    """
    if not data.startswith(b"PK\x03\x04"):
        raise ValueError("it is no tensor file of PyTorch 1.6 or newer")
    try:
        tensor = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise ValueError(f"it is no tensor file that can be read safely ({type(error).__name__})") from error
    if not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
        raise ValueError(f"it holds a {type(tensor).__name__}, not one dense tensor")
    return to_array(tensor.float() if tensor.dtype == torch.bfloat16 else tensor)


def _check_settings(config: Config) -> None:
    if not config.cache.dir:
        raise FactoryError("where to? give --cache.dir FOLDER")
    if config.data.sets:
        raise FactoryError("data.sets: one prepared folder is imported at a time; give --data.root FOLDER")
    if not config.data.root:
        raise FactoryError("which prepared folder? give --data.root FOLDER")
    if config.task == "i2v" and config.cache.image_noise_variants:
        raise FactoryError(
            f"cache.image_noise_variants={config.cache.image_noise_variants}: the older trainers kept only the clean "
            "first frame, and noise cannot be added to a latent. Set --cache.image-noise-variants 0, and train with "
            "--train.image-noise False; or run `cogvideox prepare` on the clips."
        )


def _say_unused(config: Config) -> None:
    """Name the settings that were decided when the folder was prepared."""
    data, usual = config.data, Data()
    names = ("fps", "fps_policy", "crop", "short_clips", "max_slowdown", "windows", "max_windows", "window_stride")
    unused = [name for name in (*names, "vae_tiling") if getattr(data, name) != getattr(usual, name)]
    if unused:
        given = ", ".join(f"data.{name}={getattr(data, name)}" for name in unused)
        say(f"without effect, because the clips were cut and encoded already: {given}")


def _source(config: Config) -> Source:
    data = config.data
    return Source.choose(
        Path(data.root), table=data.table, captions=data.captions, videos=data.videos,
        caption_column=data.caption_column, video_column=data.video_column,
    )  # fmt: skip


def _wanted(config: Config, model: TransformerConfig, spec: ClipSpec) -> Wanted:
    buckets = None
    if config.data.buckets == "auto":
        buckets = frozenset[Bucket]()
    elif config.data.buckets:
        buckets = frozenset(read_buckets(Path(config.data.buckets), seed=config.run.seed).all)
    return Wanted(
        spec=spec, buckets=buckets, latent_channels=model.out_channels, text_length=intake.text_length(config, model),
        text_width=model.text_embed_dim, image=config.task == "i2v",
    )  # fmt: skip


def _survey(originals: Originals, config: Config, model: TransformerConfig) -> Manifest:
    with progress_bar("reading what was prepared", len(originals.read.rows)) as advance:
        manifest = originals.survey(on_clip=advance)
    for line in manifest.report():
        say(line)
    trigger = (config.data.trigger_word or "").strip()
    without = [clip for clip in manifest.usable if not clip.caption.startswith(trigger)]
    if without:
        raise FactoryError(
            f"data.trigger_word={trigger!r} cannot be put in front of captions that are encoded already, and "
            f"{len(without)} do not begin with it (first: row {without[0].row}). Leave it out."
        )
    manifest.require_good(strict=config.data.strict, max_bad=config.data.max_bad)
    check_buckets(count_buckets(manifest.usable), model)
    return manifest


def _test_text(
    originals: Originals, manifest: Manifest, cache: Cache, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Write the empty caption; compare the recipe's text encoder with what a few captions of the folder became.

    Raises:
        DataError: it makes something else.
    """
    encoder = TextEncoder.from_folder(folder, dtype=dtype, device=device)
    clips = _spread(manifest.usable)
    made = [to_array(e.float()) for e in encoder.encode([EMPTY_CAPTION, *(c.caption for c in clips)],
                                                        originals.wanted.text_length)]  # fmt: skip
    errors = []
    for clip, ours in zip(clips, made[1:], strict=True):
        theirs = originals.prompt_embeds(clip)
        errors.append(float(np.linalg.norm(theirs - ours) / np.linalg.norm(ours)))
    worst = max(errors)
    if worst > _MOST_ERROR:
        clip = clips[errors.index(worst)]
        raise DataError(
            f"row {clip.row}, {printable(clip.caption[:60])!r}: its embedding differs by {worst:.0%} from what "
            f"{folder}/text_encoder makes of it (at most {_MOST_ERROR:.0%} is rounding). Another text encoder made it, "
            "or of another caption. Name the model the folder was prepared with, or run `cogvideox prepare`."
        )
    cache.write_caption(EMPTY_CAPTION, made[0])
    say(f"text: {len(clips)} captions encoded again differ by at most {worst:.2%} from the folder's")
    return {"text": {"clips": len(clips), "largest_relative_error": round(worst, 5)}}


def _test_latents(
    originals: Originals, manifest: Manifest, folder: Path, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Encode the start of a few of the folder's own videos again and compare.

    Raises:
        DataError: the latents are of another VAE or of other clips, or were multiplied by the scaling factor.
    """
    resolver = PathResolver(originals.root)
    pairs = []
    vae = None
    for clip in _spread(manifest.usable):
        try:
            pixels = _pixels(resolver.resolve(clip.name), clip)
        except ClipError as error:
            say(f"not tested: {error}")
            continue
        vae = vae or CogVideoXVAE.from_folder(folder / "vae", dtype=dtype, device=device)
        ours = to_array(Encoder(vae, None, max_sequence_length=0).video(to_tensor(pixels, device=device)[None])[0][0])
        ours = ours.astype(np.float32)
        pairs.append((originals.latents(clip).mean[: len(ours)], ours))
    if not pairs:
        say("latents: no video of the folder could be encoded again, so that they are this VAE's, unscaled, is assumed")
        return {"latents": {"clips": 0}}
    factor = VaeConfig.from_folder(folder / "vae").scaling_factor
    correlation = float(np.median([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in pairs]))
    ratio = float(np.median([a.std() / b.std() for a, b in pairs]))
    require_unscaled(correlation, ratio, factor, folder=folder)
    say(
        f"latents: {len(pairs)} videos encoded again correlate with the folder's by {correlation:.3f}, at {ratio:.3f} "
        "times their size, so they are this VAE's and unscaled"
    )
    return {
        "latents": {"clips": len(pairs), "correlation": round(correlation, 4), "size_ratio": round(ratio, 4)},
    }


def require_unscaled(correlation: float, ratio: float, factor: float, *, folder: Path) -> None:
    """Refuse latents that are not those of this VAE, as it makes them.

    Args:
        correlation: of the stored latents with those the VAE makes.
        ratio: standard deviation of the stored ones over that of the others.
        factor: the VAE's scaling factor.
        folder: of the model, for the message.

    Raises:
        DataError: another VAE, or scaled.
    """
    if not correlation >= _LEAST_CORRELATION:
        raise DataError(
            f"the latents correlate by {correlation:.2f} with what {folder}/vae makes of the folder's own videos "
            f"(at least {_LEAST_CORRELATION:g} is expected): another VAE made them, or of other clips. Name the model "
            "the folder was prepared with, or run `cogvideox prepare`."
        )
    distance = {scale: abs(np.log(ratio / scale)) for scale in (1.0, factor, 1 / factor)}
    scale = min(distance, key=lambda scale: distance[scale])
    if scale != 1.0:
        raise DataError(
            f"the latents are {ratio:.3f} times what {folder}/vae makes, which is nearer to {scale:.3f} (its scaling "
            f"factor {factor:g}, applied) than to 1. The older trainers stored them unscaled; these would be scaled "
            "twice. Divide them, or run `cogvideox prepare` on the clips."
        )


def _pixels(path: Path, clip: Clip) -> np.ndarray:
    """Return the frames [N, H, W, 3] of the first chunk the VAE encodes; the folder's videos have their final size."""
    assert clip.spec is not None
    spec = ClipSpec(
        num_frames=clip.spec.num_frames, height=clip.spec.height, width=clip.spec.width, fps=clip.spec.fps,
        fps_policy="stretch", crop="stretch",
    )  # fmt: skip
    return read_clip(path, spec).pixels[: encode_chunks(spec.num_frames)[0][1]]


def _write(originals: Originals, manifest: Manifest, cache: Cache) -> dict[str, ClipError]:
    """Write what is missing; return the error of each clip (by content) that could not be read again."""
    clips, captions = cache.missing_clips(manifest.usable), set(cache.missing_captions(manifest.usable))
    say(f"{len(manifest.usable)} clips, {len(clips)} to write; {len(captions)} captions to write -> {cache.folder}")
    failed: dict[str, ClipError] = {}
    wanted = {clip.id for clip in clips}
    with progress_bar("clips", len(manifest.usable)) as advance:
        for clip in manifest.usable:
            try:
                if clip.caption in captions:
                    cache.write_caption(clip.caption, originals.prompt_embeds(clip))
                    captions.discard(clip.caption)
                if clip.id in wanted:
                    _write_clip(originals, clip, cache)
            except ClipError as error:
                failed[clip.content or ""] = error
            advance()
    return failed


def _write_clip(originals: Originals, clip: Clip, cache: Cache) -> None:
    latents = originals.latents(clip)
    image: dict[str, Any] = {}
    if originals.wanted.image:
        first = originals.image_latents(clip)
        image = {"image_mean": first.mean, "image_logvar": first.logvar, "image_sigmas": [0.0]}
    cache.write_clip(clip, mean=latents.mean, logvar=latents.logvar, **image)


def _with_failure(clip: Clip, failed: dict[str, ClipError]) -> Clip:
    error = failed.get(clip.content or "")
    return clip.rejected(error) if error else clip


def _described(originals: Originals, manifest: Manifest, config: Config, tests: dict[str, Any]) -> dict[str, Any]:
    return {
        "from": str(originals.root.resolve()),
        "latents": facts_of(manifest),
        "assumed": f"made with the VAE, text encoder and tokenizer of {config.model.path}, unscaled",
        "tested": tests,
        "made_here": ["the embedding of the empty caption"],
    }


def _spread(clips: Iterable[Clip]) -> list[Clip]:
    """Return a few clips from all over the list."""
    listed = list(clips)
    places = np.linspace(0, len(listed) - 1, min(_NUM_TESTED, len(listed))).round().astype(int)
    return [listed[place] for place in places]
