"""Which videos the settings ask for, what makes each of them what it is, and which are there already.

A record is a recipe for one video: settings with everything filled in, hashes of the files that went into it, and
versions. It is embedded in the video and lies beside it as JSON, so that any video can be made again
(`cogvideox generate --like video.mp4`) and a batch that was interrupted knows what it has.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from cogvideox_factory.config import Config
from cogvideox_factory.data.export import read_note
from cogvideox_factory.data.fingerprint import sha256_file
from cogvideox_factory.data.manifest import read_lines
from cogvideox_factory.errors import DataError, FactoryError, StorageError, UnfitError
from cogvideox_factory.lora_files import resolve_lora
from cogvideox_factory.metrics import say
from cogvideox_factory.recipe import check
from cogvideox_factory.shapes import ClipShape
from cogvideox_factory.weights import resolve_transformer, sample_digest

FORMAT = 1
_ENDINGS = (".mp4", ".gif", ".webp", ".npy")
_FOREIGN_ENDINGS = (".avi", ".m4v", ".mkv", ".mov", ".webm", ".jpeg", ".jpg", ".png")
"""Of files that are not written here: a folder is hardly meant."""
_OF_A_BATCH = ("prompt_file", "num_videos", "seeds", "out", "overwrite", "format", "prompt_cache")
"""Settings of `generate` that say which videos there are and where things lie, not what one of them is."""
_OF_THE_MACHINE = ("offload", "offload_group")
"""Settings of `generate` that no bit of a video depends on."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One video to make."""

    prompt: str
    seed: int
    path: Path
    image: Path | None = None
    """What it starts from (image-to-video)."""
    video: Path | None = None
    """What it is made of (video-to-video), or goes on from (`generate.extend`)."""

    @property
    def record_path(self) -> Path:
        """Where its record lies beside it."""
        return self.path.with_suffix(".json")


def plan_jobs(config: Config) -> list[Job]:
    """Return the videos to make, in the order they are named, refusing what cannot be made.

    Raises:
        FactoryError: no prompt, no image for i2v, counts that do not fit.
        DataError: an image or a video that is not there.
    """
    ask = config.generate
    prompts = list(ask.prompt)
    if ask.prompt_file:
        prompts += [line for line in read_lines(Path(ask.prompt_file)) if line.strip()]
    if not prompts:
        raise FactoryError('no prompt: give --generate.prompt "..." or --generate.prompt-file FILE')
    needed = config.task == "i2v" and not ask.extend
    images = _one_each("image", ask.image, prompts, needed=needed, why=f"task={config.task}")
    videos = _one_each("extend" if ask.extend else "video", ask.extend or ask.video, prompts, needed=False, why="")
    if ask.seeds and len(ask.seeds) != len(prompts):
        raise FactoryError(f"generate.seeds has {len(ask.seeds)} values for {len(prompts)} prompts; give one each")
    seeds = ask.seeds or [config.run.seed] * len(prompts)
    named = [
        (prompt, image, video, seed + number, f"-{seed + number}" if ask.num_videos > 1 else "")
        for prompt, image, video, seed in zip(prompts, images, videos, seeds, strict=True)
        for number in range(ask.num_videos)
    ]
    paths = _paths(ask.out, ask.format, ask.codec, [(prompt, suffix) for prompt, *_, suffix in named])
    return [
        Job(prompt=prompt, image=image, video=video, seed=seed, path=path)
        for (prompt, image, video, seed, _), path in zip(named, paths, strict=True)
    ]


def _one_each(name: str, given: Sequence[str], prompts: list[str], *, needed: bool, why: str) -> Sequence[Path | None]:
    """Return one file a prompt: of as many files, of one for all, or none."""
    if not given and not needed:
        return [None] * len(prompts)
    if len(given) not in (1, len(prompts)):
        raise FactoryError(
            f"{why + ' needs ' if why else ''}one {name}, or one a prompt: {len(given)} {name}(s) for {len(prompts)} "
            f"prompt(s). Give --generate.{name} FILE [FILE ...]"
        )
    for file in given:
        if not Path(file).is_file():
            raise DataError(f"{file}: no such {'image' if name == 'image' else 'video'}")
    return [Path(file) for file in given] * (len(prompts) if len(given) == 1 else 1)


