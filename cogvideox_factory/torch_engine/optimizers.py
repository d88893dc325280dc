"""The optimizers: torch's fused Adam, and those that torch does not have, on the part of each weight a process holds.

Our own keep three promises that the packages they come from do not. Nothing waits for the device. A step whose
`found_inf` is 1 leaves weights and state as they are. And a weight may be divided by rows among processes: what is
global (Prodigy's step size, CAME's columns) is summed over them, all other state lies beside the rows it belongs to,
so a checkpoint fits any number of processes.

| | state of a weight | paper |
|---|---|---|
| `adamw`, `adam` | two moments, float32 | Loshchilov & Hutter, arXiv 1711.05101; Kingma & Ba, arXiv 1412.6980 |
| `adamw8bit` | two moments, 8 bits and a scale for each 256 | Dettmers et al., arXiv 2110.02861 |
| `prodigy` | two moments, the start, a sum of gradients, float32 | Mishchenko & Defazio, arXiv 2306.06101 |
| `came` | one moment; means of rows and columns | Luo et al., arXiv 2307.02047 |
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory.torch_engine.guarded import Guarded, Total
from cogvideox_factory.torch_engine.low_precision import AdamW8bit, StochasticAdamW


def make_optimizer(
    name: str,
    weights: Sequence[Tensor],
    *,
    shapes: Sequence[torch.Size],
    betas: tuple[float, float],
    beta3: float | None,
    eps: float,
    weight_decay: float,
    total: Total,
    seed: int,
    num_skipped: Tensor,
) -> Guarded:
    """Return the optimizer `name`, its state made; the learning rate is set before each step.

    Args:
        name: "adamw", "adam", "adamw8bit", "prodigy" or "came".
        weights: what this process holds of each; in bfloat16 only with "adamw" and "adamw8bit", which then round
            stochastically.
        shapes: of the whole weights.
        betas: decay of the first and the second moment.
        beta3: of Prodigy's sums (default sqrt(beta2)), or of CAME's instability (default 0.9999).
        eps: added to the denominator (CAME has its own).
        weight_decay: decoupled; with "adam", added to the gradient.
        total: sums over the processes that divide the weights.
        seed: of stochastic rounding.
        num_skipped: steps that changed nothing, a device scalar that the caller counts up after each.
    """
    group: dict[str, Any] = {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if name == "adamw8bit":
        return AdamW8bit(weights, group, shapes=shapes, seed=seed)
    if name == "adamw" and any(weight.dtype == torch.bfloat16 for weight in weights):
        return StochasticAdamW(weights, group, seed=seed, num_skipped=num_skipped)
    if name in ("adamw", "adam"):
        return FusedAdam(weights, group, decoupled=name == "adamw")
    if name == "prodigy":
        return Prodigy(weights, group | {"beta3": betas[1] ** 0.5 if beta3 is None else beta3}, total=total)
    assert name == "came", name
    return Came(weights, group | {"beta3": 0.9999 if beta3 is None else beta3}, shapes=shapes, total=total)


# --- Adam and AdamW ---------------------------------------------------------------------------------------------------


class FusedAdam(Guarded):
    """Adam and AdamW by torch's kernels, which take all weights at once and look at `found_inf` themselves.

    `torch.optim` does the same with a sum a weight to count its steps and some sorting of weights at each step, which
    on small models takes as long as the kernel.
    """

    WHOLE = frozenset({"step"})

    def __init__(self, weights: Sequence[Tensor], group: dict[str, Any], *, decoupled: bool) -> None:
        super().__init__(weights, group)
        self._kernel = torch._fused_adamw_ if decoupled else torch._fused_adam_
        self._steps = torch.zeros(len(weights), device=weights[0].device)
        for index, weight in enumerate(weights):
            moments = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq")}
            self.state[weight] = {"step": self._steps[index], **moments}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update to the weights that have a gradient."""
        assert closure is None
        weights, group = self._weights, self.param_groups[0]
        states = [self.state[weight] for weight in weights]
        steps = [state["step"] for state in states]
        counted = [self._steps] if len(weights) == len(self._steps) else steps
        torch._foreach_add_(counted, 1)
        self._kernel(
            weights, [w.grad for w in weights if w.grad is not None], [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states], [], steps, lr=group["lr"], beta1=group["betas"][0],
            beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"], amsgrad=False,
            maximize=False, found_inf=self.found_inf,
        )  # fmt: skip
        if self.found_inf is not None:
            torch._foreach_sub_(counted, [self.found_inf] * len(counted))


# --- Prodigy ----------------------------------------------------------------------------------------------------------


