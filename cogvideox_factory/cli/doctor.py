"""`cogvideox doctor`: what is in a data set and what would become of each clip, before any long work."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.cli.settings import parse_with
from cogvideox_factory.config import Config
from cogvideox_factory.data.caption_tokens import token_counter
from cogvideox_factory.data.census import Census, take_census, with_tokens
from cogvideox_factory.data.clean_list import require_free, write_clean_list
from cogvideox_factory.data.glimpse import Glimpse, contents, look_closer, thumbnails
from cogvideox_factory.data.manifest import Manifest
from cogvideox_factory.data.mixture import Part, SetCount, count_sets, read_parts
from cogvideox_factory.data.survey import count_buckets, find_buckets, survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.windows import Windows
from cogvideox_factory.errors import DataError, FactoryError
from cogvideox_factory.metrics import console, progress_bar, say
from cogvideox_factory.models import PUBLISHED, TransformerConfig
from cogvideox_factory.publish import publish_text
from cogvideox_factory.report import doctor_page
from cogvideox_factory.report.remarks import remarks
from cogvideox_factory.shapes import check_buckets, clip_shape
from cogvideox_factory.weights import EMBEDDED, resolve_model

DESCRIPTION = """Look at every clip of a data set: counts that add up, one named state a clip, the reason where one
cannot be used; durations, sizes, motion, black frames, scene cuts, clips that look alike; captions that are empty,
repeated or too long. Sizes, frames and frame rate are those of the settings, or of the model they name; a model folder
with a tokenizer also tells how many tokens are cut. Nothing is changed; no framework is loaded. With --strict any
loss, of a clip or the end of a caption, ends in exit code 3. `cogvideox doctor CACHE` looks at a cache instead, and
`cogvideox doctor RUN` at the checkpoints of a run."""

SECTIONS = ("task", "model", "data", "text")


class Doctor(BaseModel):
    """What doctor alone is asked."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write the whole report here: total, counts, one entry a clip, statistics."""
    html_file: Annotated[str | None, tyro.conf.arg(name="html")] = None
    """Write one self-contained page here: counts, reasons, histograms, pictures of the clips."""
    fix: str | None = None
    """Write a clean list here, a new .jsonl file with the clips that can be used; `--data.table` reads it. Nothing else
    is touched."""
    quick: bool = False
    """Decode no frames: no motion, black frames, scene cuts or likeness, and damage inside a file is not found."""
    strict: bool = False
    """Any loss, of a clip or the end of a caption, is exit code 3; `--data.strict` does the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Examination:
    """What was found."""

    manifest: Manifest
    census: Census
    spec: ClipSpec
    skipped: tuple[str, ...]
    """What was not looked at, and why."""
    parts: tuple[Part, ...] = ()
    """The data sets."""
    has_buckets: bool = False
    """Whether clips have sizes and lengths of their own."""

    @property
    def buckets(self) -> dict[str, int]:
        """Clips of each bucket, where a run has several."""
        if not self.has_buckets:
            return {}
        return {bucket.key: count for bucket, count in count_buckets(self.manifest.usable).items()}

    @property
    def sets(self) -> list[SetCount]:
        """What became of each data set, where several are mixed."""
        return count_sets(self.manifest.clips, self.parts)

    def to_json(self) -> dict:
        """Return the whole report."""
        more: dict = {"skipped": list(self.skipped), "buckets": self.buckets}
        if self.sets:
            more["sets"] = [asdict(count) | {"places": count.places} for count in self.sets]
        return self.manifest.to_json() | self.census.to_json() | more


def run(argv: list[str]) -> None:
    """Examine, print the tables, write what was asked for; a folder first is a cache or a run to look at."""
    if argv and Path(argv[0]).is_dir():
        from cogvideox_factory.cli import doctor_cache, doctor_run

        return doctor_run.run(argv) if doctor_run.is_run(Path(argv[0])) else doctor_cache.run(argv)
    config, ask = parse_with("doctor", argv, sections=SECTIONS, description=DESCRIPTION, own=Doctor)
    if ask.fix:
        if config.data.sets:
            raise FactoryError("--fix writes the list of one data set; examine each of data.sets with --data.root.")
        require_free(Path(ask.fix))  # said before the long look, not after
    found = examine(config, quick=ask.quick)
    print_tables(found)
    if ask.json_file:
        publish_text(Path(ask.json_file), json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n")
        say(f"report: {ask.json_file}")
    if ask.html_file:
        publish_text(Path(ask.html_file), _page(found))
        say(f"page: {ask.html_file}")
    if ask.fix:
        _write_clean(found, config, Path(ask.fix))
    strict = ask.strict or config.data.strict
    found.manifest.require_good(strict=strict, max_bad=config.data.max_bad)
    if strict and (cut := found.census.captions.too_long):
        raise DataError(
            f"strict allows no loss; {len(cut)} captions are longer than {found.census.captions.max_tokens} tokens and "
            f"would be cut (rows {', '.join(map(str, list(cut)[:20]))}). Shorten them, or ask without strict."
        )


def examine(config: Config, *, quick: bool = False) -> Examination:
    """Return every row of the data set with its state, and what all of them are like.

    Raises:
        FactoryError: no data named, or no size to bring clips to.
        DataError: the list of clips itself cannot be read.
    """
    data = config.data
    parts = _parts(config)
    spec = _clip_spec(config)
    skipped = []
    manifest = read_parts(parts, trigger_word=data.trigger_word, allow_outside_root=data.allow_outside_root)
    windows = Windows(policy=data.windows, most=data.max_windows, stride=data.window_stride)
    buckets = find_buckets(
        data.buckets, manifest.usable, spec, windows=windows, max_buckets=data.max_buckets, seed=config.run.seed,
        is_apart=True,
    )  # fmt: skip
    with progress_bar("reading clips", len(manifest.usable)) as advance:
        manifest = survey(
            manifest, spec, windows=windows, buckets=buckets, is_apart=True, on_clip=lambda clip: advance()
        )
    if buckets and (config.model.path or config.model.transformer_config):
        check_buckets(count_buckets(manifest.usable), _transformer_config(config))
    glimpses: Mapping[str, Glimpse] | None = None
    if quick:
        skipped.append("frames, as --quick asks: no motion, black frames, scene cuts, likeness, or damage inside files")
    else:
        with progress_bar("looking at frames", len(contents(manifest))) as advance:
            manifest, glimpses = look_closer(manifest, spec, is_apart=True, on_content=advance)
    max_tokens = None
    folder = _model_folder(config)
    count = token_counter(folder) if folder else None
    if count:
        max_tokens = config.text.max_sequence_length or _transformer_config(config).max_text_seq_length
        manifest = with_tokens(manifest, count, max_tokens)
    else:
        skipped.append("how many tokens captions have: that takes a model folder with a tokenizer (--model.path)")
    census = take_census(manifest, glimpses, max_tokens=max_tokens)
    return Examination(
        manifest=manifest, census=census, spec=spec, skipped=tuple(skipped), has_buckets=buckets is not None,
        parts=tuple(parts),
    )  # fmt: skip


def print_tables(found: Examination) -> None:
    """Print the counts, the numbers, what is worth knowing, and every clip that is lost, with its reason."""
    from rich.table import Table

    manifest, census = found.manifest, found.census
    counts = Table("state", "clips", title=manifest.source, title_justify="left")
    for state, count in manifest.counts().items():
        counts.add_row(state, str(count))
    counts.add_section()
    counts.add_row("total", str(len(manifest.clips)))
    console.print(counts)
    for line in manifest.about_windows():
        say(f"  {line}")
    if found.sets:
        sets = Table("data set", "clips", "can be used", "weight", "places an epoch")
        for count in found.sets:
            sets.add_row(count.name, *(f"{v:g}" for v in (count.total, count.usable, count.weight, count.places)))
        console.print(sets)
    if census.measures:
        numbers = Table("", "clips", "least", "median", "most")
        for measure in census.measures.values():
            low, high = measure.values.min(), measure.values.max()
            name = f"{measure.title}, {measure.unit}"
            numbers.add_row(name, str(len(measure.values)), *(f"{v:.4g}" for v in (low, measure.median, high)))
        console.print(numbers)
    if found.buckets:
        shapes = Table("bucket (frames x height x width)", "clips")
        for key, count in found.buckets.items():
            shapes.add_row(key, str(count))
        console.print(shapes)
    if census.sizes:
        sizes = [f"{size} ({count})" for size, count in list(census.sizes.items())[:8]]
        more = f", and {len(census.sizes) - 8} others" if len(census.sizes) > 8 else ""
        say(f"  sizes: {', '.join(sizes)}{more}")
    for title, text in remarks(manifest, census):
        say(f"  {title}: {text}")
    for line in manifest.about_losses():
        say(line)
    for reason in found.skipped:
        say(f"  not looked at: {reason}")


def _page(found: Examination) -> str:
    manifest = found.manifest
    numbers = set(doctor_page.numbers_to_show(manifest, found.census))
    shown = [clip for clip in manifest.usable if clip.number in numbers]
    with progress_bar("drawing the page", len(shown)) as advance:
        pictures = thumbnails(shown, on_clip=advance)
    return doctor_page.render(
        doctor_page.Findings(
            manifest=manifest,
            census=found.census,
            spec=found.spec,
            pictures=pictures,
            skipped=found.skipped,
            buckets=found.buckets,
        )
    )


def _write_clean(found: Examination, config: Config, file: Path) -> None:
    data = config.data
    if not found.manifest.usable:
        say(f"clean list: not written, no clip is left for {file}")
        return
    root = _parts(config)[0].source.root
    count = write_clean_list(
        found.manifest, file, root=root, caption_column=data.caption_column, video_column=data.video_column,
        trigger_word=data.trigger_word, image_column=data.image_column,
    )  # fmt: skip
    inside = file.resolve().is_relative_to(root.resolve())
    table = file.resolve().relative_to(root.resolve()) if inside else file.resolve()
    say(
        f"clean list: {file}, {count} of {len(found.manifest.rows)} rows. To use it: --data.root {root} "
        f"--data.table {table}"
    )


def _parts(config: Config) -> list[Part]:
    if not config.data_sets:
        raise FactoryError("which clips? give --data.root FOLDER")
    return [Part.choose(**values) for values in config.data_sets]


def _clip_spec(config: Config) -> ClipSpec:
    data = config.data
    size = (data.num_frames, data.height, data.width, data.fps)
    if config.model.path or config.model.transformer_config:
        shape = clip_shape(
            _transformer_config(config), num_frames=data.num_frames, height=data.height, width=data.width, fps=data.fps
        )
        size = (shape.num_frames, shape.height, shape.width, shape.fps)
    num_frames, height, width, fps = size
    if not (num_frames and height and width and fps):
        raise FactoryError(
            "to what size would the clips be brought? give --model.path MODEL, or --data.num-frames, --data.height, "
            "--data.width and --data.fps"
        )
    return ClipSpec(
        num_frames=num_frames, height=height, width=width, fps=fps, fps_policy=data.fps_policy,
        short_policy=data.short_clips, max_slowdown=data.max_slowdown, crop=data.crop,
    )  # fmt: skip


def _transformer_config(config: Config) -> TransformerConfig:
    if config.model.transformer_config:
        return TransformerConfig.from_file(Path(config.model.transformer_config))
    for facts in PUBLISHED.values():
        if config.model.path == facts.hub_id and not Path(config.model.path).is_dir():
            return facts.transformer  # nothing is downloaded for a look at clips
    return TransformerConfig.from_folder(resolve_model(config.model.path) / "transformer")


def _model_folder(config: Config) -> Path | None:
    """Return the folder of the model where it lies on this machine; nothing is downloaded for a look at clips."""
    path = config.model.path
    is_here = path in EMBEDDED or (path and Path(path).expanduser().is_dir())
    return resolve_model(path) if is_here else None
