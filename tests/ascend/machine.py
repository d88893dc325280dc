"""What a report begins with: the machine, its driver, CANN and MindSpore; nothing of it needs any of them."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_ROOTS = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_FILES = ("driver/version.info", "firmware/version.info", "ascend-toolkit/latest/version.cfg",
          "ascend-toolkit/latest/compiler/version.info", "cann/latest/version.cfg")  # fmt: skip
"""Below where Ascend software is installed."""
_PACKAGES = ("mindspore", "numpy", "ml_dtypes", "transformers", "safetensors", "te", "hccl", "torch", "torch_npu")


def has_card() -> bool:
    """Tell whether the driver of an Ascend card is here, as the engine itself tells."""
    return os.path.exists("/dev/davinci_manager")


def describe() -> list[str]:
    """Return a line for each thing that numbers and speed depend on; what is not there says so."""
    lines = [
        f"machine    {platform.platform()}, {os.cpu_count()} cores, {_memory()}",
        f"python     {sys.version.split()[0]}",
        f"packages   {', '.join(f'{name} {_version(name)}' for name in _PACKAGES)}",
        f"commit     {_said('git', 'rev-parse', '--short', 'HEAD')}",
    ]
    lines += [f"variable   {name}={os.environ[name]}" for name in _ROOTS if name in os.environ]
    for path in _version_files():
        lines += [f"{path}: {line}" for line in path.read_text(errors="replace").splitlines()[:6] if line.strip()]
    return [*lines, *(f"npu-smi    {line}" for line in _said("npu-smi", "info").splitlines())]


def _version_files() -> list[Path]:
    roots = [Path(os.environ[name]) for name in _ROOTS if name in os.environ]
    found = [root / file for root in roots for file in ("version.cfg", "compiler/version.info")]
    found += [Path("/usr/local/Ascend") / file for file in _FILES]
    return [path for path in dict.fromkeys(found) if path.is_file()]


def _memory() -> str:
    return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _said(*words: str) -> str:
    """Return what a program said, or that it is not here or failed."""
    if shutil.which(words[0]) is None:
        return "not here"
    here = Path(__file__).parent
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, cwd=here)
    return done.stdout.strip() if done.returncode == 0 else f"exit {done.returncode}: {done.stderr.strip()[:500]}"
