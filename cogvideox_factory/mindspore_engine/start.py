"""A run before it starts: what its settings come to for this model and this machine."""

from dataclasses import dataclass, fields
from typing import Any

import mindspore as ms

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.device import (
    Kind,
    Mode,
    Precision,
    dtype_name,
    pick_device,
    pick_dtype,
    pick_precision,
    set_determinism,
)
from cogvideox_factory.mindspore_engine.ranks import Ranks, join, num_processes
from cogvideox_factory.mindspore_engine.sequence_parallel import require_divisible_heads
from cogvideox_factory.mindspore_engine.sharding import Shards
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.ranks import Layout
from cogvideox_factory.run_plan import RunPlan, read_plan


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """What settings come to on this machine."""

    device: Kind
    precision: Precision
    mode: Mode
    ranks: Ranks

    @property
    def dtype(self) -> Any:
        """What is computed in."""
        return self.precision.arithmetic

    @property
    def shards(self) -> Shards | None:
        """Who divides the weights of Linears: all processes with `parallel.zero` 3, else nobody."""
        group = self.ranks.everyone if self.ranks.layout.zero == 3 else None
        return None if group is None else Shards(group=group, dtype=self.dtype)

    @property
    def dtype_name(self) -> str:
        """What settings call it."""
        return dtype_name(self.dtype)


def take_machine(config: Config, model: TransformerConfig) -> Machine:
    """Make this process use the device of the settings, join the others, and return what they come to there.

    Raises:
        FactoryError, MissingError: a device, dtype or mode that is not here, processes that cannot divide the work.
    """
    layout = Layout(size=num_processes(), **config.parallel.layout)
    require_divisible_heads(layout.sequence, model.num_attention_heads)
    device = pick_device(config.run.device)
    ranks = join(layout, timeout_seconds=config.parallel.timeout_seconds)
    set_determinism(config.run.deterministic)
    settings = config.mindspore
    precision = pick_precision(settings.amp_level, pick_dtype(config.run.dtype, model))
    return Machine(
        device=device, precision=precision, mode=Mode(graph=settings.mode == 0, jit_level=settings.jit_level),
        ranks=ranks,
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Plan(RunPlan):
    """Everything about a run that is known before a weight is loaded."""

    machine: Machine


def make_plan(config: Config) -> Plan:
    """Read the configs of the model and check task, shape, device and text length against them."""
    given = read_plan(config)
    machine = take_machine(given.config, given.model)
    _check_masters(given.config, machine)
    return Plan(**{field.name: getattr(given, field.name) for field in fields(given)}, machine=machine)


def _check_masters(config: Config, machine: Machine) -> None:
    """Check how weights are to be kept against what is computed in.

    Raises:
        FactoryError: bfloat16 weights and a precision that keeps others.
    """
    if config.train.master_weights != "stochastic_bf16":
        return
    if machine.dtype == ms.float16:
        raise FactoryError(
            "train.master_weights=stochastic_bf16 keeps weights in bfloat16, which run.dtype=float16 cannot hold. Use "
            "float32 master weights, or another --run.dtype."
        )
    if config.mindspore.amp_level not in (None, "O3"):
        raise FactoryError(
            f"train.master_weights=stochastic_bf16 keeps weights in bfloat16, mindspore.amp_level="
            f"{config.mindspore.amp_level} in float32; choose one."
        )
