"""The machine a command runs on: device and dtype, memory, waiting, and bit-exact repetition.

Everything else in this engine is written against `torch.accelerator`; here and in `attention` are the only names of
device kinds. Ascend comes through torch_npu, which torch loads by itself where it is installed.
"""

import ctypes
import importlib.util
import logging
import os
import platform
import shutil
from pathlib import Path

import torch

from cogvideox_factory.errors import FactoryError, MissingError, nearest
from cogvideox_factory.host_memory import available_memory, resident_memory
from cogvideox_factory.metrics import say
from cogvideox_factory.models import TransformerConfig, facts_for

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`: "auto" (an accelerator if there is one), "cpu", "cuda", "npu", "cuda:1", …

    Raises:
        FactoryError: no such kind of device, or one card for several processes.
        MissingError: it is not in this machine.
    """
    if name == "auto":
        return _first_accelerator() or torch.device("cpu")
    kind, _, index = name.partition(":")
    kinds = ["auto", "cpu", "cuda", "npu"]
    if kind not in kinds or (index and not index.isdigit()) or (kind in ("auto", "cpu") and index):
        raise FactoryError(
            f"device={name!r}{nearest(kind, kinds)}: give auto, cpu, cuda or npu, or one card as in cuda:1."
        )
    if kind == "cpu":
        return torch.device("cpu")
    here = _first_accelerator()
    if here is None or here.type != kind or int(index or 0) >= torch.accelerator.device_count():
        raise MissingError(
            f"device={name!r} is not there; this machine has {_inventory()}. "
            "Use --run.device auto, or install the driver and the torch build for that card."
        )
    if index and (count := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        raise FactoryError(
            f"device={name!r} is one card for the {count} processes of this machine, which take one each; use "
            f"--run.device {kind}."
        )
    return torch.device(kind, int(index)) if index else here


def take_card(name: str) -> None:
    """Of several processes on a machine (torchrun numbers them), make each use a card of its own, unless they run on
    the device called `name` "cpu".

    Raises:
        MissingError: more processes than cards.
    """
    if name != "cpu" and torch.accelerator.is_available() and "LOCAL_RANK" in os.environ:
        index, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
        if index >= count:
            raise MissingError(
                f"process {index} of this machine finds {count} cards; start as many processes as there are cards "
                f"(torchrun --nproc-per-node {count}), or use --run.device cpu."
            )
        torch.accelerator.set_device_index(index)


def keep_freed_memory() -> None:
    """Have this process keep what it frees, for the step after this one, where it computes on a CPU.

    glibc hands freed blocks from 128 kB on back to the kernel, which clears each page again when it is next touched: a
    twentieth of a step of a small model. Blocks above 32 MB go back all the same. Other C libraries have no such knob.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)  # it takes no more
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


def _first_accelerator() -> torch.device | None:
    """Return the current card, or None where there is none."""
    if not torch.accelerator.is_available():
        return None
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    return torch.device(kind.type, torch.accelerator.current_device_index())


def _inventory() -> str:
    here = _first_accelerator()
    if here is None:
        return "only cpu"
    return f"cpu and {torch.accelerator.device_count()} x {here.type}"


def pick_dtype(name: str, device: torch.device, config: TransformerConfig | None = None) -> torch.dtype:
    """Return the dtype called `name` ("auto", "float32", "bfloat16", "float16") for a model on `device`.

    "auto" is float32 on a CPU; on a card the dtype the checkpoint that `config` is closest to was trained in
    (bfloat16 without a config), or float32 where the card has no bfloat16.

    Raises:
        FactoryError: no such dtype.
    """
    if name != "auto":
        if name not in DTYPES:
            choices = ["auto", *DTYPES]
            raise FactoryError(f"dtype={name!r}{nearest(name, choices)}: give {', '.join(choices)}.")
        if name == "float16" and config is not None and facts_for(config).dtype == "bfloat16":
            logger.warning("float16: this model was trained in bfloat16 and may overflow (black frames, NaN).")
        return DTYPES[name]
    if device.type == "cpu":
        return torch.float32
    dtype = DTYPES[facts_for(config).dtype if config is not None else "bfloat16"]
    if dtype == torch.bfloat16 and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        logger.warning("%s has no bfloat16, so the model runs in float32.", device_name(device))
        return torch.float32
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """Return what settings call `dtype`, e.g. "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def device_name(device: torch.device) -> str:
    """Return what a log line calls `device`, e.g. "NVIDIA H100 80GB HBM3"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "npu":
        return torch.get_device_module(device).get_device_name(device)
    return device.type


def synchronize(device: torch.device) -> None:
    """Wait until `device` has done all it was given, so that a clock can be read."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def pin(tensor: torch.Tensor) -> torch.Tensor:
    """Return `tensor` in page-locked memory, for copies that overlap with work; unchanged without a card."""
    return tensor.pin_memory() if torch.accelerator.is_available() else tensor


def memory_allocated(device: torch.device) -> int:
    """Return the bytes tensors hold on `device`; on a CPU the resident memory of this process."""
    if device.type != "cpu":
        return torch.accelerator.memory_allocated(device)
    return host_memory()


def peak_memory(device: torch.device) -> int:
    """Return the highest `memory_allocated` since the start or since `reset_peak_memory`, in bytes."""
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    return resident_memory(peak=True)


def host_memory() -> int:
    """Return the bytes of memory this process holds on the host now."""
    return resident_memory()


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` start again from now. On a CPU only Linux can; elsewhere the peak stays that of the process."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        return
    clear = Path("/proc/self/clear_refs")  # writing 5 resets the high-water mark, see proc(5)
    if os.access(clear, os.W_OK):
        clear.write_text("5")


