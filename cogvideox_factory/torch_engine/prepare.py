"""`prepare`: videos and captions to a cache of latents and text embeddings.

Everything that can be known without a model is checked first, for all clips at once. Then captions are encoded, then
clips, each in its turn with only its own model loaded; what is in the cache already is not made again.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cogvideox_factory import draws, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache import Cache, CacheIndex
from cogvideox_factory.data.condition import read_condition
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings, hash_folder
from cogvideox_factory.data.manifest import Clip, Manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.mixture import Part, count_sets, read_parts
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.reasons import ClipError, printable
from cogvideox_factory.data.rows import IMAGE_COLUMN
from cogvideox_factory.data.survey import count_buckets, find_buckets, survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import DecodedClip, read_clip
from cogvideox_factory.data.windows import Windows
from cogvideox_factory.diffusion.frames import SPATIAL_COMPRESSION, num_latent_frames
from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.metrics import progress_bar, say
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.publish import require_room, sweep
from cogvideox_factory.shapes import ClipShape, check_buckets, check_task, clip_shape
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.device import pick_device, pick_dtype, set_determinism
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.pipeline import resolve_transformer
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE

_CAPTIONS_AT_ONCE = 8


def run(config: Config) -> CacheIndex:
    """Fill the cache of the settings and return what it holds.

    Raises:
        FactoryError: settings, data, model, cache or disk unfit; see the classes in `errors`.
    """
    if not config.cache.dir:
        raise FactoryError("where to? give --cache.dir FOLDER")
    if not config.data_sets:
        raise FactoryError("which clips? give --data.root FOLDER")
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    transformer = transformer_config(config, folder)
    check_task(config.task, transformer, source=str(folder))
    shape = training_shape(config, transformer)
    spec = clip_spec(config, shape)
    memo = Memo(Path(config.cache.dir) / "survey.jsonl")
    manifest = checked_manifest(config, spec, transformer, memo=memo)
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, transformer)
    cache = Cache(
        Path(config.cache.dir),
        cache_settings(config, folder, transformer, spec, str(dtype).removeprefix("torch.")),
    )
    captions, clips = cache.missing_captions(manifest.usable), cache.missing_clips(manifest.usable)
    images = cache.missing_images(manifest.usable)
    _check_room(cache, clips, images, transformer, num_captions=len(captions))
    if cache.folder.exists():
        sweep(cache.folder)
    memo.save()
    own = f"; {len(images)} images of their own to encode" if images else ""
    say(
        f"{len(manifest.usable)} clips, {len(clips)} to encode; {len(captions)} captions to encode{own} -> "
        f"{cache.folder}"
    )
    if (
        captions or clips or images
    ):  # torch takes seconds to load what this needs, and a finished cache needs none of it
        set_determinism(config.run.deterministic)
    if captions:
        _encode_captions(cache, captions, folder, device, dtype, strict=config.data.strict)
    if clips or images:
        failed = _encode_clips(cache, clips, images, config, folder, device, dtype)
        manifest = manifest.map_usable(lambda clip: _with_failure(clip, failed))
        manifest.require_good(strict=config.data.strict, max_bad=config.data.max_bad)
    index = cache.publish(manifest, source_of(config))
    say_counts(manifest)
    return index


def transformer_folder(config: Config, folder: Path) -> Path:
    """Return the transformer of the model folder, or the one that replaces it."""
    return resolve_transformer(config.model.transformer) if config.model.transformer else folder / "transformer"


def transformer_config(config: Config, folder: Path) -> TransformerConfig:
    """Return the config of the transformer these settings name: a file's, or that of `transformer_folder`."""
    if config.model.transformer_config:
        file = Path(config.model.transformer_config)
        return TransformerConfig.from_folder(file.parent, filename=file.name)
    return TransformerConfig.from_folder(transformer_folder(config, folder))


