"""Updating weights: what happens between the gradients of micro-batches and the next forward pass.

An `Update` accumulates in float32, clips by the global norm, skips a step that is not finite, and lets AdamW work on
float32 master weights, which it writes back into the model (or on bfloat16 ones, rounded stochastically). All state is
in parameters that change in place, so both halves compile: `add` a micro-batch's gradients, then `step`. Of several
processes each updates its part (`sharding`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, ops

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.border import put, put_tensor, to_array, to_tensor
from cogvideox_factory.mindspore_engine.collectives import AllReduce
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.low_precision import PARTS, RoundingDraws, round_stochastically, uniform
from cogvideox_factory.mindspore_engine.ranks import ALONE, Ranks
from cogvideox_factory.mindspore_engine.sharding import Bucket, Division, Own, Spread

FIRST_LOSS_SCALE, GROWTH_STEPS = 2.0**16, 2000
"""Of float16: halved after an overflow, doubled after so many good steps in a row."""

_COUNTERS = {"num_updates", "num_skipped", "loss_scale", "good_steps"}


class Update:
    """Turn gradients of `parameters` into new weights."""

    def __init__(
        self,
        parameters: Sequence[Parameter],
        *,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        max_grad_norm: float,
        decoupled: bool = True,
        scales_loss: bool = False,
        rounding_seed: int | None = None,
        ranks: Ranks = ALONE,
        mode: Mode = PYNATIVE,
    ) -> None:
        """Make all state.

        Args:
            parameters: what is trained, by unique names.
            betas: decay of the first and the second moment.
            eps: added to the denominator.
            weight_decay: decoupled (AdamW, Loshchilov & Hutter, arXiv 1711.05101), or added to the gradient (Adam).
            max_grad_norm: to which the norm of all gradients together is clipped.
            decoupled: which of the two.
            scales_loss: whether gradients are of the loss times `loss_scale`, so that float16 can hold them.
            rounding_seed: of bfloat16 weights that are their own masters, with moments in bfloat16, all rounded
                stochastically; None: float32 masters. Each process must have all of them.
            ranks: the processes, whose gradients add up.
            mode: how `step` runs.

        Raises:
            FactoryError: nothing is to be trained.
        """
        parameters = list(parameters)
        if not parameters:
            raise FactoryError("no weight is to be trained; check train.method and lora.target_modules.")
        self.division = division = Division(parameters, ranks)
        self.trained = division.weights
        assert rounding_seed is None or not division.is_divided, "the draws of a weight are of all its rows"
        self.max_grad_norm = max_grad_norm
        self.scales_loss = scales_loss
        self.draws = None
        if rounding_seed is not None:
            self.draws = RoundingDraws([weight.shape for weight in self.trained], seed=rounding_seed)
        self._make_state()
        self._reduce = division.reduction()
        self._reduces_at_once = self._reduce is not None and ranks.layout.zero >= 2
        self._spread = Spread(division.buckets) if division.buckets else None
        self._total = AllReduce(division.group) if division.group else None
        decays = (weight_decay, 0.0) if decoupled else (0.0, weight_decay)
        self._numbers = tuple(to_tensor(np.array(x, np.float32)) for x in (*betas, eps, *decays))
        self._step: Callable[..., Tensor] = mode.compiled(self._update)

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add the gradients of one micro-batch, one for each trained parameter; compiles within another function."""
        if self._reduce is not None and self._reduces_at_once:
            grads = self._reduce(tuple(grads))
        _map(_added, self._sums, grads)

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update and clear the gradients; return the global gradient norm (a device scalar).

        A step whose norm is not finite leaves weights and state as they are and is counted in `num_skipped`.
        """
        self.num_steps += 1
        draws = () if self.draws is None else self.draws.of(self.num_steps)
        return self._step(to_tensor(np.array(learning_rate, np.float32)), *draws)

    def weight_norm(self) -> float:
        """Return the norm of the trained weights (this waits for the device); all processes call it at once."""
        return float(self._summed(ops.addn([m.astype(ms.float32).square().sum() for m in self.masters]))) ** 0.5

    def state(self) -> dict[str, list[Parameter]]:
        """Return all state of the model's size by kind, in the order of `division.slots`: weights and moments."""
        return {
            "model": self.masters, "optimizer.exp_avg": self.exp_avg, "optimizer.exp_avg_sq": self.exp_avg_sq,
        }  # fmt: skip

    def scalars(self) -> dict[str, float]:
        """Return the counters (this waits for the device)."""
        return {name: float(getattr(self, name)) for name in sorted(_COUNTERS)}

    def restore(self, scalars: Mapping[str, float]) -> None:
        """Take over the counters and copy the (already loaded) masters into the model."""
        for name in _COUNTERS & scalars.keys():  # those of before this engine knew float16 have no scale
            put(getattr(self, name), np.array(scalars[name], np.float32))
        self.num_steps = int(scalars["num_updates"] + scalars["num_skipped"])
        self.write(self.masters)

    def write(self, values: Sequence[Parameter]) -> None:
        """Write `values` of all slots into the weights of the model."""
        own = self.division.own
        for slot, value in zip(own, values):
            if value is not slot.weight:
                put_tensor(slot.weight, value)
        if self._spread is not None:
            _map(_written, self._whole_weights, self._spread(tuple(values[len(own) :])))

    def _make_state(self) -> None:
        division, own = self.division, ms.float32 if self.draws is None else ms.bfloat16
        self.masters = [_master(slot, own) for slot in division.slots]
        self.exp_avg, self.exp_avg_sq = (
            [_state(kind, index, master, dtype=own) for index, master in enumerate(self.masters)]
            for kind in ("exp_avg", "exp_avg_sq")
        )
        until_step = division.is_divided and division.ranks.layout.zero == 1
        self.sums = [
            _state("sum", index, like) for index, like in enumerate(self.trained if until_step else self.masters)
        ]
        self.num_steps = 0
        """With those that were skipped."""
        self.loss_scale = _scalar("loss_scale", FIRST_LOSS_SCALE if self.scales_loss else 1.0)
        self.good_steps = _scalar("good_steps")
        self.num_updates, self.num_skipped = _scalar("num_updates"), _scalar("num_skipped")
        self._masters, self._sums, self._exp_avg, self._exp_avg_sq = map(
            ms.ParameterTuple, (self.masters, self.sums, self.exp_avg, self.exp_avg_sq)
        )
        count = len(division.own)
        copies = [(s.weight, m) for s, m in zip(division.own, self.masters) if s.weight is not m]
        self._copies, self._copied = (ms.ParameterTuple([pair[i] for pair in copies]) for i in range(2))
        self._whole_weights, self._shares = (
            ms.ParameterTuple(self.trained[count:]),
            ms.ParameterTuple(self.masters[count:]),
        )
        self._has_copies = bool(copies)
        self._keys = tuple(to_tensor(PARTS * n + np.arange(PARTS)) for n in range(len(self.masters)))

    def _summed(self, total: Tensor) -> Tensor:
        """Return the sum of a scalar over the processes that divide the state."""
        return total if self._total is None else self._total(total.reshape(1)).reshape(())

    def _update(
        self, learning_rate: Tensor, rows: Tensor | None = None, columns: Tensor | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        grads = self._sums
        if self._reduce is not None and not self._reduces_at_once:
            grads = self._reduce(grads)
        norm = ops.sqrt(self._summed(ops.addn(_map(_squared, grads)))) / self.loss_scale
        accepted = ops.isfinite(norm)
        factor = mint.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0) / self.loss_scale
        count = self.num_updates + accepted.astype(ms.float32)
        beta1, beta2, eps, decay, grad_decay = self._numbers
        corrections = 1 - ops.pow(beta1, count), 1 - ops.pow(beta2, count)
        if rows is None:
            update_one = ops.partial(  # one by one: a graph cannot unpack into this
                _updated, beta1, beta2, eps, decay, grad_decay, learning_rate, factor, corrections[0], corrections[1],
                accepted,
            )  # fmt: skip
            _map(update_one, self._masters, self._exp_avg, self._exp_avg_sq, grads)
        else:
            round_one = ops.partial(
                _rounded, beta1, beta2, eps, decay, grad_decay, learning_rate, factor, corrections[0], corrections[1],
                accepted, rows, columns, keys,
            )  # fmt: skip
            _map(round_one, self._masters, self._exp_avg, self._exp_avg_sq, grads, self._keys)
        _map(_cleared, self._sums)
        if self._has_copies:
            _map(_written, self._copies, self._copied)
        if self._spread is not None:
            _map(_written, self._whole_weights, self._spread(self._shares))
        ops.assign(self.num_updates, count)
        ops.assign_add(self.num_skipped, 1 - accepted.astype(ms.float32))
        if self.scales_loss:
            self._move_loss_scale(accepted.astype(ms.float32))
        return norm

    def _move_loss_scale(self, good: Tensor) -> None:
        """Halve after an overflow (`good` is 0), double after many good steps."""
        count = (self.good_steps + 1) * good
        doubles = (count >= GROWTH_STEPS).astype(ms.float32)
        ops.assign(self.loss_scale, self.loss_scale * (good * (1 + doubles) + (1 - good) * 0.5))
        ops.assign(self.good_steps, count * (1 - doubles))


