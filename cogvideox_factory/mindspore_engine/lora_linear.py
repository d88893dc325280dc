"""A frozen Linear with low-rank adapters.

LoRA (Hu et al. 2021, arXiv 2106.09685) adds `scale * B A x` to a frozen `W x`. Adapters stay float32 over a
half-precision base: they are cast on the fly (they are small), the activations never are.

DoRA (Liu et al. 2024, arXiv 2402.09353) also learns the length of each row of `W + scale * B A`. Its norm is
held constant in the backward pass (section 4.3 of the paper), as peft does.

Which adapters are on is part of a graph; how strongly is a number that a graph reads, so it may change under it.
"""

from collections.abc import Mapping
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops

from cogvideox_factory.mindspore_engine.border import put, put_own, rows_of, to_array
from cogvideox_factory.mindspore_engine.linear import Linear, empty

# Legend: I input channels, O output channels, R rank


class LoraFactors(nn.Cell):
    """One adapter on one Linear: `lora_A` [R, I], `lora_B` [O, R] and, for DoRA, `magnitude` [O]."""

    def __init__(self, in_features: int, out_features: int, *, rank: int, scale: float, use_dora: bool) -> None:
        super().__init__()
        self.rank = rank
        self.scale = scale
        self.lora_A, self.lora_B = empty(rank, in_features), empty(out_features, rank)
        self.magnitude = empty(out_features) if use_dora else None
        self.strength = Parameter(Tensor(np.float32(scale)), requires_grad=False)
        """`scale` times the weight the adapter is on with."""

    def update(self) -> Tensor:
        """Return what it adds to the weight, float32 [O, I]."""
        return self.strength * mint.matmul(self.lora_B, self.lora_A)

    def trainable(self) -> list[Parameter]:
        """Return A, B and, for DoRA, the magnitudes."""
        return [self.lora_A, self.lora_B] + ([] if self.magnitude is None else [self.magnitude])


