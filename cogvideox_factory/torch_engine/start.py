"""A run before it starts: what its settings come to for this model and this machine."""

from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch

from cogvideox_factory.config import Config
from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.plan.memory import Training
from cogvideox_factory.plan.peaks import find_peak
from cogvideox_factory.ranks import Layout
from cogvideox_factory.run_plan import RunPlan, num_tokens, read_plan
from cogvideox_factory.torch_engine.device import (
    device_name,
    keep_freed_memory,
    pick_device,
    pick_dtype,
    require_float8,
)
from cogvideox_factory.torch_engine.float8 import check_float8
from cogvideox_factory.torch_engine.lora_targets import adapted_layers
from cogvideox_factory.torch_engine.low_bit import require_torchao


@dataclass(frozen=True, kw_only=True)
class Plan(RunPlan):
    """Everything about a run that is known before a weight is loaded."""

    device: torch.device
    dtype: torch.dtype


def make_plan(config: Config) -> Plan:
    """Read the configs of the model and check task, shape, device and text length against them."""
    given = read_plan(config)
    config, model = given.config, given.model
    device = pick_device(config.run.device)
    dtype = pick_dtype(config.run.dtype, device, model)
    if device.type == "cpu":
        keep_freed_memory()
    _check_memory(config, model, device)
    if config.train.fp8 != "none":
        require_float8(device)
        check_float8(config.train.fp8, width=model.width, dtype=dtype, device=device)
    if config.train.master_weights == "stochastic_bf16" and dtype != torch.bfloat16:
        raise FactoryError(
            f"train.master_weights=stochastic_bf16 is for full fine-tuning in bfloat16; this run is in {dtype}. "
            "Use float32 master weights, or --run.dtype bfloat16."
        )
    known = {field.name: getattr(given, field.name) for field in fields(given)}
    return Plan(**known, device=device, dtype=dtype)


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
        compiled=train.compile != "none", fp8=train.fp8 != "none", method=train.method, rank=config.lora.rank,
        adapted=adapted_layers(plan.model, config.lora.target_modules),
        use_dora=config.lora.use_dora, base=config.lora.base, checkpointing=train.checkpointing,
        checkpointing_layers=train.checkpointing_layers, activation_offload=train.activation_offload,
        swapped_blocks=train.swapped_blocks, optimizer=train.optimizer,
        optimizer_offload=train.optimizer_offload, stochastic=train.master_weights == "stochastic_bf16",
        average=train.ema_decay is not None, processes=layout.size, replicas=layout.replicas,
        sequence=layout.sequence, zero=layout.zero,
    )  # fmt: skip