# What is done to each weight. A graph of a Python loop over hundreds of weights would be too deep to compile; a map is
# flat.
_map = ops.HyperMap()
_added = ops.MultitypeFuncGraph("added")
_squared = ops.MultitypeFuncGraph("squared")
_updated = ops.MultitypeFuncGraph("updated")
_rounded = ops.MultitypeFuncGraph("rounded")
_cleared = ops.MultitypeFuncGraph("cleared")
_written = ops.MultitypeFuncGraph("written")


@_added.register("Tensor", "Tensor")
def _add(total: Tensor, grad: Tensor) -> Tensor:
    return ops.assign_add(total, grad.astype(ms.float32))


@_squared.register("Tensor")
def _square(total: Tensor) -> Tensor:
    return total.square().sum()


@_updated.register(*["Tensor"] * 14)
def _update_one(
    beta1: Tensor, beta2: Tensor, eps: Tensor, decay: Tensor, grad_decay: Tensor, learning_rate: Tensor,
    factor: Tensor, first_correction: Tensor, second_correction: Tensor, accepted: Tensor,
    master: Tensor, first: Tensor, second: Tensor, total: Tensor,
) -> Tensor:  # fmt: skip
    new, new_first, new_second = _adam(
        beta1, beta2, eps, decay, grad_decay, learning_rate, factor, first_correction, second_correction, master,
        first, second, total,
    )  # fmt: skip
    ops.assign(first, mint.where(accepted, new_first, first))
    ops.assign(second, mint.where(accepted, new_second, second))
    return ops.assign(master, mint.where(accepted, new, master))


