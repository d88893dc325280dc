"""A run before it starts: what its settings come to for this model, where it begins, and what it may go on from."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from cogvideox_factory import intake, weights
from cogvideox_factory.checkpoints import (
    checkpoint_folder,
    list_checkpoints,
    newest_checkpoint,
    read_state,
    set_aside,
    verify_checkpoint,
)
from cogvideox_factory.config import Config
from cogvideox_factory.data.auto_buckets import balanced_batches, step_cost
from cogvideox_factory.data.buckets import Bucket, read_buckets
from cogvideox_factory.data.loader import NUM_TRAIN_TIMESTEPS
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import say
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.plan.flops import training_flops
from cogvideox_factory.plan.memory import Training
from cogvideox_factory.plan.peaks import find_peak
from cogvideox_factory.run_folder import differences, require_same
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape, num_video_tokens
from cogvideox_factory.torch_engine.device import device_name, pick_device, pick_dtype, versions
from cogvideox_factory.torch_engine.lora_targets import adapted_layers
from cogvideox_factory.torch_engine.low_bit import require_torchao
from cogvideox_factory.torch_engine.ranks import Layout, Ranks

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """Everything about a run that is known before a weight is loaded."""

    config: Config
    folder: Path
    transformer_folder: Path
    model: TransformerConfig
    scheduler: SchedulerConfig
    shape: ClipShape
    device: torch.device
    dtype: torch.dtype

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.train.dir)

    @property
    def is_random(self) -> bool:
        """Whether the transformer starts from random weights."""
        return bool(self.config.model.transformer_config) and not self.config.model.transformer

    @property
    def text_length(self) -> int:
        """Tokens of a caption."""
        return intake.text_length(self.config, self.model)


def make_plan(config: Config) -> Plan:
    """Read the configs of the model and check task, shape, device and text length against them."""
    folder = weights.resolve_model(config.model.path, revision=config.model.revision)
    transformer_folder = intake.transformer_folder(config, folder)
    model = intake.transformer_config(config, folder)
    check_task(config.task, model, source=str(transformer_folder))
    scheduler = SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json")
    if scheduler.num_train_timesteps != NUM_TRAIN_TIMESTEPS:
        raise FactoryError(
            f"{folder / 'scheduler'}: num_train_timesteps={scheduler.num_train_timesteps}; timesteps are drawn from "
            f"{NUM_TRAIN_TIMESTEPS}, which every CogVideoX checkpoint has. Check scheduler_config.json."
        )
    shape = intake.training_shape(config, model)
    config = complete(config, model, shape)
    device = pick_device(config.run.device)
    _check_memory(config, model, device)
    return Plan(
        config=config, folder=folder, transformer_folder=transformer_folder, model=model, scheduler=scheduler,
        shape=shape, device=device, dtype=pick_dtype(config.run.dtype, device, model),
    )  # fmt: skip


def _check_memory(config: Config, model: TransformerConfig, device: torch.device) -> None:
    """Check what keeps memory small against the machine and the model.

    Raises:
        FactoryError: a setting that would do nothing here, or counts more layers than there are.
        MissingError: torchao is wanted and not installed.
    """
    train = config.train
    if train.activation_offload:
        _require_accelerator("train.activation_offload", device)
    if train.swapped_blocks:
        _require_accelerator("train.swapped_blocks", device)
    if train.optimizer_offload:
        _require_accelerator("train.optimizer_offload", device)
    for name in ("checkpointing_layers", "swapped_blocks"):
        count = getattr(train, name)
        if count and count > model.num_layers:
            raise FactoryError(
                f"train.{name}={count}: this model has {model.num_layers} layers. Use at most {model.num_layers}."
            )
    if config.lora.base != "model":
        require_torchao(config.lora.base)


def _require_accelerator(name: str, device: torch.device) -> None:
    if device.type == "cpu":
        raise FactoryError(
            f"{name} moves what an accelerator has no room for to host memory; on the CPU all is there already. "
            "Remove it, or choose another --run.device."
        )


def complete(config: Config, model: TransformerConfig, shape: ClipShape) -> Config:
    """Return the settings with every `None` that the model decides filled in."""
    data = {
        "num_frames": shape.num_frames,
        "height": shape.height,
        "width": shape.width,
        "fps": float(shape.fps),
    }
    return config.model_copy(
        update={
            "data": config.data.model_copy(update=data),
            "text": config.text.model_copy(update={"max_sequence_length": intake.text_length(config, model)}),
        }
    )


def num_tokens(plan: Plan, bucket: Bucket) -> int:
    """Return the video tokens of one clip of a shape."""
    shape = clip_shape(plan.model, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
    return num_video_tokens(plan.model, shape)


def model_flops(plan: Plan, bucket: Bucket, *, adapter_weights: int) -> int:
    """Return the model FLOPs of training on one clip of a shape, forward and backward."""
    return training_flops(
        plan.model, video_tokens=num_tokens(plan, bucket), text_length=plan.text_length,
        method=plan.config.train.method, adapter_weights=adapter_weights,
    )  # fmt: skip


def peak_tflops(plan: Plan) -> tuple[float, str] | None:
    """Return what one card could do in the run's dtype, dense, and whose figure that is; None where none is known."""
    if given := plan.config.run.peak_tflops:
        return given, "run.peak_tflops"
    peak = find_peak(device_name(plan.device))
    if peak is None:
        return None
    kind = "half"
    if plan.dtype == torch.float32:
        kind = "float32" if torch.get_float32_matmul_precision() == "highest" else "tf32"
    value = getattr(peak, kind)
    return None if value is None else (value, f"{peak.name}, {kind.replace('half', 'half precision')}, dense")