def total_memory(device: torch.device) -> int:
    """Return the bytes of memory `device` has."""
    if device.type != "cpu":
        return torch.accelerator.get_memory_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that are free on `device`, or on a CPU available; None where nothing tells."""
    if device.type != "cpu":
        # What torch keeps for itself is free for us.
        kept = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
        return torch.accelerator.get_memory_info(device)[0] + kept
    return available_memory()


def set_determinism(enabled: bool) -> None:
    """Choose kernels that give the same bits every time (`enabled`), or the fastest ones.

    On a CPU and with the kernels this package uses, two runs agree either way; on a card this also fixes the order of
    sums in the backward pass of attention, which costs time there.
    """
    if enabled:
        # cuBLAS reads this when its first handle is made, see its documentation on reproducibility.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    # Otherwise every new tensor is filled with NaN first.
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]
    torch.backends.cudnn.benchmark = False


def set_tf32(enabled: bool, device: torch.device) -> None:
    """Let float32 matrix products and convolutions on `device` keep 10 bits of 23 (`enabled`), or all.

    Without this call torch does convolutions in TF32 and matrix products not.
    """
    if device.type != "cuda":
        if enabled:
            say(f"run.tf32 changes nothing on {device_name(device)}: TF32 is a format of CUDA cards")
        return
    # It sets `torch.backends.cuda.matmul.fp32_precision`, and the one number that inductor's tuning reads and that
    # setting alone leaves contradictory.
    torch.set_float32_matmul_precision("high" if enabled else "highest")
    torch.backends.cudnn.conv.fp32_precision = "tf32" if enabled else "ieee"  # pyright: ignore[reportAttributeAccessIssue]


def require_float8(device: torch.device) -> None:
    """Check that `device` multiplies float8 matrices; a CPU has no units for it and multiplies the same in float32.

    Raises:
        MissingError: a card that has none either.
    """
    is_nvidia = device.type == "cuda" and torch.version.hip is None  # AMD's cards have other formats
    if device.type != "cpu" and not (is_nvidia and torch.cuda.get_device_capability(device) >= (8, 9)):
        raise MissingError(
            f"train.fp8 needs a card that multiplies float8 (NVIDIA's of compute capability 8.9 and more, as L4, L40S, "
            f"RTX 4090, H100); {device_name(device)} does not. Use --train.fp8 none."
        )


def require_compiler(device: torch.device) -> None:
    """Check for what turns graphs into machine code: a C++ compiler, and on a card Triton.

    Raises:
        MissingError: it is not here.
    """
    wanted = os.environ.get("CXX", "g++")  # as torch looks for it
    if shutil.which(wanted) is None:
        raise MissingError(
            f"compiling needs a C++ compiler, and {wanted} is not here. Install it (apt-get install g++), or set "
            "--train.compile none (--generate.compile none)."
        )
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        raise MissingError(
            "compiling needs Triton on a card. Install: pip install triton, or set --train.compile none "
            "(--generate.compile none)."
        )


def versions() -> dict[str, str]:
    """Return what makes a run: our version, torch's and Python's."""
    from cogvideox_factory import __version__

    return {"cogvideox_factory": __version__, "torch": torch.__version__, "python": platform.python_version()}