@_rounded.register(*["Tensor"] * 18)
def _round_one(
    beta1: Tensor, beta2: Tensor, eps: Tensor, decay: Tensor, grad_decay: Tensor, learning_rate: Tensor,
    factor: Tensor, first_correction: Tensor, second_correction: Tensor, accepted: Tensor,
    rows: Tensor, columns: Tensor, keys: Tensor,
    master: Tensor, first: Tensor, second: Tensor, total: Tensor, own: Tensor,
) -> Tensor:  # fmt: skip
    old = master.astype(ms.float32), first.astype(ms.float32), second.astype(ms.float32)
    new = _adam(
        beta1, beta2, eps, decay, grad_decay, learning_rate, factor, first_correction, second_correction, old[0],
        old[1], old[2], total,
    )  # fmt: skip
    shape, key = master.shape, ops.gather(keys, own, 0)
    master.copy_(_kept(new[0], old[0], accepted, uniform(rows, columns, key[0], shape)))
    first.copy_(_kept(new[1], old[1], accepted, uniform(rows, columns, key[1], shape)))
    return second.copy_(_kept(new[2], old[2], accepted, uniform(rows, columns, key[2], shape)))


def _kept(new: Tensor, old: Tensor, accepted: Tensor, draws: Tensor) -> Tensor:
    """Return `new` rounded to bfloat16, or `old`, which is."""
    return mint.where(accepted, round_stochastically(new, draws), old).astype(ms.bfloat16)


