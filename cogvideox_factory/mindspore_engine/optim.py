"""Updating weights: what happens between the gradients of micro-batches and the next forward pass.

An `Update` accumulates in float32, clips by the global norm, skips a step that is not finite, and lets AdamW work on
float32 master weights, which it writes back into the model. All state is in parameters that change in place, so both
halves compile: `add` a micro-batch's gradients, then `step`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, ops

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.border import put, to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode


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
            mode: how `step` runs.

        Raises:
            FactoryError: nothing is to be trained.
        """
        self.trained = list(parameters)
        if not self.trained:
            raise FactoryError("no weight is to be trained; check train.method and lora.target_modules.")
        self.max_grad_norm = max_grad_norm
        self.masters = [p if p.dtype == ms.float32 else _state(p, "master", to_array(p)) for p in self.trained]
        self.sums = [_state(p, "sum") for p in self.trained]
        self.exp_avg = [_state(p, "exp_avg") for p in self.trained]
        self.exp_avg_sq = [_state(p, "exp_avg_sq") for p in self.trained]
        self.num_updates = Parameter(Tensor(np.float32(0)), name="optimizer.num_updates", requires_grad=False)
        self.num_skipped = Parameter(Tensor(np.float32(0)), name="optimizer.num_skipped", requires_grad=False)
        self._trained, self._masters, self._sums, self._exp_avg, self._exp_avg_sq = map(
            ms.ParameterTuple, (self.trained, self.masters, self.sums, self.exp_avg, self.exp_avg_sq)
        )
        self._has_copies = any(master is not weight for weight, master in zip(self.trained, self.masters))
        decays = (weight_decay, 0.0) if decoupled else (0.0, weight_decay)
        self._numbers = tuple(to_tensor(np.array(x, np.float32)) for x in (*betas, eps, *decays))
        self._step: Callable[[Tensor], Tensor] = mode.compiled(self._update)

    def add(self, grads: Sequence[Tensor]) -> None:
        """Add the gradients of one micro-batch, one for each trained parameter; compiles within another function."""
        _map(_added, self._sums, grads)

    def step(self, learning_rate: float) -> Tensor:
        """Clip, update and clear the gradients; return the global gradient norm (a device scalar).

        A step whose norm is not finite leaves weights and state as they are and is counted in `num_skipped`.
        """
        return self._step(to_tensor(np.array(learning_rate, np.float32)))

    def weight_norm(self) -> float:
        """Return the norm of the trained weights (this waits for the device)."""
        return float(sum(float(master.square().sum()) for master in self.masters)) ** 0.5

    def tensors(self) -> dict[str, Parameter]:
        """Return all state of the model's size by checkpoint name: weights and moments."""
        state: dict[str, Parameter] = {}
        for weight, *parts in zip(self.trained, self.masters, self.exp_avg, self.exp_avg_sq):
            names = (f"model.{weight.name}", f"optimizer.exp_avg.{weight.name}", f"optimizer.exp_avg_sq.{weight.name}")
            state |= dict(zip(names, parts))
        return state

    def scalars(self) -> dict[str, float]:
        """Return the counters (this waits for the device)."""
        return {"num_updates": float(self.num_updates), "num_skipped": float(self.num_skipped)}

    def restore(self, scalars: Mapping[str, float]) -> None:
        """Take over the counters and copy the (already loaded) masters into the model."""
        put(self.num_updates, np.array(scalars["num_updates"], np.float32))
        put(self.num_skipped, np.array(scalars["num_skipped"], np.float32))
        for weight, master in zip(self.trained, self.masters):
            if master is not weight:
                ops.assign(weight, master.astype(weight.dtype))

    def _update(self, learning_rate: Tensor) -> Tensor:
        norm = ops.sqrt(ops.addn(_map(_squared, self._sums)))
        accepted = ops.isfinite(norm)
        factor = mint.clamp(self.max_grad_norm / (norm + 1e-6), max=1.0)
        count = self.num_updates + accepted.astype(ms.float32)
        beta1, beta2, eps, decay, grad_decay = self._numbers
        update_one = ops.partial(  # one by one: a graph cannot unpack into this
            _updated, beta1, beta2, eps, decay, grad_decay, learning_rate, factor, 1 - ops.pow(beta1, count),
            1 - ops.pow(beta2, count), accepted,
        )  # fmt: skip
        _map(update_one, self._masters, self._exp_avg, self._exp_avg_sq, self._sums)
        if self._has_copies:
            _map(_copied, self._trained, self._masters)
        ops.assign(self.num_updates, count)
        ops.assign_add(self.num_skipped, 1 - accepted.astype(ms.float32))
        return norm


# What is done to each weight. A graph of a Python loop over hundreds of weights would be too deep to compile; a map is
# flat.
_map = ops.HyperMap()
_added = ops.MultitypeFuncGraph("added")
_squared = ops.MultitypeFuncGraph("squared")
_updated = ops.MultitypeFuncGraph("updated")
_copied = ops.MultitypeFuncGraph("copied")


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
    grad = total * factor + grad_decay * master
    new_first = first + (grad - first) * (1 - beta1)
    new_second = second * beta2 + grad.square() * (1 - beta2)
    denominator = ops.sqrt(new_second) / ops.sqrt(second_correction) + eps
    new = master * (1 - learning_rate * decay) - learning_rate / first_correction * (new_first / denominator)
    ops.assign(first, mint.where(accepted, new_first, first))
    ops.assign(second, mint.where(accepted, new_second, second))
    ops.assign(master, mint.where(accepted, new, master))
    return ops.assign(total, ops.zeros_like(total))


@_copied.register("Tensor", "Tensor")
def _copy(weight: Tensor, master: Tensor) -> Tensor:
    return ops.assign(weight, master.astype(weight.dtype))


class Ema:
    """Exponential moving average of the trained weights, float32.

    The decay warms up as (1 + n) / (10 + n), so early averages are not dominated by the starting point.
    """

    def __init__(self, update: Update, *, decay: float) -> None:
        self.decay = decay
        self._update = update
        self.averages = [_state(p, "ema", to_array(master)) for p, master in zip(update.trained, update.masters)]

    def update(self, *, step: int) -> None:
        """Move the averages towards the weights after update number `step`."""
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        for average, master in zip(self.averages, self._update.masters):
            ops.assign_add(average, (master - average) * weight)

    def tensors(self) -> dict[str, Parameter]:
        """Return the averages by checkpoint name."""
        return {f"ema.{p.name}": average for p, average in zip(self._update.trained, self.averages)}

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Put the averages into the model for the duration."""
        kept = [to_array(weight) for weight in self._update.trained]
        try:
            for weight, average in zip(self._update.trained, self.averages):
                put(weight, to_array(average))
            yield
        finally:
            for weight, array in zip(self._update.trained, kept):
                put(weight, array)


def _state(parameter: Parameter, kind: str, values: np.ndarray | None = None) -> Parameter:
    """Return float32 state of a weight, zeros unless it has `values`."""
    array = np.zeros(parameter.shape, np.float32) if values is None else values.astype(np.float32)
    return Parameter(Tensor(array), name=f"optimizer.{kind}.{parameter.name}", requires_grad=False)
