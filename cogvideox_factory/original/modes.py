"""What graph and PyNative mode, `jit_level` and `amp_level` mean here.

They are MindSpore's words; this is their translation for PyTorch, one row a value.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True, slots=True)
class Modes:
    """As they were typed, or their defaults."""

    mindspore_mode: int = 1
    """0: graph. 1: PyNative."""
    jit_level: str = "O0"
    """Of graph mode."""
    amp_level: str = "O2"
    """Of mixed_precision fp16."""


class Meaning(NamedTuple):
    """One value of one flag."""

    flag: str
    value: str
    theirs: str
    """What it does in MindSpore."""
    here: str
    """What it comes to on PyTorch."""
    settings: dict[str, Any]


MEANINGS = (
    Meaning("mindspore_mode", "1", "PyNative: operators run one by one", "eager: train.compile none", {}),
    Meaning("mindspore_mode", "0", "graph: the network is compiled", "see jit_level; making videos stays eager", {}),
    Meaning("jit_level", "O0", "graph mode: few optimisations", "eager: train.compile none", {}),
    Meaning(
        "jit_level", "O1", "graph mode: operators are fused", "train.compile default: each block, once a shape",
        {"train.compile": "default"},
    ),
    Meaning(
        "jit_level", "O2", "graph mode: the whole graph is sent to the card",
        "train.compile max_autotune, run.deterministic False: kernels are tried out",
        {"train.compile": "max_autotune", "run.deterministic": False},
    ),
    Meaning("amp_level", "O0", "fp16: all in float32", "run.dtype float32", {"run.dtype": "float32"}),
    Meaning(
        "amp_level", "O1", "fp16: listed operators in float16, the rest in float32",
        "run.dtype float16: as O2, there is no second list", {"run.dtype": "float16"},
    ),
    Meaning(
        "amp_level", "O2", "fp16: all but normalisation in float16",
        "run.dtype float16: float32 masters, normalisation and loss, a dynamic loss scale", {"run.dtype": "float16"},
    ),
    Meaning(
        "amp_level", "O3", "fp16: all in float16", "run.dtype float16: as O2, normalisation stays in float32",
        {"run.dtype": "float16"},
    ),
)  # fmt: skip


def meaning(flag: str, value: str) -> Meaning:
    """Return the row of a value."""
    return next(row for row in MEANINGS if (row.flag, row.value) == (flag, value))


def speed_settings(modes: Modes) -> Meaning:
    """Return the row that decides between eager and compiled."""
    if modes.mindspore_mode == 1:
        return meaning("mindspore_mode", "1")
    return meaning("jit_level", modes.jit_level)


def dtype_settings(modes: Modes, mixed_precision: str) -> dict[str, Any]:
    """Return the arithmetic: amp_level counts with fp16 only, as with theirs."""
    if mixed_precision == "fp16":
        return meaning("amp_level", modes.amp_level).settings
    return {"run.dtype": {"bf16": "bfloat16", "no": "float32"}[mixed_precision]}