def excluded_clips(path: str | None) -> set[str]:
    """Return the clip ids of `train.exclude`.

    Raises:
        FactoryError: no such file, or a line that names no clip.
    """
    if path is None:
        return set()
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise FactoryError(f"train.exclude={path} cannot be read: {error}. Give a quarantine.jsonl.") from error
    found = set()
    for number, line in enumerate(lines, 1):
        try:
            found.add(str(json.loads(line)["clip"]))
        except (ValueError, KeyError, TypeError) as error:
            raise FactoryError(
                f'train.exclude={path}, line {number}: every line is an object with a clip id, {{"clip": "…"}}.'
            ) from error
    return found


def batch_sizes(plan: Plan, keys: Iterable[str]) -> dict[str, int]:
    """Return the clips of a forward pass for each shape in use: the same number, or what the buckets say.

    A bucket file states them. `auto` gives shapes that cost less than the full one so many more clips that a step
    costs about as much.
    """
    config, shape = plan.config, plan.shape
    size, used = config.train.batch_size, {Bucket.parse(key) for key in keys}
    if config.data.buckets is None:
        return {bucket.key: size for bucket in used}
    if config.data.buckets != "auto":
        listed = read_buckets(Path(config.data.buckets), seed=config.run.seed)
        return {bucket.key: listed.batch_size(bucket) for bucket in used}
    width = plan.model.num_attention_heads * plan.model.attention_head_dim

    def cost(bucket: Bucket) -> float:
        return step_cost(num_tokens(plan, bucket) + plan.text_length, width=width)

    native = cost(Bucket(shape.num_frames, shape.height, shape.width))
    sizes = balanced_batches({bucket: cost(bucket) for bucket in used}, batch_size=size, native_cost=native)
    return {bucket.key: count for bucket, count in sizes.items()}


def find_start(plan: Plan) -> Path | None:
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


def identity(plan: Plan, described: str) -> dict[str, Any]:
    """Return the settings a resumed run must share with the run it goes on with."""
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
        "run.seed": config.run.seed, "run.dtype": str(plan.dtype).removeprefix("torch."), "run.tf32": config.run.tf32,
        "data": described,
        "data.flip_probability": config.data.flip_probability, "data.vae_tiling": config.data.vae_tiling,
        "text.max_sequence_length": plan.text_length,
        "validation.num_clips": config.validation.num_clips if config.validation.every else 0, **train, **adapters,
        **({} if config.train.schedule == "constant" else {"train.steps": config.train.steps}),
    }  # fmt: skip


# Where things lie and what they are done on, which may differ from machine to machine.
_LOCAL = {
    "model.path", "model.transformer", "model.transformer_config", "data.root", "data.sets", "cache.dir", "train.dir",
    "train.resume", "validation.images", "run.device",
}  # fmt: skip


def shared_settings(config: Config) -> dict[str, Any]:
    """Return {section.setting: value} of all that every process of a run must have alike, and what computes it."""
    settings = {key: value for key, value in _flat(config.model_dump(mode="json")).items() if key not in _LOCAL}
    return {name: version for name, version in versions().items() if name != "python"} | settings


def shared_files(plan: Plan, described: str) -> dict[str, Any]:
    """Return what the data and the model are that a process finds, for a comparison with the others'."""
    drawn = plan.is_random
    return {
        "the data": described,
        "the transformer's config": str(plan.model),
        "the transformer": "random weights" if drawn else weights.sample_digest(plan.transformer_folder),
        "the VAE": weights.sample_digest(plan.folder / "vae"),
    }


def record_of(plan: Plan, ranks: Ranks, wanted: dict[str, Any], changes: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what every checkpoint of a run says of it."""
    return {
        "identity": wanted, "changes": changes, "seed": plan.config.run.seed, "versions": versions(),
        "layout": {"device": device_name(plan.device), **asdict(ranks.layout)},
        "settings": plan.config.model_dump(mode="json"),
    }  # fmt: skip


def check_resume(plan: Plan, start: Path, wanted: dict[str, Any]) -> list[dict[str, Any]]:
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


def training_numbers(plan: Plan, sizes: Mapping[str, int], layout: Layout) -> Training:
    """Return the run as `plan.memory` counts it: its largest pass, with `sizes` clips of each shape in all processes.

    Raises:
        FactoryError: adapters for modules that the model does not have.
    """
    train, config = plan.config.train, plan.config
    largest = max(sizes, key=lambda key: sizes[key] * num_tokens(plan, Bucket.parse(key)))
    per_pass = -(-sizes[largest] // layout.num_data_ranks)
    return Training(
        model=plan.model, video_tokens=num_tokens(plan, Bucket.parse(largest)), text_tokens=plan.text_length,
        batch_size=per_pass, item_bytes=plan.dtype.itemsize, bfloat16=plan.dtype == torch.bfloat16,
        compiled=train.compile != "none", method=train.method, rank=config.lora.rank,
        adapted=adapted_layers(plan.model, config.lora.target_modules),
        use_dora=config.lora.use_dora, base=config.lora.base, checkpointing=train.checkpointing,
        checkpointing_layers=train.checkpointing_layers, activation_offload=train.activation_offload,
        swapped_blocks=train.swapped_blocks, optimizer=train.optimizer,
        optimizer_offload=train.optimizer_offload, stochastic=train.master_weights == "stochastic_bf16",
        average=train.ema_decay is not None, processes=layout.size, replicas=layout.replicas,
        sequence=layout.sequence, zero=layout.zero,
    )  # fmt: skip


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
