"""A frozen Linear with low-rank adapters on slices of its output.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds `scale * B A x` to a frozen `W x`. Two things here are unusual.
One Linear may carry several named targets, since q, k and v are rows of one fused projection; all of them,
for all adapters, share a single down-projection, so the wide activation `x` is read and saved once. And the
adapters stay float32 over a half-precision base: they are cast on the fly (they are small), the activations
never are.

DoRA (Liu et al. 2024, arXiv 2402.09353) also learns the length of each row of `W + scale * B A`. Its norm is
held constant in the backward pass (section 4.3 of the paper), as peft does.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.torch_engine.border import put_rows, whole
from cogvideox_factory.torch_engine.linear import Linear, dense, emulated, is_low_bit, linear, product, scaling_of

# Legend: N tokens of all samples, I input channels, O output channels of the fused Linear, P rows of one
# target, R rank (of all parts together where several are stacked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Where a target, by its name in a diffusers checkpoint, lies among the rows of a fused Linear."""

    name: str
    start: int
    stop: int


class LoraFactors(nn.Module):
    """One adapter on one target: `lora_A` [R, I], `lora_B` [P, R] and, for DoRA, `magnitude` [P]."""

    def __init__(
        self, rows: Rows, *, in_features: int, rank: int, scale: float, use_dora: bool, device: torch.device
    ) -> None:
        super().__init__()
        self.rows = rows
        self.rank = rank
        self.scale = scale
        options: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.lora_A = nn.Parameter(torch.zeros(rank, in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(rows.stop - rows.start, rank, **options))
        self.magnitude = nn.Parameter(torch.ones(rows.stop - rows.start, **options)) if use_dora else None

    def extra_repr(self) -> str:
        """Name the target in `print(model)`."""
        dora = ", dora" if self.magnitude is not None else ""
        return f"{self.rows.name}, rank={self.rank}, scale={self.scale:g}{dora}"


class LoraLinear(Linear):
    """A frozen Linear plus the adapters that are switched on, each with its weight.

    It takes over the parameters `weight` and `bias` of the Linear it is made from, under their names.
    """

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.float8 = base.float8 if isinstance(base, Linear) else None
        self.requires_grad_(False)
        self.adapters = nn.ModuleDict()  # adapter name -> target -> LoraFactors
        self.settings: dict[str, Mapping[str, Any]] = {}  # adapter name -> what it was made with
        self.weights: dict[str, float] = {}  # the adapters that are on, in the order they were asked for
        self.original: torch.Tensor | None = None  # the base weight while adapters are merged into it

    def plain(self) -> Linear:
        """Return a Linear without adapters, with the same parameters."""
        linear = Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias, linear.float8 = self.weight, self.bias, self.float8
        return linear

    def parts(self, adapter_name: str) -> dict[str, LoraFactors]:
        """Return the factors of one adapter by target; empty when it does not touch this Linear."""
        targets = self.adapters[adapter_name] if adapter_name in self.adapters else nn.ModuleDict()
        return dict(targets.items())  # pyright: ignore[reportCallIssue, reportReturnType]

    def attach(self, adapter_name: str, key: str, part: LoraFactors, settings: Mapping[str, Any]) -> None:
        """Add the factors of one adapter for one target, whose parameters go by `key`."""
        if adapter_name not in self.adapters:
            self.adapters[adapter_name] = nn.ModuleDict()
            self.settings[adapter_name] = settings
        assert key not in self.parts(adapter_name), (adapter_name, key)
        self.adapters[adapter_name][key] = part  # pyright: ignore[reportIndexIssue]

    def drop(self, adapter_name: str) -> None:
        """Forget one adapter, if it is here."""
        if adapter_name in self.adapters:
            del self.adapters[adapter_name]
            del self.settings[adapter_name]
        self.weights.pop(adapter_name, None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map [..., I] to [..., O]; with no adapter on, exactly as the plain Linear does."""
        active = list(self._active())
        if not active or self.original is not None:
            return super().forward(input)
        dora = [part for _, part, _ in active if part.magnitude is not None]
        scaling = scaling_of(self)
        if not dora:
            return low_rank_linear(input, self.weight, self.bias, [part for _, *part in active], scaling)
        if len({name for name, _, _ in active}) > 1:  # row gains do not add up: go through the weight itself
            return linear(input, self.updated_weight().to(input.dtype), self.bias, scaling)
        y = low_rank_linear(input, self.weight, None, [part for _, *part in active], scaling)
        # Only the small difference to 1 is rounded to the dtype of the activations.
        excess = self._row_gain_minus_one(active).to(input.dtype)
        return torch.addcmul(y if self.bias is None else y + self.bias, y, excess)

    def updated_weight(self) -> torch.Tensor:
        """Return the float32 weight [O, I] that alone does what the base and the adapters that are on do.

        Adapters apply in the order of `weights`: a DoRA also rescales what came before it, as in peft.
        """
        chains: dict[Rows, list[tuple[LoraFactors, float]]] = {}
        for _, part, scale in self._active():
            chains.setdefault(part.rows, []).append((part, scale))
        weight, pieces, end = dense(self.weight), [], 0
        for rows in sorted(chains, key=lambda rows: rows.start):
            piece = weight[rows.start : rows.stop].float()
            for part, scale in chains[rows]:
                piece = torch.addmm(piece, part.lora_B, part.lora_A, alpha=scale)
                if part.magnitude is not None:
                    piece = (part.magnitude / self._row_norms(part, scale))[:, None] * piece
            pieces += [weight[end : rows.start].float(), piece]
            end = rows.stop
        return torch.cat([*pieces, weight[end:].float()])

    @torch.no_grad()
    def merge(self) -> None:
        """Fold the adapters that are on into the base weight, rounding once; `unmerge` restores every bit.

        Raises:
            FactoryError: the base is kept in few bits, which would lose the adapters' small changes.
        """
        if is_low_bit(self.weight):
            raise FactoryError("a base of few bits cannot take adapters in; load the plain model and merge there.")
        if self.original is None and any(self._active()):
            merged = self.updated_weight().to(self.weight.dtype)
            self.original = self.weight.data
            self.weight.data = merged

    def unmerge(self) -> None:
        """Undo `merge`; without one, do nothing."""
        if self.original is not None:
            self.weight.data = self.original
            self.original = None

    @torch.no_grad()
    def reset_magnitudes(self, adapter_name: str) -> None:
        """Set DoRA's magnitudes to the row lengths of the base weight: with B = 0 the adapter then changes nothing."""
        has_magnitudes = any(part.magnitude is not None for part in self.parts(adapter_name).values())
        weight = dense(whole(self.weight)) if has_magnitudes else None
        for part in self.parts(adapter_name).values():
            if part.magnitude is not None and weight is not None:
                rows = weight[part.rows.start : part.rows.stop].float()
                put_rows(part.magnitude, torch.linalg.vector_norm(rows, dim=1))

    def _active(self) -> Iterator[tuple[str, LoraFactors, float]]:
        """Yield (adapter, factors, effective scale); a weight of 0 switches an adapter off."""
        for name, weight in self.weights.items():
            if weight != 0:
                for part in self.parts(name).values():
                    yield name, part, part.scale * weight

    @torch.no_grad()
    def _row_norms(self, part: LoraFactors, scale: float) -> torch.Tensor:
        """Return the length of each row of `W + scale * B A` in float32: [P]."""
        rows = dense(self.weight)[part.rows.start : part.rows.stop].float()
        return torch.linalg.vector_norm(torch.addmm(rows, part.lora_B, part.lora_A, alpha=scale), dim=1)

    def _row_gain_minus_one(self, active: list[tuple[str, LoraFactors, float]]) -> torch.Tensor:
        """Return magnitude / row length - 1 in float32, 0 on rows that no DoRA touches: [O]."""
        pieces, end = [], 0
        zeros = torch.zeros(self.out_features, dtype=torch.float32, device=self.weight.device)
        for _, part, scale in sorted(active, key=lambda item: item[1].rows.start):
            pieces.append(zeros[end : part.rows.start])
            assert part.magnitude is not None, "one adapter is DoRA on all of its targets or on none"
            pieces.append(part.magnitude / self._row_norms(part, scale) - 1)
            end = part.rows.stop
        return torch.cat([*pieces, zeros[end:]])


def low_rank_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, parts: list[Any], scaling: str | None = None
) -> torch.Tensor:
    """Return `x W^T + bias` with `scale * x A^T B^T` added to the rows of each (factors, scale) of `parts`.

    Args:
        x: [..., I], float32 or half precision like `weight`.
        weight: [O, I]. It gets a gradient only if it asks for one.
        bias: [O] or None.
        parts: pairs of `LoraFactors` and effective scale, their factors float32.
        scaling: for products with `weight` in float8; those with factors are small.
    """
    slices = tuple((part.rows.start, part.rows.stop, scale) for part, scale in parts)
    factors = [factor for part, _ in parts for factor in (part.lora_A, part.lora_B)]
    if not torch.is_grad_enabled():  # compilers lose count of the function's arguments there
        return _apply(x, weight, bias, slices, factors, scaling)[0]
    return _LowRankLinear.apply(x, weight, bias, slices, scaling, *factors)  # pyright: ignore[reportReturnType]


def _apply(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    slices: Any,
    factors: Sequence[torch.Tensor],
    scaling: str | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the output [..., O], and the down-projections [N, R] of all parts."""
    flat = x.reshape(-1, x.shape[-1])  # [N, I]
    hidden = product(flat, _stack(factors[::2], x.dtype).T)  # [N, R]
    out = linear(flat, dense(weight), bias, scaling)  # [N, O]
    ups = factors[1::2]
    for (start, stop, scale), up, low in zip(slices, ups, hidden.split([up.shape[1] for up in ups], dim=1)):
        # The sign is there for -0.0: with B = 0 this computes out - (+0), which keeps every bit of `out`,
        # whereas -0.0 + 0.0 is +0.0.
        _add_product(out[:, start:stop], low, (up * -scale).to(x.dtype).T, sign=-1)
    return out.view(*x.shape[:-1], out.shape[-1]), hidden  # N is 0 where another rank has all text


class _LowRankLinear(torch.autograd.Function):
    """One graph node for base and adapters: saves `x` once, and adds in place of making wide temporaries."""

    @staticmethod
    def forward(ctx: Any, x, weight, bias, slices, scaling, *factors):
        out, hidden = _apply(x, weight, bias, slices, factors, scaling)
        ctx.slices, ctx.scaling = slices, scaling
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, hidden, weight, *factors)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, hidden, weight, *factors = ctx.saved_tensors
        flat, grad = x.reshape(-1, x.shape[-1]), grads[0].reshape(-1, grads[0].shape[-1])  # [N, I], [N, O]
        downs, ups = factors[::2], factors[1::2]
        ranks = [up.shape[1] for up in ups]
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.cat(
            [product(grad[:, a:b], (up * scale).to(grad.dtype)) for (a, b, scale), up in zip(ctx.slices, ups)],
            dim=1,
        )  # [N, R]
        grad_x = None
        if needs_x:
            grad_x = product(grad, dense(weight), ctx.scaling)  # [N, I]
            _add_product(grad_x, grad_hidden, _stack(downs, grad.dtype))
            grad_x = grad_x.view_as(x)
        grad_factors: list[torch.Tensor | None] = [None] * len(factors)
        if any(ctx.needs_input_grad[5::2]):
            grad_factors[::2] = product(grad_hidden.T, flat).float().split(ranks)  # each [R, I]
        for index, ((a, b, scale), low) in enumerate(zip(ctx.slices, hidden.split(ranks, dim=1))):
            if ctx.needs_input_grad[6 + 2 * index]:
                grad_factors[2 * index + 1] = product(grad[:, a:b].T, low).float() * scale  # [P, R]
        grad_weight = product(grad.T, flat, ctx.scaling) if needs_weight else None
        grad_bias = grad.sum(0) if needs_bias and ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None, None, *grad_factors


def _add_product(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, sign: int = 1) -> None:
    """Add sign * a b to `out` in place, rounding once."""
    if emulated(out):
        out.copy_(torch.addmm(out.float(), a.float(), b.float(), alpha=sign))
    else:
        out.addmm_(a, b, alpha=sign)


def _stack(downs, dtype: torch.dtype) -> torch.Tensor:
    """Join the A factors of all parts: [R, I] in `dtype`."""
    return (downs[0] if len(downs) == 1 else torch.cat(downs)).to(dtype)