def _adam(
    beta1: Tensor, beta2: Tensor, eps: Tensor, decay: Tensor, grad_decay: Tensor, learning_rate: Tensor,
    factor: Tensor, first_correction: Tensor, second_correction: Tensor,
    master: Tensor, first: Tensor, second: Tensor, total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the new weight and its new moments, all float32."""
    grad = total * factor + grad_decay * master
    new_first = first + (grad - first) * (1 - beta1)
    new_second = second * beta2 + grad.square() * (1 - beta2)
    denominator = ops.sqrt(new_second) / ops.sqrt(second_correction) + eps
    new = master * (1 - learning_rate * decay) - learning_rate / first_correction * (new_first / denominator)
    return new, new_first, new_second


@_cleared.register("Tensor")
def _clear(total: Tensor) -> Tensor:
    return ops.assign(total, ops.zeros_like(total))


@_written.register("Tensor", "Tensor")
def _write(weight: Tensor, values: Tensor) -> Tensor:
    return ops.assign(weight, values.reshape(weight.shape).astype(weight.dtype))


class Ema:
    """Exponential moving average of the trained weights, float32.

    The decay warms up as (1 + n) / (10 + n), so early averages are not dominated by the starting point.
    """

    def __init__(self, update: Update, *, decay: float) -> None:
        self.decay = decay
        self._update = update
        self.averages = [
            _state("ema", index, master, to_array(master)) for index, master in enumerate(update.masters)
        ]  # fmt: skip

    def update(self, *, step: int) -> None:
        """Move the averages towards the weights after update number `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, master in zip(self.averages, self._update.masters):
            ops.assign_add(average, (master.astype(ms.float32) - average) * weight)

    def state(self) -> dict[str, list[Parameter]]:
        """Return the averages as `Update.state` has its own."""
        return {"ema": self.averages}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the averages into the model for the duration."""
        update = self._update
        kept = [(m, to_array(m)) for slot, m in zip(update.division.own, update.masters) if m is slot.weight]
        try:
            update.write(self.averages)
            yield
        finally:
            for master, array in kept:  # a master that is the model's own weight
                put(master, array)
            update.write(update.masters)


def _master(slot: Own | Bucket, dtype: Any) -> Parameter:
    """Return the weights to update, in `dtype` (float32 for a bucket): the model's own memory where that will do."""
    if isinstance(slot, Bucket):
        weights = {weight.name: weight for weight in slot.weights}
        share = slot.share_of(lambda name: to_array(weights[name]))
        return Parameter(Tensor(share), name=f"optimizer.master.{slot.weights[0].name}", requires_grad=False)
    if slot.weight.dtype == dtype:
        return slot.weight
    tensor = to_tensor(to_array(slot.weight), dtype)
    return Parameter(tensor, name=f"optimizer.master.{slot.weight.name}", requires_grad=False)


def _state(
    kind: str, index: int, like: Parameter, values: np.ndarray | None = None, *, dtype: Any = ms.float32
) -> Parameter:
    """Return state that goes with a parameter, zeros unless it has `values`."""
    array = np.zeros(like.shape, np.float32) if values is None else values.astype(np.float32)
    return Parameter(to_tensor(array, dtype), name=f"optimizer.{kind}.{index}", requires_grad=False)


def _scalar(name: str, value: float = 0.0) -> Parameter:
    return Parameter(Tensor(np.float32(value)), name=f"optimizer.{name}", requires_grad=False)
