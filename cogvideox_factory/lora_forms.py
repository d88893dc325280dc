"""One LoRA in the forms that other programs read: diffusers' file, PEFT's folder, ComfyUI's file.

How strong it is travels differently in each: diffusers reads alpha in the header (where it is too old to, it takes
alpha = rank), PEFT in the config beside the tensors, ComfyUI in a scalar a layer. A baked LoRA is right in all.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.lora_files import (
    LORA_FILE_NAME,
    PEFT_CONFIG_NAME,
    PEFT_FILE_NAME,
    LoraFile,
    bake_lora,
    peft_config,
    save_lora,
)
from cogvideox_factory.module_names import to_comfyui
from cogvideox_factory.tensors import narrowed, save_tensors


def in_dtype(file: LoraFile, dtype: str | None, *, baked: bool = False) -> LoraFile:
    """Return a LoRA in another dtype (None: its own), its scaling multiplied into B if `baked`; rounded once."""
    types = {name: np.dtype(dtype) if dtype else array.dtype for name, array in file.arrays.items()}
    if baked:
        wide = {name: array.astype(np.float32) for name, array in file.arrays.items()}
        file = bake_lora(replace(file, arrays=wide))
    arrays = {name: narrowed(array, types[name], what=f"{file.source}: {name}") for name, array in file.arrays.items()}
    return replace(file, arrays=arrays)


def save_diffusers(folder: Path, file: LoraFile) -> Path:
    """Write the file that `load_lora_weights` of diffusers reads, and return its path.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    return save_lora(folder / LORA_FILE_NAME, file.arrays, **_settings(file))


def save_peft(folder: Path, file: LoraFile, *, base: str | None = None) -> Path:
    """Write the adapter folder that `PeftModel.from_pretrained` reads, and return the path of its tensors.

    `base` is the model it belongs to, a hub id or a path; PEFT only shows it.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    config = peft_config(ranks=_ranks(file), **_settings(file)) | {
        "peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "fan_in_fan_out": False,
    }  # fmt: skip
    (folder / PEFT_CONFIG_NAME).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    path = folder / PEFT_FILE_NAME
    save_tensors(path, {f"base_model.model.{name}": array for name, array in file.arrays.items()})
    return path


def save_comfyui(path: Path, file: LoraFile) -> Path:
    """Write the file that ComfyUI's own LoRA loader reads, and return its path.

    Raises:
        UnfitError: a DoRA, or a layer that ComfyUI's model does not have.
        StorageError: the disk is full, read-only or failing.
    """
    if file.use_dora:
        raise UnfitError(
            f"{file.source} is a DoRA. ComfyUI divides by the length of the base weight's rows, and not of the changed "
            "ones as it was trained with, so it would act otherwise there. Merge it (--to merged) and export that."
        )
    arrays: dict[str, np.ndarray] = {}
    for module in file.modules:
        theirs = to_comfyui(module)
        if theirs is None:
            raise UnfitError(f"{file.source}: ComfyUI's CogVideoX has no layer {module}.")
        for part in ("lora_A", "lora_B"):
            arrays[f"diffusion_model.{theirs}.{part}.weight"] = file.arrays[f"{module}.{part}.weight"]
        alpha = file.scaling(module) * file.rank_of(module)
        arrays[f"diffusion_model.{theirs}.alpha"] = np.asarray(alpha, np.float32)
    save_tensors(path, arrays)
    return path


def _settings(file: LoraFile) -> dict[str, Any]:
    targets = file.target_modules
    return {
        "rank": file.rank, "alpha": file.alpha, "alpha_pattern": file.alpha_pattern, "use_rslora": file.use_rslora,
        "use_dora": file.use_dora, "target_modules": targets if isinstance(targets, str) else list(targets),
    }  # fmt: skip


def _ranks(file: LoraFile) -> Mapping[str, int]:
    return {module: file.rank_of(module) for module in file.modules}
