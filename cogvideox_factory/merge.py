"""A LoRA folded into the weights it was trained over, one tensor at a time, so that a large model needs little memory.

What a layer becomes is `W + s B A` with s = strength x scaling (Hu et al. 2021, arXiv 2106.09685, section 4.1). DoRA
also gives each row its own length: `m (W + s B A) / |W + s B A|` (Liu et al. 2024, arXiv 2402.09353, equation 5). The
sum is formed in float32 and rounded once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.tensors import narrowed
from cogvideox_factory.weights import stored_tensors


def merged_tensors(
    folder: Path, file: LoraFile, *, strength: float = 1.0, dtype: str | None = None
) -> Iterator[tuple[str, np.ndarray]]:
    """Return (name, array) of the transformer in `folder` with a LoRA in it, one in memory at a time.

    Args:
        folder: a `transformer` folder in the diffusers layout.
        file: the LoRA.
        strength: of the LoRA; 1 is as it was trained.
        dtype: of the result; None is each tensor's own in the folder.

    Raises:
        UnfitError: a LoRA for another model, before anything is read; a damaged model; a number beyond `dtype`.
        FactoryError: a strength of 0.
    """
    if strength == 0:
        raise FactoryError("--strength 0 merges nothing. Give another, or use the base model as it is.")
    shapes = {name.removesuffix(".weight"): stored.shape for name, stored in stored_tensors(folder)}
    check_lora(file, {module: shape for module, shape in shapes.items() if len(shape) == 2})
    return _merged(folder, file, strength, dtype)


def _merged(folder: Path, file: LoraFile, strength: float, dtype: str | None) -> Iterator[tuple[str, np.ndarray]]:
    for name, stored in stored_tensors(folder):
        array, module = stored[:], name.removesuffix(".weight")
        kind = np.dtype(dtype) if dtype else array.dtype
        if name.endswith(".weight") and f"{module}.lora_A.weight" in file.arrays:
            array = merge_layer(array, file, module, strength)
        yield name, narrowed(array, kind, what=name)


def merge_layer(base: np.ndarray, file: LoraFile, module: str, strength: float) -> np.ndarray:
    """Return the float32 weight [O, I] of one layer with a LoRA in it, from that without, `base`."""
    down, up = (file.arrays[f"{module}.lora_{part}.weight"].astype(np.float32) for part in "AB")
    merged = base.astype(np.float32)
    merged += np.float32(file.scaling(module) * strength) * (up @ down)
    if file.use_dora:
        lengths = file.arrays[f"{module}.lora_magnitude_vector"].astype(np.float32)
        merged *= (lengths / np.linalg.norm(merged, axis=1))[:, None]
    return merged
