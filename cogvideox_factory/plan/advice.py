"""How a run may be laid out on a machine: what fits, and how long a step takes, from numbers alone.

Choices are tried in three tiers. The first changes nothing but who computes what: layouts and checkpointing. The second
moves what is not needed to host memory and back. The third rounds. The first tier with something that fits is offered,
that which computes least again first, then that which talks least.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from cogvideox_factory.plan.flops import recomputed_flops, training_flops
from cogvideox_factory.plan.machine import Machine
from cogvideox_factory.plan.memory import MATRIX_BYTES, Training, need

UTILISATION = 0.4
"""Share of its peak that a card is taken to keep up. A run prints what it had as `mfu`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """One way to lay out a run."""

    run: Training
    settings: tuple[str, ...]
    """Flags that make it so, beside the recipe."""
    flops: int
    """Of one card in a step, what is computed again included."""

    @property
    def device(self) -> int:
        """Bytes on a card."""
        return need(self.run).device

    @property
    def host(self) -> int:
        """Bytes of host memory a card asks for."""
        return need(self.run).host


def seconds(choice: Choice, machine: Machine, *, half: bool, utilisation: float = UTILISATION) -> float | None:
    """Return the seconds of a step, communication and copies apart; None for a card whose peak is not known."""
    peak = machine.peak and (machine.peak.half if half else machine.peak.float32)
    return choice.flops / (peak * 1e12 * utilisation) if peak else None


def as_given(run: Training, *, passes: int = 1) -> Choice:
    """Return `run` as the recipe has it; a step is `passes` forward and backward passes."""
    return Choice(run=run, settings=(), flops=passes * _flops(run))


def fitting(run: Training, machine: Machine, *, passes: int = 1) -> list[Choice]:
    """Return what fits on `machine` of the first tier that has anything, best first.

    Args:
        run: as the recipe has it; its clips a pass stay what they are in each group of cards.
        machine: whose cards it is to fit.
        passes: of a step.
    """
    for tier in (_exact, _moving, _rounding):
        found = []
        for settings, other in tier(run, machine):
            if need(other).device <= machine.memory:
                found.append(Choice(run=other, settings=settings, flops=passes * _flops(other)))
        if found:
            return sorted(found, key=_order if tier is _exact else _order_of_last_resorts)
    return []


def _flops(run: Training) -> int:
    shape = {"video_tokens": run.video_tokens, "text_length": run.text_tokens}
    weights = run.num_trained if run.method == "lora" else 0
    model = training_flops(run.model, **shape, method=run.method, adapter_weights=weights)
    again = recomputed_flops(run.model, **shape, checkpointing=run.checkpointing, layers=run.num_checkpointed)
    return run.batch_size * (model + again) // run.sequence


def _order(choice: Choice) -> tuple[float, ...]:
    run = choice.run
    clips = run.processes // run.sequence * run.batch_size
    return (choice.flops * run.processes / clips, len(choice.settings), run.zero, run.sequence, choice.device)


def _order_of_last_resorts(choice: Choice) -> tuple[float, ...]:
    return (len(choice.settings), choice.host, *_order(choice))


def _exact(run: Training, machine: Machine) -> Iterator[tuple[tuple[str, ...], Training]]:
    """Yield (settings, run) for layouts and checkpointing."""
    sequences = [n for n in range(1, machine.cards + 1) if machine.cards % n == 0]
    zeros = (0, 2, 3) if machine.cards > 1 else (0,)
    if run.base != "model" or run.swapped_blocks:
        zeros = (0,)
    for sequence, zero, checkpointing in product(sequences, zeros, ("none", "half", "save_attention", "full")):
        settings, other = [], replace(run, processes=machine.cards, sequence=sequence, zero=zero, replicas=1)
        if sequence > 1:
            settings.append(f"--parallel.sequence {sequence}")
        if zero:
            settings.append(f"--parallel.zero {zero}")
        if machine.cards > 1:
            settings.append(f"--train.batch-size {machine.cards // sequence * run.batch_size}")
        mode = "save_attention" if checkpointing == "half" else checkpointing
        layers = run.model.num_layers // 2 if checkpointing == "half" else None
        if mode != run.checkpointing:
            settings.append(f"--train.checkpointing {mode}")
        if layers:
            settings.append(f"--train.checkpointing-layers {layers}")
        yield tuple(settings), replace(other, checkpointing=mode, checkpointing_layers=layers)


def _moving(run: Training, machine: Machine) -> Iterator[tuple[tuple[str, ...], Training]]:
    """Yield the same with swapped blocks, activations or optimizers in host memory."""
    for settings, other in _exact(run, machine):
        if other.checkpointing == "none" or other.checkpointing_layers:
            continue
        changes: list[tuple[str, dict[str, object]]] = []
        if run.method == "lora" and not other.zero:
            for blocks in (other.model.num_layers // 2, other.model.num_layers):
                changes.append((f"--train.swapped-blocks {blocks}", {"swapped_blocks": blocks}))
        if run.method == "full" and run.optimizer in ("adam", "adamw") and not run.stochastic:
            changes.append(("--train.optimizer-offload True", {"optimizer_offload": True}))
        for flag, change in [("", {}), *changes]:
            for offload in (False,) if run.compiled else (False, True):
                more = [flag] * bool(flag) + ["--train.activation-offload True"] * offload
                if more:
                    yield (*settings, *more), replace(other, activation_offload=offload, **change)


def _rounding(run: Training, machine: Machine) -> Iterator[tuple[tuple[str, ...], Training]]:
    """Yield the same with fewer bits, with and without moving."""
    for tier in (_exact, _moving):
        for settings, other in tier(run, machine):
            if run.method == "lora" and not other.zero and not run.compiled and not run.fp8:
                for base in MATRIX_BYTES:
                    yield (*settings, f"--lora.base {base}"), replace(other, base=base)
            if run.method == "full" and run.item_bytes == 2 and run.bfloat16 and not other.optimizer_offload:
                flag = "--train.master-weights stochastic_bf16"
                if run.optimizer in ("adamw", "adamw8bit"):
                    yield (*settings, flag), replace(other, stochastic=True)
                if run.optimizer != "adamw8bit":
                    eight = replace(other, stochastic=True, optimizer="adamw8bit")
                    yield (*settings, flag, "--train.optimizer adamw8bit"), eight
