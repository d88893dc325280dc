"""AdamW whose state, or weights too, are kept in fewer bits: stochastic bfloat16, and moments of 8 bits."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_factory.draws import generator
from cogvideox_factory.plan.optimizer import BLOCK, SMALLEST
from cogvideox_factory.torch_engine.guarded import Guarded

# --- AdamW in bfloat16 ------------------------------------------------------------------------------------------------


def round_stochastically(value: Tensor, draws: torch.Generator) -> Tensor:
    """Round float32 to bfloat16, up or down with the probability of the distance, so the mean is kept."""
    bits = value.contiguous().view(torch.int32)
    carry = torch.randint(0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=draws)
    # Adding below the kept 16 bits carries into them as often as the remainder says; sign and magnitude separate.
    return ((bits + carry) & -65536).view(torch.float32).to(torch.bfloat16)


class StochasticAdamW(Guarded):
    """AdamW on bfloat16 weights and moments: 8 bytes a parameter with the gradient.

    bfloat16 keeps 8 bits, so rounding to nearest loses every update below 1/256 of a weight; rounding up or down
    with the probability of the remainder keeps them on average (Gupta et al. 2015, arXiv 1502.02551).
    """

    def __init__(self, weights: Sequence[Tensor], group: dict[str, Any], *, seed: int, num_skipped: Tensor) -> None:
        super().__init__(weights, group)
        self.seed = seed
        self.num_steps = 0
        """Seeds the rounding, with the number of the weight."""
        self._num_skipped = num_skipped
        """Steps before this one that changed nothing, counted by the caller."""
        for weight in weights:
            self.state[weight] = {"exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        assert closure is None
        self.num_steps += 1
        count = self.num_steps - self._num_skipped
        corrections = [_bias_correction(beta, count) for beta in self.param_groups[0]["betas"]]
        for index, weight in enumerate(self.param_groups[0]["params"]):
            if weight.grad is not None:
                self._update(weight, index, *corrections)

    def _update(self, weight: Tensor, index: int, correction1: Tensor, correction2: Tensor) -> None:
        state, group = self.state[weight], self.param_groups[0]
        beta1, beta2 = group["betas"]
        assert weight.grad is not None
        grad = weight.grad.float()
        first = state["exp_avg"].float().lerp_(grad, 1 - beta1)
        second = state["exp_avg_sq"].float().lerp_(grad.square(), 1 - beta2)
        denominator = (second / correction2).sqrt_().add_(group["eps"]).mul_(correction1)
        new = weight.float().mul_(1 - group["lr"] * group["weight_decay"])
        new.addcdiv_(first, denominator, value=-group["lr"])
        draws = rounding_draws(weight.device, self.seed, self.num_steps, index)
        for target, value in ((weight, new), (state["exp_avg"], first), (state["exp_avg_sq"], second)):
            self._keep(target, round_stochastically(value, draws))


def _bias_correction(beta: float, count: Tensor) -> Tensor:
    """Return 1 - beta^count, which float32 would lose digits of for a beta near 1."""
    return -torch.expm1(count * (math.log(beta) if beta else -math.inf))


def rounding_draws(device: torch.device, seed: int, step: int, index: int) -> torch.Generator:
    """Return what rounds weight number `index` in a step."""
    draws = torch.Generator(device)
    draws.manual_seed(int(generator(seed, "rounding", step, index).integers(2**62)))
    return draws


# --- AdamW with moments of 8 bits -------------------------------------------------------------------------------------


class Code:
    """256 numbers between -1 (or 0) and 1, dense near 0, that stand for the values of a block divided by its largest.

    Seven decades, each with twice as many numbers as the one below (dynamic tree quantization, section 1.3 of the
    paper); 0 and 1 besides. Blocks end with a row, so that rows can go to other processes without being rounded anew.
    """

    def __init__(self, *, signed: bool, device: torch.device) -> None:
        values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
        for decade in range(7):
            edges = torch.linspace(0.1, 1, (1 if signed else 2) * 2**decade + 1, dtype=torch.float64)
            middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - 6)
            values += [middles, -middles] if signed else [middles]
        ordered = torch.cat(values).sort().values
        self.values = ordered.to(device=device, dtype=torch.float32)  # [256]
        self.edges = ((ordered[:-1] + ordered[1:]) / 2).to(device=device, dtype=torch.float32)  # [255]

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return codes (uint8, of the shape of `x`) and scales [R, blocks of a row] of `x` [R, ...]."""
        rows = x.flatten(1)  # [R, C]
        width = min(BLOCK, rows.shape[1])
        missing = -rows.shape[1] % width
        blocks = (F.pad(rows, (0, missing)) if missing else rows).unflatten(1, (-1, width))  # [R, blocks, width]
        scale = blocks.abs().amax(-1).clamp_(min=1e-12)
        codes = torch.bucketize(blocks / scale.unsqueeze(-1), self.edges, right=True, out_int32=True)
        return codes.to(torch.uint8).flatten(1)[:, : rows.shape[1]].view_as(x), scale

    def decode(self, codes: Tensor, scale: Tensor) -> Tensor:
        """Return the float32 values that `encode` gave codes and scales for."""
        rows = codes.flatten(1)
        scales = scale.repeat_interleave(min(BLOCK, rows.shape[1]), dim=1)[:, : rows.shape[1]]
        return (self.values[rows.int()] * scales).view_as(codes)


