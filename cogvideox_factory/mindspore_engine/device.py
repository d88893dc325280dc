"""The machine a command runs on, Ascend or CPU: device and dtype, how functions run, and what the two do differently.

Everything that only an Ascend card can verify is one named function here, listed in `docs/ascend.md`; the rest of this
engine is the same on both. What a CPU lacks: bfloat16 arithmetic, the flash kernel, the "O2" compiler, inlined blocks,
collectives of some of the processes.
"""

import logging
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, wraps
from typing import Any, Literal

os.environ.setdefault("GLOG_v", "3")  # errors; its warnings on a machine without a card are about that card

import mindspore as ms
from mindspore import Tensor, nn, ops
from mindspore.communication import GlobalComm, create_group

from cogvideox_factory.errors import FactoryError, MissingError, nearest
from cogvideox_factory.host_memory import resident_memory
from cogvideox_factory.models import TransformerConfig, facts_for

logger = logging.getLogger(__name__)

Kind = Literal["cpu", "ascend"]
DTYPES = {"float32": ms.float32, "bfloat16": ms.bfloat16, "float16": ms.float16}
JIT_LEVELS = ("O0", "O1", "O2")


def pick_device(name: str = "auto") -> Kind:
    """Make this process use the device called `name` ("auto": Ascend if there is one, "cpu", "ascend", "npu").

    Raises:
        FactoryError: no such kind of device.
        MissingError: it is not in this machine.
    """
    kinds = ["auto", "cpu", "ascend", "npu"]
    if name not in kinds:
        raise FactoryError(f"device={name!r}{nearest(name, kinds)}: with MindSpore give auto, cpu or ascend (npu).")
    here = name != "cpu" and os.path.exists("/dev/davinci_manager")  # what the driver of an Ascend card makes
    if name in ("ascend", "npu") and not here:
        raise MissingError(
            f"device={name!r} is not there; this machine has only cpu. "
            "Use --run.device auto, or install the driver and CANN for that card."
        )
    if not GlobalComm.INITED:  # with the others its device got a number, which this would change
        # Whoever never joins them, as in `prepare`, has the card that msrun says.
        ms.set_device("Ascend", int(os.environ.get("DEVICE_ID", "0"))) if here else ms.set_device("CPU")
    if not here:
        # Operators one after the other: its queues of threads fight for the cores and cost ten times the time.
        ms.runtime.launch_blocking()
    return "ascend" if here else "cpu"


def is_ascend() -> bool:
    """Whether this process computes on an Ascend card."""
    return ms.get_context("device_target") == "Ascend"


def pick_dtype(name: str, config: TransformerConfig | None = None) -> Any:
    """Return the MindSpore dtype called `name` ("auto", "float32", "bfloat16", "float16") for a model on this device.

    "auto" is float32 on a CPU; on a card the dtype the checkpoint that `config` is closest to was trained in.

    Raises:
        FactoryError: no such dtype, or one this device cannot compute in.
    """
    if name == "auto":
        facts = facts_for(config) if config is not None else None
        name = "float32" if not is_ascend() else facts.dtype if facts else "bfloat16"
    if name not in DTYPES:
        choices = ["auto", *DTYPES]
        raise FactoryError(f"dtype={name!r}{nearest(name, choices)}: give {', '.join(choices)}.")
    if name == "bfloat16" and not is_ascend():
        raise FactoryError(
            "dtype='bfloat16': MindSpore has no bfloat16 arithmetic on a CPU. Use float32 or float16 there, "
            "or the PyTorch engine (--engine torch)."
        )
    if name == "float16" and config is not None and facts_for(config).dtype == "bfloat16":
        logger.warning("float16: this model was trained in bfloat16 and may overflow (black frames, NaN).")
    return DTYPES[name]