class LoraLinear(Linear):
    """A frozen Linear plus the adapters that are switched on.

    It takes over the parameters `weight` and `bias` of the Linear it is made from, under their names.
    """

    def __init__(self, base: Linear) -> None:
        super().__init__(1, 1, bias=False)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.gather = base.weight, base.bias, base.gather
        self.weight.requires_grad = False
        if self.bias is not None:
            self.bias.requires_grad = False
        self.parts = nn.CellList()
        self.names: list[str] = []
        """Of the adapters in `parts`."""
        self.settings: dict[str, Mapping[str, Any]] = {}
        """What adapters were made with, by name."""
        self.active: tuple[int, ...] = ()
        """Which of `parts` are on, in the order they were asked for."""
        self.original: np.ndarray | None = None
        """The base weight while adapters are merged into it."""
        self.is_merged = False

    def plain(self) -> Linear:
        """Return a Linear without adapters, with the same parameters."""
        linear = Linear(1, 1, bias=False)
        linear.in_features, linear.out_features = self.in_features, self.out_features
        linear.weight, linear.bias, linear.gather = self.weight, self.bias, self.gather
        return linear

    def part(self, adapter_name: str) -> LoraFactors | None:
        """Return the factors of one adapter, or None when it does not touch this Linear."""
        return self.parts[self.names.index(adapter_name)] if adapter_name in self.names else None

    def attach(self, adapter_name: str, *, rank: int, scale: float, settings: Mapping[str, Any]) -> LoraFactors:
        """Add an adapter of zeros, off, and return its factors."""
        assert adapter_name not in self.names, adapter_name
        use_dora = settings["use_dora"]
        part = LoraFactors(self.in_features, self.out_features, rank=rank, scale=scale, use_dora=use_dora)
        self.names.append(adapter_name)
        self.parts.append(part)
        self.settings[adapter_name] = settings
        return part

    def drop(self, adapter_name: str) -> None:
        """Forget one adapter, if it is here; the others stay on or off as they are."""
        if adapter_name in self.names:
            on = [self.names[index] for index in self.active if self.names[index] != adapter_name]
            kept = [(name, part) for name, part in zip(self.names, self.parts) if name != adapter_name]
            self.names = [name for name, _ in kept]
            self.parts = nn.CellList([part for _, part in kept])
            self.active = tuple(self.names.index(name) for name in on)
            del self.settings[adapter_name]

    def switch(self, weights: Mapping[str, float]) -> bool:
        """Switch on exactly the adapters in `weights`; return whether others are on than before."""
        before = self.active
        on = [name for name, weight in weights.items() if weight != 0 and name in self.names]
        self.active = tuple(self.names.index(name) for name in on)
        for name in on:
            part = self.parts[self.names.index(name)]
            put(part.strength, np.array(part.scale * weights[name], np.float32))
        return self.active != before

    def construct(self, x: Tensor) -> Tensor:
        """Map [..., I] to [..., O]; with no adapter on, exactly as the plain Linear does."""
        weight = self.whole_weight(x.dtype)
        bias = None if self.bias is None else self.bias.astype(x.dtype)
        if self.is_merged or len(self.active) == 0:
            return mint.nn.functional.linear(x, weight, bias)
        if self._has_dora() and len(self.active) > 1:  # row gains do not add up: go through the weight itself
            return mint.nn.functional.linear(x, self.updated_weight().astype(x.dtype), bias)
        out = mint.nn.functional.linear(x, weight, None)
        for index in self.active:
            part = self.parts[index]
            low = mint.nn.functional.linear(x, part.lora_A.astype(x.dtype), None)
            out = out + mint.nn.functional.linear(low, (part.lora_B * part.strength).astype(x.dtype), None)
        if self._has_dora():
            part = self.parts[self.active[0]]
            # Only the small difference to 1 is rounded to the dtype of the activations.
            out = out + out * (part.magnitude / self._row_norms(part) - 1).astype(x.dtype)
        return out if bias is None else out + bias

    def updated_weight(self) -> Tensor:
        """Return the float32 weight [O, I] that alone does what the base and the adapters that are on do.

        Adapters apply in the order they are on: a DoRA also rescales what came before it, as in peft.
        """
        weight = self.whole_weight(ms.float32)
        for index in self.active:
            part = self.parts[index]
            weight = weight + part.update()
            if part.magnitude is not None:
                weight = (part.magnitude / self._row_norms(part))[:, None] * weight
        return weight

    def merge(self, *, restorable: bool) -> None:
        """Fold the adapters that are on into the base weight, rounding once; `unmerge` restores every bit."""
        if not self.is_merged and self.active:
            merged = to_array(self.updated_weight())
            self.original = to_array(self.weight) if restorable else None
            put_own(self.weight, merged, rows_of(self.weight))
            self.is_merged = True

    def unmerge(self) -> None:
        """Undo `merge`; without one, do nothing."""
        if self.original is not None:
            put(self.weight, self.original)
            self.original, self.is_merged = None, False

    def reset_magnitude(self, adapter_name: str) -> None:
        """Set DoRA's magnitudes to the row lengths of the base weight: with B = 0 the adapter then changes nothing."""
        part = self.part(adapter_name)
        if part is not None and part.magnitude is not None:
            put(part.magnitude, np.linalg.norm(to_array(self.whole_weight(ms.float32)), axis=1))

    def _has_dora(self) -> bool:
        for index in self.active:  # noqa: SIM110  (graphs have no generators)
            if self.parts[index].magnitude is not None:
                return True
        return False

    def _row_norms(self, part: LoraFactors) -> Tensor:
        """Return the length of each row of `W + scale * B A` in float32, a constant of the backward pass: [O]."""
        weight = self.whole_weight(ms.float32) + part.update()
        return ops.stop_gradient(ops.sqrt(weight.square().sum(axis=1)))