def source_of(config: Config) -> dict[str, Any]:
    """Return where the clips of these settings come from, as a cache records it."""
    parts = []
    for values in config.data_sets:
        named = {name: values[name] for name in ("table", "captions", "videos")}
        image = values["image_column"]
        parts.append(
            {"root": str(Path(values["root"]).resolve())} | named
            | ({"image_column": image} if image not in (None, IMAGE_COLUMN) else {})
        )  # fmt: skip
    if not config.data.sets:
        return parts[0]
    names = {part["name"]: value for part, value in zip(config.data_sets, parts, strict=True)}
    return {"sets": names, "weights": set_weights(config)}


def set_weights(config: Config) -> dict[str, float]:
    """Return the weight of each of several data sets; empty for one that is alone."""
    return {part["name"]: part["weight"] for part in config.data_sets if part["name"]}


def require_source(index: CacheIndex, config: Config) -> None:
    """Refuse a cache that was last prepared from other clips than the settings name.

    Raises:
        UnfitError: one line a difference.
    """
    recorded, wanted = index.recorded.get("source", {}), source_of(config)
    lines = [
        f"  data.{key}  cache: {recorded.get(key)}  this run: {value}"
        for key, value in {**dict.fromkeys(recorded), **wanted}.items()
        if recorded.get(key) != value and key != "weights"  # nothing in a cache depends on those
    ]
    if lines:
        raise UnfitError(
            "\n".join([
                f"the cache {index.folder} was last prepared from other clips:", *lines,
                "Run `cogvideox prepare` with this data, or leave out --data.root to train on what the cache holds.",
            ])
        )  # fmt: skip


def report_cut_captions(encoder: TextEncoder, captions: list[str], length: int, *, strict: bool) -> None:
    """Say which captions are longer than the model reads and how much of them is lost.

    Raises:
        DataError: there are some and `strict` is set.
    """
    cut = {text: count for text in captions if (count := encoder.truncated_tokens(text, length))}
    if not cut:
        return
    worst = sorted(cut, key=lambda text: -cut[text])[:20]
    lines = [f"{len(cut)} of {len(captions)} captions are longer than {length} tokens and will be cut; the longest:"]
    lines += [f"  {cut[text]} tokens lost: {printable(text[:60])}…" for text in worst]
    if strict:
        raise DataError("\n".join([*lines, "Shorten them, or turn --data.strict off."]))
    say("\n".join(lines))


def training_shape(config: Config, transformer: TransformerConfig) -> ClipShape:
    """Return the shape clips are brought to."""
    data = config.data
    return clip_shape(transformer, num_frames=data.num_frames, height=data.height, width=data.width, fps=data.fps)


def clip_spec(config: Config, shape: ClipShape) -> ClipSpec:
    """Return what the data ground needs to know of the shape and the policies."""
    return ClipSpec(
        num_frames=shape.num_frames, height=shape.height, width=shape.width, fps=shape.fps,
        fps_policy=config.data.fps_policy, short_policy=config.data.short_clips,
        max_slowdown=config.data.max_slowdown, crop=config.data.crop,
    )  # fmt: skip


def windows_of(config: Config) -> Windows:
    """Return what sources are cut into."""
    return Windows(policy=config.data.windows, most=config.data.max_windows, stride=config.data.window_stride)


def checked_manifest(
    config: Config, spec: ClipSpec, transformer: TransformerConfig | None = None, *, memo: Memo | None = None
) -> Manifest:
    """Read the rows, look at every clip that `memo` does not know, and print what becomes of them.

    Raises:
        FactoryError: a bucket file that cannot be read, or a bucket `transformer` cannot take.
        DataError: the list is unreadable, or too many clips are lost.
    """
    data = config.data
    parts = [Part.choose(**values) for values in config.data_sets]
    rows = read_parts(parts, trigger_word=data.trigger_word, allow_outside_root=data.allow_outside_root)
    windows = windows_of(config)
    buckets = find_buckets(
        data.buckets, rows.usable, spec, windows=windows, max_buckets=data.max_buckets, seed=config.run.seed, memo=memo
    )
    with progress_bar("reading clips", len(rows.usable)) as advance:
        manifest = survey(rows, spec, windows=windows, buckets=buckets, memo=memo, on_clip=lambda clip: advance())
    for line in manifest.report():
        say(line)
    for count in count_sets(manifest.clips, parts):
        say(f"  {count.name}: {count.usable} of {count.total} clips, weight {count.weight:g}")
        if not count.usable:
            raise DataError(
                f"data set {count.name} has no clip left to use, so its weight {count.weight:g} would mix in nothing. "
                "See above what became of its rows; mend it, or leave it out of data.sets."
            )
    if buckets and transformer:
        check_buckets(count_buckets(manifest.usable), transformer)
    manifest.require_good(strict=data.strict, max_bad=data.max_bad)
    return manifest