class AdamW8bit(Guarded):
    """AdamW with both moments in 8 bits (Dettmers et al. 2021, arXiv 2110.02861).

    The update itself is made of the new moments before they are rounded. Vectors and small weights keep float32
    moments: they are few, and norms are delicate.
    """

    def __init__(
        self, weights: Sequence[Tensor], group: dict[str, Any], *, shapes: Sequence[torch.Size], seed: int
    ) -> None:
        super().__init__(weights, group)
        device = weights[0].device
        self.seed = seed
        self.num_steps = 0
        """Seeds the rounding of bfloat16 weights, with the number of the weight."""
        self.common["steps"] = torch.zeros((), device=device)
        self._codes = {"exp_avg": Code(signed=True, device=device), "exp_avg_sq": Code(signed=False, device=device)}
        for weight, shape in zip(weights, shapes, strict=True):
            zero = torch.zeros_like(weight, dtype=torch.float32)
            for key, code in self._codes.items():
                if len(shape) < 2 or shape.numel() < SMALLEST:
                    self.state[weight][key] = zero.clone()
                else:
                    self.state[weight][f"{key}_codes"], self.state[weight][f"{key}_scale"] = code.encode(zero)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Apply one update."""
        assert closure is None
        self.num_steps += 1
        for index, weight in enumerate(self.param_groups[0]["params"]):
            if weight.grad is not None:
                self._update(weight, index)
        self._keep(self.common["steps"], self._count())

    def _update(self, weight: Tensor, index: int) -> None:
        group = self.param_groups[0]
        beta1, beta2 = group["betas"]
        assert weight.grad is not None
        grad = weight.grad.float()
        first = self._moment(weight, "exp_avg").lerp(grad, 1 - beta1)
        second = self._moment(weight, "exp_avg_sq").lerp(grad.square(), 1 - beta2)
        self._remember(weight, "exp_avg", first)
        self._remember(weight, "exp_avg_sq", second)
        count = self._count()
        denominator = second.sqrt_().div_((1 - beta2**count).sqrt()).add_(group["eps"])
        new = weight.float() * (1 - group["lr"] * group["weight_decay"])
        new -= first.div_(denominator).mul_(group["lr"] / (1 - beta1**count))
        if weight.dtype == torch.bfloat16:
            new = round_stochastically(new, rounding_draws(weight.device, self.seed, self.num_steps, index))
        self._keep(weight, new)

    def _moment(self, weight: Tensor, key: str) -> Tensor:
        state = self.state[weight]
        return state[key] if key in state else self._codes[key].decode(state[f"{key}_codes"], state[f"{key}_scale"])

    def _remember(self, weight: Tensor, key: str, value: Tensor) -> None:
        state = self.state[weight]
        if key in state:
            self._keep(state[key], value)
            return
        codes, scale = self._codes[key].encode(value)
        self._keep(state[f"{key}_codes"], codes)
        self._keep(state[f"{key}_scale"], scale)