class Prodigy(Guarded):
    """Adam that finds its step size: algorithm 4 of the paper, and the learning rate is a factor of 1.

    Bias correction and decoupled decay as in AdamW. The sum under the estimate leaves out the learning rate, so that a
    warm-up does not make it too large.
    """

    FIRST_D = 1e-6

    def __init__(self, weights: Sequence[Tensor], group: dict[str, Any], *, total: Total) -> None:
        super().__init__(weights, group)
        self._total = total
        start = {"steps": 0.0, "d": self.FIRST_D, "numerator": 0.0}
        of = {"device": weights[0].device, "dtype": weights[0].dtype}
        self.common = {key: torch.tensor(value, **of) for key, value in start.items()}
        for weight in weights:
            zeros = {key: torch.zeros_like(weight) for key in ("exp_avg", "exp_avg_sq", "s")}
            self.state[weight] = {**zeros, "start": weight.detach().clone()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update; with a learning rate of 0 nothing is learnt about the step size either."""
        assert closure is None
        group, d = self.param_groups[0], self.common["d"]
        if not group["lr"]:
            return
        beta1, beta2 = group["betas"]
        count = self._count()
        rate = group["lr"] * d * (1 - beta2**count).sqrt() / (1 - beta1**count)
        gained = self._gather()
        numerator = self.common["numerator"] * group["beta3"] + rate * d / self.FIRST_D * gained[0]
        grown = torch.where(gained[1] > 0, torch.maximum(d, numerator / gained[1]), d)
        for weight in self._weights:
            state = self.state[weight]
            denominator = state["exp_avg_sq"].sqrt().add_(grown * group["eps"])
            new = weight * (1 - rate * group["weight_decay"])
            self._keep(weight, new.sub_(rate * state["exp_avg"] / denominator))
        for key, value in (("steps", count), ("d", grown), ("numerator", numerator)):
            self._keep(self.common[key], value)

    def _gather(self) -> Tensor:
        """Move moments and sums; return <gradients, start - weights> and the 1-norm of the sums of gradients: [2]."""
        group, d = self.param_groups[0], self.common["d"]
        beta1, beta2 = group["betas"]
        gained = torch.zeros(2, device=d.device, dtype=d.dtype)
        for weight in self._weights:
            state, grad = self.state[weight], weight.grad
            assert grad is not None
            total = state["s"] * group["beta3"] + grad * (d * d / self.FIRST_D)
            gained += torch.stack([(grad * (state["start"] - weight)).sum(), total.abs().sum()])
            self._keep(state["s"], total)
            self._keep(state["exp_avg"], state["exp_avg"] * beta1 + grad * (d * (1 - beta1)))
            self._keep(state["exp_avg_sq"], state["exp_avg_sq"] * beta2 + grad.square() * (d * d * (1 - beta2)))
        return self._total(gained)


# --- CAME -------------------------------------------------------------------------------------------------------------


class Came(Guarded):
    """Confidence-guided Adafactor: algorithm 2 of the paper.

    Of the second moment and of the instability of a matrix only means of rows and columns are kept; vectors keep their
    second moment and have no instability. Divided by rows, means over rows are summed over the processes.
    """

    WHOLE = frozenset({"exp_avg_sq_col", "exp_avg_res_col"})
    EPS1, EPS2 = 1e-30, 1e-16
    LARGEST_UPDATE = 1.0
    """Of the root mean square of an update, before the learning rate (d of the paper)."""

    def __init__(
        self, weights: Sequence[Tensor], group: dict[str, Any], *, shapes: Sequence[torch.Size], total: Total
    ) -> None:
        super().__init__(weights, group)
        self._total = total
        self._shapes = dict(zip(weights, shapes, strict=True))
        for weight, shape in self._shapes.items():
            state = self.state[weight]
            state["exp_avg"] = torch.zeros_like(weight)
            if len(shape) < 2:
                state["exp_avg_sq"] = torch.zeros_like(weight)
                continue
            rows = weight.flatten(1)
            for key in ("exp_avg_sq", "exp_avg_res"):
                state[f"{key}_row"] = rows.new_zeros(rows.shape[0])
                state[f"{key}_col"] = rows.new_zeros(rows.shape[1])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        assert closure is None
        for weight in self._weights:
            self._update(weight)

    def _update(self, weight: Tensor) -> None:
        state, group = self.state[weight], self.param_groups[0]
        beta1, beta2 = group["betas"]
        assert weight.grad is not None
        grad, factored = weight.grad, "exp_avg_sq" not in state
        square = grad.square().add_(self.EPS1)
        if factored:
            update = self._inverse_root(weight, "exp_avg_sq", square, beta2).mul_(grad)
        else:
            second = state["exp_avg_sq"].lerp(square, 1 - beta2)
            self._keep(state["exp_avg_sq"], second)
            update = second.rsqrt().mul_(grad)
        size = (self._total(update.square().sum()) / self._shapes[weight].numel()).sqrt()
        update /= (size / self.LARGEST_UPDATE).clamp(min=1.0)
        first = state["exp_avg"].lerp(update, 1 - beta1)
        self._keep(state["exp_avg"], first)
        if factored:
            instability = (update - first).square_().add_(self.EPS2)
            first = self._inverse_root(weight, "exp_avg_res", instability, group["beta3"]).mul_(first)
        self._keep(weight, weight * (1 - group["lr"] * group["weight_decay"]) - first.mul_(group["lr"]))

    def _inverse_root(self, weight: Tensor, key: str, square: Tensor, decay: float) -> Tensor:
        """Move the means of rows and columns towards those of `square`; return 1 / sqrt(their product / mean)."""
        state, square = self.state[weight], square.flatten(1)  # [R, C]
        rows = state[f"{key}_row"].lerp(square.mean(1), 1 - decay)
        # One sum over the processes for both: columns, and the rows' mean.
        means = self._total(torch.cat([square.sum(0), rows.sum().unsqueeze(0)])) / self._shapes[weight][0]
        columns = state[f"{key}_col"].lerp(means[:-1], 1 - decay)
        self._keep(state[f"{key}_row"], rows)
        self._keep(state[f"{key}_col"], columns)
        return ((rows / means[-1]).rsqrt_().unsqueeze(1) * columns.rsqrt()).view_as(weight)