def cache_settings(
    config: Config, folder: Path, transformer: TransformerConfig, spec: ClipSpec, dtype: str
) -> CacheSettings:
    """Return what the cache of these settings is made with, weights hashed."""
    variants = 1 + config.cache.image_noise_variants if config.task == "i2v" else 0
    return CacheSettings(
        model=config.model.path,
        video=VideoSettings.from_spec(
            spec, vae=hash_folder(folder / "vae"), dtype=dtype, tiling=config.data.vae_tiling,
            image_variants=variants, seed=config.run.seed, buckets=bucket_rule(config, spec),
            windows=str(windows_of(config)),
        ),
        text=TextSettings(
            text_encoder=hash_folder(folder / "text_encoder"), tokenizer=hash_folder(folder / "tokenizer"),
            dtype=dtype, max_sequence_length=text_length(config, transformer),
        ),
        trigger_word=(config.data.trigger_word or "").strip(),
    )  # fmt: skip


def bucket_rule(config: Config, spec: ClipSpec) -> str | None:
    """Return what decides which bucket a clip goes to, as a cache records it."""
    buckets = find_buckets(config.data.buckets, [], spec, max_buckets=config.data.max_buckets, seed=config.run.seed)
    return buckets.to_json() if buckets else None


def text_length(config: Config, transformer: TransformerConfig) -> int:
    """Return the number of text tokens, the model's unless set.

    Raises:
        FactoryError: another length for a model whose positions are added to the text too.
    """
    length = config.text.max_sequence_length or transformer.max_text_seq_length
    if not transformer.use_rotary_positional_embeddings and length != transformer.max_text_seq_length:
        raise FactoryError(
            f"text.max_sequence_length={length}: this model takes exactly {transformer.max_text_seq_length} tokens"
        )
    return length


