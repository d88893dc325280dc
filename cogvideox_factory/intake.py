"""Clips, model and cache as the settings of a run name them: what `prepare` and `train` both start from.

No framework is needed here, so whether there is anything to encode is known before one is loaded.
"""

from functools import partial
from pathlib import Path
from typing import Any

from cogvideox_factory.config import Config
from cogvideox_factory.data.cache_index import CacheIndex
from cogvideox_factory.data.fingerprint import CacheSettings, TextSettings, VideoSettings, hash_folder, sha256_file
from cogvideox_factory.data.manifest import Manifest
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.data.mixture import Part, count_sets, read_parts
from cogvideox_factory.data.rows import CAPTION_COLUMN, IMAGE_COLUMN, VIDEO_COLUMN
from cogvideox_factory.data.survey import count_buckets, find_buckets, survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.windows import Windows
from cogvideox_factory.errors import DataError, FactoryError, UnfitError
from cogvideox_factory.metrics import progress_bar, say
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.shapes import ClipShape, check_buckets, clip_shape
from cogvideox_factory.weights import resolve_transformer

_COLUMNS = {"caption_column": CAPTION_COLUMN, "video_column": VIDEO_COLUMN, "image_column": IMAGE_COLUMN}
"""Columns that a cache records only where they have other names than these."""


def transformer_folder(config: Config, folder: Path) -> Path:
    """Return the transformer of the model folder, or the one that replaces it."""
    if not config.model.transformer:
        return folder / "transformer"
    return resolve_transformer(config.model.transformer, has_config=not config.model.transformer_config)


def transformer_config(config: Config, folder: Path) -> TransformerConfig:
    """Return the config of the transformer these settings name: a file's, or that of `transformer_folder`.

    Raises:
        UnfitError: a file that is not the config of the weights named beside it.
    """
    if not config.model.transformer_config:
        return TransformerConfig.from_folder(transformer_folder(config, folder))
    named = TransformerConfig.from_file(Path(config.model.transformer_config))
    if config.model.transformer:
        _require_described(transformer_folder(config, folder), named, file=config.model.transformer_config)
    return named


def _require_described(folder: Path, named: TransformerConfig, *, file: str) -> None:
    if not (folder / "config.json").is_file():
        return  # bare weights: their shapes are held to the config when they are read
    ours, theirs = named.to_dict(), TransformerConfig.from_folder(folder).to_dict()
    if lines := [f"  {key}  {file}: {ours[key]}  weights: {theirs[key]}" for key in ours if ours[key] != theirs[key]]:
        raise UnfitError(
            "\n".join([
                f"model.transformer_config={file} is not the config of the weights in {folder}:", *lines,
                "Leave model.transformer_config out; these weights have a config of their own.",
            ])
        )  # fmt: skip


def source_of(config: Config) -> dict[str, Any]:
    """Return where the clips of these settings come from, as a cache records it."""
    parts = []
    for values in config.data_sets:
        named = {name: values[name] for name in ("table", "captions", "videos")}
        columns = {name: values[name] for name, usual in _COLUMNS.items() if values[name] not in (None, usual)}
        parts.append({"root": str(Path(values["root"]).resolve())} | named | columns)
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
        f"  data.{key}  cache: {recorded.get(key, _COLUMNS.get(key))}  this run: {wanted.get(key, _COLUMNS.get(key))}"
        for key in {**recorded, **wanted}
        if recorded.get(key) != wanted.get(key) and key != "weights"  # nothing in a cache depends on those
    ]
    if lines:
        raise UnfitError(
            "\n".join([
                f"the cache {index.folder} was last prepared from other clips:", *lines,
                "Run `cogvideox prepare` with this data, or leave out --data.root to train on what the cache holds.",
            ])
        )  # fmt: skip


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
        data.buckets, rows.usable, spec, windows=windows, max_buckets=data.max_buckets, seed=config.run.seed, memo=memo,
        is_apart=True,
    )  # fmt: skip
    with progress_bar("reading clips", len(rows.usable)) as advance:
        manifest = survey(
            rows, spec, windows=windows, buckets=buckets, memo=memo, is_apart=True, on_clip=lambda clip: advance()
        )
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
    config: Config,
    folder: Path,
    transformer: TransformerConfig,
    spec: ClipSpec,
    dtype: str,
    *,
    memo: Memo | None = None,
) -> CacheSettings:
    """Return what the cache of these settings is made with, weights hashed (but for files `memo` knows as they are)."""
    hash_model = partial(hash_folder, hash_file=memo.sha256 if memo else sha256_file)
    variants = 1 + config.cache.image_noise_variants if config.task == "i2v" else 0
    return CacheSettings(
        model=config.model.path,
        video=VideoSettings.from_spec(
            spec, vae=hash_model(folder / "vae"), dtype=dtype, tiling=config.data.vae_tiling,
            image_variants=variants, seed=config.run.seed, buckets=bucket_rule(config, spec),
            windows=str(windows_of(config)),
        ),
        text=TextSettings(
            text_encoder=hash_model(folder / "text_encoder"), tokenizer=hash_model(folder / "tokenizer"),
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


def say_counts(manifest: Manifest) -> None:
    """Print how many clips ended in which state."""
    counts = ", ".join(f"{count} {state}" for state, count in manifest.counts().items())
    say(f"{len(manifest.clips)} clips: {counts}")
    for line in manifest.about_windows():
        say(f"  {line}")
