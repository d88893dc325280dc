"""`cogvideox doctor`: what is in a data set and what would become of each clip, before any long work."""

import json
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.cli.settings import parse_with
from cogvideox_factory.config import Config
from cogvideox_factory.data.manifest import Manifest, Source, read_manifest
from cogvideox_factory.data.survey import survey
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import console, progress_bar, say
from cogvideox_factory.models import PUBLISHED, TransformerConfig
from cogvideox_factory.publish import publish_text
from cogvideox_factory.shapes import clip_shape
from cogvideox_factory.weights import resolve_model

DESCRIPTION = """Look at every clip of a data set: counts that add up, one named state a clip, the reason where one
cannot be used. Sizes, frames and frame rate are those of the settings, or of the model they name. Nothing is changed;
no framework is loaded. With data.strict any loss ends in exit code 3."""

SECTIONS = ("model", "data")


class Doctor(BaseModel):
    """What doctor alone is asked."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write the whole report here: total, counts, one entry a clip."""


def run(argv: list[str]) -> None:
    """Examine, print the table, write the report."""
    config, ask = parse_with("doctor", argv, sections=SECTIONS, description=DESCRIPTION, own=Doctor)
    manifest = examine(config)
    print_table(manifest)
    if ask.json_file:
        publish_text(Path(ask.json_file), json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
        say(f"report: {ask.json_file}")
    manifest.require_good(strict=config.data.strict, max_bad=config.data.max_bad)


def examine(config: Config) -> Manifest:
    """Return every row of the data set with its state.

    Raises:
        FactoryError: no data named, or no size to bring clips to.
        DataError: the list of clips itself cannot be read.
    """
    data = config.data
    if not data.root:
        raise FactoryError("which clips? give --data.root FOLDER")
    source = Source.choose(
        Path(data.root), table=data.table, captions=data.captions, videos=data.videos,
        caption_column=data.caption_column, video_column=data.video_column,
    )  # fmt: skip
    spec = _clip_spec(config)
    rows = read_manifest(source, trigger_word=data.trigger_word, allow_outside_root=data.allow_outside_root)
    with progress_bar("reading clips", len(rows.usable)) as advance:
        return survey(rows, spec, on_clip=lambda clip: advance())


def print_table(manifest: Manifest) -> None:
    """Print the counts and every clip that is lost, with its reason."""
    from rich.table import Table

    counts = Table("state", "clips", title=manifest.source, title_justify="left")
    for state, count in manifest.counts().items():
        counts.add_row(state, str(count))
    counts.add_section()
    counts.add_row("total", str(len(manifest.clips)))
    console.print(counts)
    for line in manifest.report()[1:]:
        say(line)


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
        short_policy=data.short_clips, crop=data.crop,
    )  # fmt: skip


def _transformer_config(config: Config) -> TransformerConfig:
    if config.model.transformer_config:
        file = Path(config.model.transformer_config)
        return TransformerConfig.from_folder(file.parent, filename=file.name)
    for facts in PUBLISHED.values():
        if config.model.path == facts.hub_id and not Path(config.model.path).is_dir():
            return facts.transformer  # nothing is downloaded for a look at clips
    return TransformerConfig.from_folder(resolve_model(config.model.path) / "transformer")
