"""Where a run begins, what it may go on from, and what its processes and its checkpoints must have in common.

A run is known by its `identity`: every setting that a number depends on, and digests of its data and its weights.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cogvideox_factory import weights
from cogvideox_factory.checkpoints import (
    checkpoint_folder,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    set_aside,
    verify_checkpoint,
)
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say
from cogvideox_factory.run_folder import differences, require_same

if TYPE_CHECKING:
    from cogvideox_factory.run_plan import RunPlan

# Settings that may change between the start of a run and its resumption, because no number depends on them.
_FREE = {
    "dir",
    "steps",
    "log_every",
    "save_every",
    "keep_checkpoints",
    "async_checkpoint",
    "time_limit_minutes",
    "allow_change",
    "resume",
    "num_workers",
    "checkpointing",
    "on_bad_step",
    "exclude",  # what it says is part of what the data is
    "log_samples",
    "tracker",
    "tracker_project",
    "checkpointing_layers",
    "activation_offload",
    "swapped_blocks",
}


def find_start(plan: "RunPlan") -> Path | None:
    """Return the checkpoint to go on from, or None to start fresh; checkpoints that lie after it are set aside.

    Raises:
        UnfitError: a named checkpoint that is missing or damaged.
        FactoryError: a used run folder with `train.resume=never`.
    """
    run_folder, resume = plan.run_folder, plan.config.train.resume
    steps = list_checkpoints(run_folder)
    if resume == "never":
        if steps or (run_folder / "final").exists():
            raise FactoryError(f"{run_folder} holds a run already; choose another --train.dir or --train.resume auto")
        return None
    if resume != "auto":
        start = Path(resume)
        if not (start / "state.json").is_file() and list_checkpoints(start):
            newest = checkpoint_folder(start, list_checkpoints(start)[-1])
            raise FactoryError(f"train.resume={resume} is a run folder; name one of its checkpoints, such as {newest}")
        verify_checkpoint(start)
        after, label = read_state(start)["step"], "abandoned"
    else:
        start, problems = newest_checkpoint(run_folder)
        for problem in problems:
            say(f"skipped: {problem}")
        after, label = (read_state(start)["step"] if start else -1), "broken"
    for step in steps:
        if step > after:
            say(f"moved to {set_aside(checkpoint_folder(run_folder, step), label)}")
    return start


def identity(plan: "RunPlan", described: str, dtype: str) -> dict[str, Any]:
    """Return the settings a resumed run, in `dtype`, must share with the run it goes on with."""
    config = plan.config
    train = {f"train.{k}": v for k, v in config.train.model_dump(exclude=_FREE).items()}
    adapters = {f"lora.{k}": v for k, v in config.lora.model_dump().items()} if config.train.method == "lora" else {}
    parts = [plan.folder / "vae", plan.folder / "text_encoder", plan.folder / "scheduler"]
    start = "" if plan.is_random else _listing(plan.transformer_folder)
    start = f"{plan.model}{start}" if config.model.transformer_config else start
    loaded = [plan.folder / "vae", plan.folder / "text_encoder"]
    loaded += [] if plan.is_random else [plan.transformer_folder]
    return {
        "task": config.task, "model": digest_of([start, *(_listing(part) for part in parts)]),
        "weights": digest_of([weights.sample_digest(folder) for folder in loaded]),
        "run.seed": config.run.seed, "run.dtype": dtype, "run.tf32": config.run.tf32,
        "data": described,
        "data.flip_probability": config.data.flip_probability, "data.vae_tiling": config.data.vae_tiling,
        "text.max_sequence_length": plan.text_length,
        "validation.num_clips": config.validation.num_clips if config.validation.every else 0, **train, **adapters,
        **_engine(config),
        **({} if config.train.schedule == "constant" else {"train.steps": config.train.steps}),
    }  # fmt: skip


def _engine(config: Config) -> dict[str, Any]:
    """Return what computes, where it is not PyTorch: runs of before there was a choice said nothing."""
    if config.engine == "torch":
        return {}
    return {"engine": config.engine} | {f"mindspore.{k}": v for k, v in config.mindspore.model_dump().items()}


# Where things lie and what they are done on, which may differ from machine to machine.
_LOCAL = {
    "model.path", "model.transformer", "model.transformer_config", "data.root", "data.sets", "cache.dir", "train.dir",
    "train.resume", "validation.images", "run.device",
}  # fmt: skip


def shared_settings(config: Config, versions: Mapping[str, str]) -> dict[str, Any]:
    """Return {section.setting: value} of all that every process of a run must have alike, and what computes it."""
    settings = {key: value for key, value in _flat(config.model_dump(mode="json")).items() if key not in _LOCAL}
    return {name: version for name, version in versions.items() if name != "python"} | settings


def shared_files(plan: "RunPlan", described: str) -> dict[str, Any]:
    """Return what the data and the model are that a process finds, for a comparison with the others'."""
    drawn = plan.is_random
    return {
        "the data": described,
        "the transformer's config": str(plan.model),
        "the transformer": "random weights" if drawn else weights.sample_digest(plan.transformer_folder),
        "the VAE": weights.sample_digest(plan.folder / "vae"),
    }


def record_of(
    plan: "RunPlan", wanted: dict[str, Any], changes: list[dict[str, Any]], *, versions: Mapping[str, str],
    layout: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Return what every checkpoint of a run says of it; `layout` is the device and how processes divide the work."""
    return {
        "identity": wanted, "changes": changes, "seed": plan.config.run.seed,
        "versions": dict(versions), "layout": dict(layout),
        "settings": plan.config.model_dump(mode="json"),
    }  # fmt: skip


def check_resume(plan: "RunPlan", start: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
    """Say what differs from the run that `start` is of, and return all changes that run has been through.

    Raises:
        UnfitError: a setting that numbers depend on differs and is not in `train.allow_change`.
        FactoryError: the checkpoint is behind the last step asked for.
    """
    config, state = plan.config, read_state(start)
    step = state["step"]
    changed = require_same(state["identity"], wanted, source=start, allow=config.train.allow_change)
    if step > config.train.steps:
        raise FactoryError(
            f"train.steps={config.train.steps}, but {start} is at step {step} already. "
            "Ask for more steps, or start a new run in another --train.dir."
        )
    before, now = _flat(state.get("settings", {})), _flat(config.model_dump(mode="json"))
    free = {key: values for key, values in differences(before, now).items() if key in before and key in now}
    notes = [f"{key} {a} -> {b}" for key, (a, b) in free.items() if key not in wanted and key.split(".")[0] in _READ]
    if notes:
        say(f"changed since step {step}, no number depends on it: {', '.join(notes)}")
    for key, (a, b) in changed.items():
        say(f"CHANGED FROM STEP {step} ON, as train.allow_change says: {key} {a} -> {b}")
    new = [{"after_step": step, "setting": key, "from": a, "to": b} for key, (a, b) in changed.items()]
    return [*state.get("changes", []), *new]


_READ = {"train", "parallel", "validation", "sampling", "cache", "model", "run"}
"""Sections that a training run reads; `data` is one digest."""


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= {f"{name}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def digest_of(items: list[str], *more: Any) -> str:
    """Return how many `items` there are and a digest of them and `more`."""
    text = "\n".join([*items, *(str(part) for part in more)])
    return f"{len(items)} items, sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def _listing(folder: Path) -> str:
    """Return names and sizes of a model folder's files, and what its configs say; hashing 10 GB would take long."""
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return "\n".join(
        f"{path.name} {path.read_text() if path.suffix == '.json' else path.stat().st_size}" for path in files
    )
