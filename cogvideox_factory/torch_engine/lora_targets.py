"""What a LoRA can sit on: the linear layers of our transformer, by the names diffusers gives them.

The transformer fuses q, k and v into one projection, and the norms of all blocks into another; `layout` knows where
each part lies, and nobody outside needs to.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.lora_linear import Rows
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

_BLOCK = re.compile(r"^transformer_blocks\.\d+\.")

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The targets of every published CogVideoX LoRA: the joint attention of each block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a linear layer of the diffusers model lives in ours."""

    path: str
    rows: Rows
    in_features: int

    @property
    def key(self) -> str:
        """What its parameters go by within the layer: its name, short of a block they share, without dots."""
        block = _BLOCK.match(self.path)
        return self.rows.name.removeprefix(block[0] if block else "").replace(".", "_")


def find_targets(transformer: CogVideoXTransformer) -> dict[str, Target]:
    """Return every linear layer by its diffusers name, in the order of the model.

    The patch projection of CogVideoX 1.0 is a convolution in its checkpoint, so it is not among them.
    """
    found: dict[str, Target] = {}
    for name, slot in diffusers_names(transformer.config).items():
        path, _, kind = slot.name.rpartition(".")
        linear = transformer.get_submodule(path) if kind == "weight" and len(slot.shape) == 2 else None
        if isinstance(linear, nn.Linear):
            rows = Rows(name=name.removesuffix(".weight"), start=slot.start, stop=slot.stop)
            found[rows.name] = Target(path=path, rows=rows, in_features=linear.in_features)
    return found


def adapted_layers(config: TransformerConfig, patterns: Sequence[str]) -> tuple[str, ...]:
    """Return what `patterns` match of the linear layers of blocks, by their names within a block.

    Raises:
        FactoryError: as `match_targets`, before a model is there.
    """
    slots = diffusers_names(config)
    names = [name.removesuffix(".weight") for name, slot in slots.items() if len(slot.shape) == 2]
    matched = match_targets(names, patterns)
    in_blocks = [name for name in matched if _BLOCK.match(name)]
    return tuple(dict.fromkeys(_BLOCK.sub("", name) for name in in_blocks))


def shapes_of(targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    """Return the weight shape [out, in] of each target."""
    return {name: (t.rows.stop - t.rows.start, t.in_features) for name, t in targets.items()}


def match_targets(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Return those of `names` that a pattern matches, in their order.

    `to_q` or `ff.net.2` match by ending; a pattern with a regular expression's characters, such as
    `.*attn1.*`, is one, for the whole name.

    Raises:
        FactoryError: a pattern without a match (with the nearest names) or an invalid regular expression.
    """
    if isinstance(patterns, str) or not patterns:
        raise FactoryError(f"target_modules={patterns!r}: give a list of at least one name, e.g. {list(ATTENTION)}.")
    matched: set[str] = set()
    for pattern in patterns:
        hits = {name for name in names if _matches(name, pattern)}
        if not hits:
            endings = sorted({".".join(name.split(".")[i:]) for name in names for i in range(name.count(".") + 1)})
            kinds = sorted({_BLOCK.sub("", name) for name in names})
            raise FactoryError(
                f"target_modules: {pattern!r} matches no linear layer of this transformer"
                f"{nearest(pattern, endings)}. It has, in each block or once: {', '.join(kinds)}."
            )
        matched |= hits
    return [name for name in names if name in matched]


def is_regex(pattern: str) -> bool:
    """Tell a regular expression from a plain module name; a dot is in both, so it does not decide."""
    return re.search(r"[\\^$*+?()\[\]{}|]", pattern) is not None


def _matches(name: str, pattern: str) -> bool:
    if not is_regex(pattern):
        return name == pattern or name.endswith(f".{pattern}")
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise FactoryError(f"target_modules: {pattern!r} is no valid regular expression: {error}.") from error