def _paths(out: str, kind: str, codec: str, named: Sequence[tuple[str, str]]) -> list[Path]:
    folder, ending = Path(out), Path(out).suffix.lower()
    if ending in _FOREIGN_ENDINGS:
        raise FactoryError(
            f"generate.out={out}: {ending} is not written; end the name with {', '.join(_ENDINGS)}, or give a folder "
            "(with --generate.format png for pictures)"
        )
    if ending not in _ENDINGS:
        ending = "" if kind == "png" else f".{kind}"
        return [folder / file_name(index, prompt, suffix + ending) for index, (prompt, suffix) in enumerate(named)]
    if len(named) > 1:
        raise FactoryError(f"generate.out={out} is one file for {len(named)} videos; give a folder")
    if kind not in ("mp4", ending[1:]):
        raise FactoryError(
            f"generate.out={out} and generate.format={kind} name two formats; pass --generate.format {ending[1:]}, or "
            "give a folder"
        )
    if ending != ".mp4" and codec != "h264":
        raise FactoryError(f"generate.codec={codec} has no effect with generate.out={out}; remove it")
    return [folder]


def file_name(index: int, prompt: str, ending: str) -> str:
    """Return a short file name that says which prompt it was."""
    slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:48].strip("-")
    return f"{index:03}-{slug or 'video'}{ending}"


# --- records ----------------------------------------------------------------------------------------------------------


def make_records(
    jobs: Sequence[Job],
    config: Config,
    shape: ClipShape,
    *,
    device: str,
    dtype: str,
    tiling: bool,
    versions: Mapping[str, str],
) -> list[dict[str, Any]]:
    """Return what makes each video what it is; `device` is a kind, such as "cuda", `tiling` what auto came to."""
    digest = cache(sha256_file)  # most files go into many videos

    def digests(files: Iterable[Path | None]) -> dict[str, str]:
        return {str(file): digest(file) for file in files if file is not None}

    loras = [resolve_lora(path) for path in config.generate.lora]
    common = config.model_dump(include={"task", "model", "text", "sampling"} | _engine(config))
    common["sampling"]["tiling"] = tiling
    ask = config.generate.model_dump(exclude={*_OF_A_BATCH, *_OF_THE_MACHINE})
    ask |= {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width, "fps": float(shape.fps)}
    machine = config.run.model_dump() | {"device": device, "dtype": dtype}
    folders = _digests_of_folders(config)
    records = []
    for job in jobs:
        source = {"image": [str(job.image)] if job.image else []}
        source |= {name: [str(job.video)] if ask[name] else [] for name in ("video", "extend")}
        settings = common | {"generate": ask | source | {"prompt": [job.prompt]}, "run": machine | {"seed": job.seed}}
        records.append(
            {
                "format": FORMAT,
                "prompt": job.prompt,
                "image": str(job.image) if job.image else None,
                "settings": settings,
                "files": digests([job.image, job.video, *loras]),
                "folders": folders,
                "versions": dict(versions),
            }
        )
    return records


def _digests_of_folders(config: Config) -> dict[str, str]:
    """Return a digest of samples of the transformer that replaces the model's, if one does."""
    name = config.model.transformer
    if name is None:
        return {}
    return {name: sample_digest(resolve_transformer(name, has_config=config.model.transformer_config is None))}


def _engine(config: Config) -> set[str]:
    """Return the sections that say what computes, where it is not PyTorch: older records say nothing of it."""
    return set() if config.engine == "torch" else {"engine", config.engine}