def image_variants(content: str, count: int, shape: tuple[int, ...], *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sigma [K] and pixel noise [K, H, W, 3] of the first frame of what has this hash: index 0 is clean.

    sigma = exp(N(-3, 0.5)), the augmentation the image-to-video models were trained with.
    """
    draw = draws.generator(seed, "image noise", content)
    sigma = np.exp(draw.normal(-3.0, 0.5, size=count)).astype(np.float32)
    sigma[0] = 0.0
    return sigma, draw.standard_normal((count, *shape), dtype=np.float32)


def say_counts(manifest: Manifest) -> None:
    """Print how many clips ended in which state."""
    counts = ", ".join(f"{count} {state}" for state, count in manifest.counts().items())
    say(f"{len(manifest.clips)} clips: {counts}")
    for line in manifest.about_windows():
        say(f"  {line}")


def _encode_captions(
    cache: Cache, captions: list[str], folder: Path, device: torch.device, dtype: torch.dtype, *, strict: bool
) -> None:
    encoder = TextEncoder.from_folder(folder, dtype=dtype, device=device)
    length = cache.settings.text.max_sequence_length
    report_cut_captions(encoder, captions, length, strict=strict)
    with progress_bar("captions", len(captions)) as advance:
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            chunk = captions[start : start + _CAPTIONS_AT_ONCE]
            for caption, embeds in zip(chunk, encoder.encode(chunk, length), strict=True):
                cache.write_caption(caption, to_array(embeds))
                advance()


def _encode_clips(
    cache: Cache,
    clips: list[Clip],
    images: list[Clip],
    config: Config,
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, ClipError]:
    """Encode and write; return the error of each clip (by footage; by id where it is its own image) that could not be
    decoded or encoded."""
    vae = CogVideoXVAE.from_folder(folder / "vae", dtype=dtype, device=device)
    if config.data.vae_tiling:
        vae.enable_tiling()
    encoder = Encoder(vae, None, max_sequence_length=0)
    failed: dict[str, ClipError] = {}
    seed = config.run.seed

    def decode(clip: Clip) -> DecodedClip | ClipError:
        assert clip.path is not None
        assert clip.spec is not None
        try:
            return read_clip(clip.path, clip.spec, rng=draws.generator(seed, "crop", clip.footage), stamp=clip.stamp)
        except ClipError as error:
            return error

    with progress_bar("clips", len(clips)) as advance:
        for clip, decoded in zip(clips, ordered_map(decode, clips, num_workers=2), strict=True):
            if isinstance(decoded, ClipError):
                failed[clip.footage] = decoded
            else:
                try:
                    _encode_clip(cache, clip, decoded, encoder, device, seed)
                except UnfitError as error:
                    failed[clip.footage] = ClipError("latent.nonfinite", str(error))
            advance()
    with progress_bar("images", len(images)) as advance:
        for clip in images:
            try:
                pixels = read_condition(clip, draws.generator(seed, "crop", clip.footage))
                cache.write_image(clip, **_encode_image(cache, pixels, clip.image_content or "", encoder, device, seed))
            except UnfitError as error:
                failed[clip.id] = ClipError("latent.nonfinite", str(error))
            except ClipError as error:
                failed[clip.id] = error
            advance()
    for clip in {clip.id: clip for clip in [*clips, *images]}.values():
        if error := failed.get(clip.footage) or failed.get(clip.id):
            say(f"{clip.place} {clip.name}: {error}")
    return failed


def _encode_clip(
    cache: Cache, clip: Clip, decoded: DecodedClip, encoder: Encoder, device: torch.device, seed: int
) -> None:
    pixels = decoded.pixels
    mean, logvar = encoder.video(to_tensor(pixels, device=device)[None])
    image: dict = {}
    if cache.settings.video.image_variants and not clip.image_content:
        image = _encode_image(cache, pixels[0], clip.footage, encoder, device, seed)
    crop = decoded.fit.to_json()
    cache.write_clip(clip, mean=to_array(mean[0]), logvar=to_array(logvar[0]), crop=crop, **image)


def _encode_image(
    cache: Cache, pixels: np.ndarray, content: str, encoder: Encoder, device: torch.device, seed: int
) -> dict:
    """Return what the cache keeps of the picture `pixels` [H, W, 3], clean then noised."""
    sigma, noise = image_variants(content, cache.settings.video.image_variants, pixels.shape, seed=seed)
    first = to_tensor(pixels, device=device)
    moments = [
        encoder.image(first[None], to_tensor(s[None], device=device), to_tensor(n[None], device=device))
        for s, n in zip(sigma, noise, strict=True)
    ]
    return {
        "image_mean": to_array(torch.cat([m[0, :1] for m, _ in moments])),
        "image_logvar": to_array(torch.cat([v[0, :1] for _, v in moments])),
        "image_sigmas": sigma.tolist(),
    }


def _with_failure(clip: Clip, failed: dict[str, ClipError]) -> Clip:
    error = failed.get(clip.footage) or failed.get(clip.id)
    return replace(clip).rejected(error) if error else clip


def _check_room(
    cache: Cache, clips: list[Clip], images: list[Clip], transformer: TransformerConfig, *, num_captions: int
) -> None:
    values = 0
    variants = cache.settings.video.image_variants
    for clip, is_image in [(clip, False) for clip in clips] + [(clip, True) for clip in images]:
        spec = clip.spec
        assert spec is not None
        latents = (spec.height // SPATIAL_COMPRESSION) * (spec.width // SPATIAL_COMPRESSION)
        frames = 0 if is_image else num_latent_frames(spec.num_frames)
        values += 2 * latents * (frames + (variants if is_image or not clip.image_content else 0))
    a_caption = cache.settings.text.max_sequence_length * transformer.text_embed_dim
    wanted = 2 * (values * transformer.out_channels + num_captions * a_caption)  # bf16
    require_room(cache.folder, wanted, what=f"the cache of {len(clips)} clips")
