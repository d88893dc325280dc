"""A run before it starts: what its settings come to for this model and this machine."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvideox_factory import intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.auto_buckets import balanced_batches, step_cost
from cogvideox_factory.data.buckets import Bucket, read_buckets
from cogvideox_factory.data.loader import NUM_TRAIN_TIMESTEPS
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.plan.flops import training_flops
from cogvideox_factory.plan.memory import Training
from cogvideox_factory.plan.peaks import find_peak
from cogvideox_factory.shapes import ClipShape, check_task, clip_shape, num_video_tokens
from cogvideox_factory.torch_engine.device import device_name, pick_device, pick_dtype
from cogvideox_factory.torch_engine.lora_targets import adapted_layers
from cogvideox_factory.torch_engine.low_bit import require_torchao
from cogvideox_factory.torch_engine.ranks import Layout


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
