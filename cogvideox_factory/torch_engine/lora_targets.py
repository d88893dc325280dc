"""What a LoRA can sit on: the linear layers of our transformer, by the names diffusers gives them.

The transformer fuses q, k and v into one projection, and the norms of all blocks into another; `layout` knows where
each part lies, and nobody outside needs to.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from cogvideox_factory.lora_names import BLOCK, match_targets
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.lora_linear import Rows
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Where a linear layer of the diffusers model lives in ours."""

    path: str
    rows: Rows
    in_features: int

    @property
    def key(self) -> str:
        """What its parameters go by within the layer: its name, short of a block they share, without dots."""
        block = BLOCK.match(self.path)
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
    in_blocks = [name for name in matched if BLOCK.match(name)]
    return tuple(dict.fromkeys(BLOCK.sub("", name) for name in in_blocks))


def shapes_of(targets: dict[str, Target]) -> dict[str, tuple[int, ...]]:
    """Return the weight shape [out, in] of each target."""
    return {name: (t.rows.stop - t.rows.start, t.in_features) for name, t in targets.items()}