def dtype_name(dtype: Any) -> str:
    """Return what settings call `dtype`."""
    return next(name for name, known in DTYPES.items() if known == dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Precision:
    """What is computed in, and what weights are kept in."""

    arithmetic: Any
    weights: Any


def pick_precision(amp_level: str | None, dtype: Any) -> Precision:
    """Return what an amp level comes to for a run in `dtype`: O0, O1, O2, O3 or None, the one that fits.

    Raises:
        FactoryError: a level that contradicts the dtype.
    """
    is_half = dtype != ms.float32
    level = amp_level or ("O3" if is_half else "O0")
    if is_half == (level == "O0"):
        law = "is float32 throughout" if is_half else "computes in half precision"
        raise FactoryError(
            f"mindspore.amp_level={level} {law}, and run.dtype comes to {dtype_name(dtype)}. "
            f"Use --run.dtype {'float32' if is_half else 'float16 or bfloat16'}, or another level."
        )
    return Precision(arithmetic=dtype, weights=dtype if level == "O3" else ms.float32)


def set_determinism(enabled: bool) -> None:
    """Choose kernels that give the same bits every time (`enabled`); a CPU has no others."""
    if enabled and is_ascend():
        ms.set_deterministic(True)


def peak_memory() -> int:
    """Return the highest number of bytes that tensors held on the card; on a CPU that this process held."""
    return ms.runtime.max_memory_allocated() if is_ascend() else resident_memory(peak=True)


def versions() -> dict[str, str]:
    """Return what makes a run: our version, MindSpore's and Python's."""
    from cogvideox_factory import __version__

    return {"cogvideox_factory": __version__, "mindspore": ms.__version__, "python": platform.python_version()}


# --- how functions run ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Mode:
    """One operator after the other (PyNative), or compiled into a graph for each shape of the arguments."""

    graph: bool = False
    jit_level: str = "O0"
    """How much the compiler may do: O0, O1, or O2 (Ascend only)."""

    def __post_init__(self) -> None:
        if self.jit_level not in JIT_LEVELS:
            near = nearest(self.jit_level, list(JIT_LEVELS))
            raise FactoryError(f"jit_level={self.jit_level!r}{near}: give {', '.join(JIT_LEVELS)}.")
        if self.graph and self.jit_level == "O2" and not is_ascend():
            raise FactoryError(
                "jit_level=O2 hands whole graphs to Ascend's own compiler; a CPU has none. Use O0 or O1."
            )

    def compiled(self, function: Callable[..., Any], *, of: nn.Cell | None = None) -> Callable[..., Any]:
        """Return `function`, which takes tensors, None and tuples made by `ms.mutable`, as this mode runs it.

        A graph holds what cells were made of when it was compiled; weights may change under it (in place, by
        `border.put`), layers may not. `of` is the model whose layers may: where adapters come and go, its
        `num_changes` counts, and a graph of before is compiled anew.
        """
        if not self.graph:
            return function
        if self.jit_level == "O2":
            return _by_ge(function)
        graphs: dict[int, Callable[..., Any]] = {}

        @wraps(function)
        def run(*args: Any) -> Any:
            version = getattr(of, "num_changes", 0)
            if version not in graphs:
                graphs.clear()
                graphs[version] = ms.jit(function, jit_level=self.jit_level)
            return graphs[version](*args)

        return run


PYNATIVE = Mode()


def _by_ge(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` by GE, the graph engine of Ascend (jit_level O2). Only Ascend can verify it."""
    return ms.jit(function, backend="GE")


def inlined_once(init: Callable[..., None]) -> Callable[..., None]:
    """Make the graph of a repeated cell once, not once a layer; decorates its `__init__`. Only Ascend can verify it.

    A CPU compiles every layer (about a second each): its compiler refuses cells that are inlined late.
    """
    lazy = ms.lazy_inline(init)

    @wraps(init)
    def build(self: nn.Cell, *args: Any, **kwargs: Any) -> None:
        (lazy if is_ascend() else init)(self, *args, **kwargs)

    return build


# --- operators --------------------------------------------------------------------------------------------------------


def causal_conv3d(out_channels: int) -> Callable[[Tensor, Tensor], Tensor]:
    """Return what convolves [B, C, 2 + T, H, W] with a weight [O, C, 3, 3, 3]: padded in space, not in time.

    Which dtypes Conv3D takes there, only Ascend can verify.
    """
    return ops.Conv3D(out_channels, kernel_size=3, pad_mode="pad", pad=(0, 0, 1, 1, 1, 1))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, *, num_heads: int, scale: float) -> Tensor:
    """Return softmax(q k^T * scale) v for tensors [B, L, S, K], in half precision. Only Ascend can verify it."""
    return ops.flash_attention_score(q, k, v, num_heads, scalar_value=scale, input_layout="BNSD")


# --- collectives ------------------------------------------------------------------------------------------------------


def communicator(members: Sequence[int], *, world: int) -> dict[str, str]:
    """Return what tells a collective operator to talk to `members` alone, among `world` processes this one.

    On a CPU that is nothing: there operators reach all. Groups other than all, only Ascend can verify.
    """
    if not is_ascend() or len(members) == world:
        return {}
    return {"group": _new_group(tuple(members))}


@lru_cache
def _new_group(members: tuple[int, ...]) -> str:
    name = f"ranks-{'-'.join(map(str, members))}"
    create_group(name, list(members))
    return name


def reduce_scatter(members: Sequence[int], *, world: int) -> Callable[[Tensor], Tensor]:
    """Return what sums over `members` and takes this process' rows. Only Ascend can verify it."""
    return ops.ReduceScatter(**communicator(members, world=world))


def all_to_all(members: Sequence[int], *, world: int, split: int, concat: int) -> Callable[[Tensor], Tensor]:
    """Return what sends part i along axis `split` to member i and joins along `concat`. Only Ascend can verify it."""
    return ops.AlltoAll(len(members), split, concat, **communicator(members, world=world))
