"""Which linear layers a LoRA's patterns name, by the names diffusers gives them, and what its factors start from."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError, nearest

BLOCK = re.compile(r"^transformer_blocks\.\d+\.")
"""What the names of a block's layers begin with."""

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
"""The targets of every published CogVideoX LoRA: the joint attention of each block."""


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
            kinds = sorted({BLOCK.sub("", name) for name in names})
            raise FactoryError(
                f"target_modules: {pattern!r} matches no linear layer of this transformer"
                f"{nearest(pattern, endings)}. It has, in each block or once: {', '.join(kinds)}."
            )
        matched |= hits
    return [name for name in names if name in matched]


def new_adapter(
    layers: Sequence[str],
    *,
    rank: int,
    alpha: float,
    use_rslora: bool,
    use_dora: bool,
    target_modules: Sequence[str],
) -> tuple[list[str], float, dict[str, Any]]:
    """Return which of `layers` get an adapter, how its update is scaled, and its settings as a file records them.

    Raises:
        FactoryError: a rank or alpha that makes no sense, or as `match_targets`.
    """
    if rank < 1 or alpha <= 0:
        raise FactoryError(f"rank={rank}, alpha={alpha:g}: rank is at least 1 and alpha above 0; 64 and 64 are usual.")
    names = match_targets(layers, target_modules)
    settings = {
        "rank": rank, "alpha": alpha, "alpha_pattern": {}, "use_rslora": use_rslora, "use_dora": use_dora,
        "target_modules": names if any(map(is_regex, target_modules)) else list(target_modules),
    }  # fmt: skip
    return names, alpha / (rank**0.5 if use_rslora else rank), settings


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


def initial_down(seed: int, name: str, rank: int, in_features: int) -> np.ndarray:
    """Draw A [rank, in_features] of the layer `name`: peft's kaiming_uniform, which is +-1/sqrt(in_features)."""
    bound = in_features**-0.5
    uniform = draws.generator(seed, "lora", name).random((rank, in_features), dtype=np.float32)
    return (2 * uniform - 1) * np.float32(bound)