def left_to_make(
    jobs: Sequence[Job], records: Sequence[dict[str, Any]], *, overwrite: bool, any_tiling: bool = False
) -> list[tuple[Job, dict[str, Any]]]:
    """Return the jobs that are not done, with their records; a video made of the same record is done.

    With `any_tiling` a video is that was decoded otherwise, because another time other memory was free.

    Raises:
        StorageError: something else has the name of a video, and `overwrite` is off.
    """
    left, strangers = [], []
    for job, record in zip(jobs, records, strict=True):
        if overwrite or not job.path.exists():
            left.append((job, record))
        elif _same(_recorded(job), record, any_tiling=any_tiling):
            continue
        else:
            strangers.append(str(job.path))
    if strangers:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise StorageError(
            f"{', '.join(strangers[:3])}{more} exist(s) already, made with other settings; choose another "
            "--generate.out, or pass --generate.overwrite True"
        )
    if done := len(jobs) - len(left):
        say(f"{done} of {len(jobs)} video(s) are there already, made with these settings")
    return left


def _same(recorded: dict[str, Any] | None, wanted: dict[str, Any], *, any_tiling: bool) -> bool:
    """Whether a video has the record it would be made with; what an older one does not name was as by default."""
    if recorded is None:
        return False
    recorded = {"folders": wanted["folders"]} | recorded
    recorded["settings"] = _filled(recorded["settings"], wanted["settings"])
    if any_tiling:
        settings = recorded["settings"]
        sampling = settings.get("sampling", {}) | {"tiling": wanted["settings"]["sampling"]["tiling"]}
        recorded["settings"] = settings | {"sampling": sampling}
    return all(recorded.get(key) == wanted[key] for key in ("format", "settings", "files", "folders"))


def _filled(recorded: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return recorded settings with the defaults of those that came later."""
    defaults, filled = Config().model_dump(), dict(recorded)
    for name, section in wanted.items():
        if isinstance(section, dict) and isinstance(recorded.get(name), dict):
            later = section.keys() - recorded[name].keys()
            filled[name] = recorded[name] | {key: defaults[name][key] for key in later if key in defaults[name]}
    return filled


def _recorded(job: Job) -> dict[str, Any] | None:
    try:
        return read_record(job.path)
    except FactoryError:
        return None


def read_record(video: Path) -> dict[str, Any]:
    """Return the record that is embedded in a video, or lies beside it.

    Raises:
        FactoryError: no video there, or none that says how it was made.
    """
    if not video.exists():
        raise FactoryError(f"{video}: no such video")
    beside = video.with_suffix(".json")
    text = read_note(video) or (beside.read_text(encoding="utf-8") if beside.is_file() else None)
    try:
        record = json.loads(text) if text else None
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not all(
        isinstance(part, dict) for part in (record.get("settings"), record.get("files"), record.get("folders", {}))
    ):
        raise FactoryError(
            f"{video} does not say how it was made, and no {beside.name} beside it does. Give a video made by "
            "`cogvideox generate`."
        )
    if record.get("format") != FORMAT:
        raise UnfitError(f"{video} has a record of format {record.get('format')}; this version reads {FORMAT}.")
    return record


def settings_like(video: Path) -> Config:
    """Return the settings that make `video` again, in its own format.

    Raises:
        FactoryError: it does not say how it was made.
        UnfitError: a LoRA, transformer, image or video that went into it has changed since.
    """
    record = read_record(video)
    config = check(record["settings"], source=str(video))
    # What is gone is missed where it is needed.
    found = {name: sha256_file(Path(name)) for name in record["files"] if Path(name).is_file()}
    if config.model.transformer and Path(config.model.transformer).is_dir():
        found |= _digests_of_folders(config)
    for name, digest in (record["files"] | record.get("folders", {})).items():
        if found.get(name, digest) != digest:
            raise UnfitError(f"{name} is another than the one that went into {video}. Bring that one back.")
    kind = {"format": video.suffix.lower().removeprefix(".") or "png"}
    return config.model_copy(update={"generate": config.generate.model_copy(update=kind)})


def to_note(record: Mapping[str, Any]) -> str:
    """Return a record as text."""
    return json.dumps(record, indent=1, ensure_ascii=False)
