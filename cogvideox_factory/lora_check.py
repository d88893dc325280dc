"""Does a LoRA fit a model? Strictly: every tensor used, every target adapted, every shape right.

The usual loaders say nothing when a LoRA of a shallower model, or half a LoRA, is loaded.
"""

import re
from collections import Counter
from collections.abc import Mapping

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.models import LARGER, PUBLISHED


def check_lora(file: LoraFile, module_shapes: Mapping[str, tuple[int, ...]], *, allow_partial: bool = False) -> int:
    """Check that a LoRA fits a model and return how many modules it adapts (all of them: say "loaded n/n").

    `module_shapes` has the weight shape [out, in] of every linear layer by its diffusers name. Every tensor
    must belong to one of them and fit; every target must have A and B; and every layer that the LoRA's
    targets name must be in it, unless `allow_partial`: a LoRA of a shallower model would load without a
    word otherwise.

    Raises:
        UnfitError: with the first five strays and what the LoRA was probably trained for.
    """
    strays = [name for module in file.modules for name in _strays(file, module, module_shapes)]
    if not strays and not allow_partial:
        wanted = [module for module in module_shapes if _is_target(module, file.target_modules)]
        strays = [f"{module}: not in the LoRA" for module in wanted if f"{module}.lora_A.weight" not in file.arrays]
    if strays:
        more = f" and {len(strays) - 5} more" if len(strays) > 5 else ""
        raise UnfitError(
            f"LoRA {file.source} does not fit this model: {'; '.join(strays[:5])}{more}. It was probably "
            f"trained for {_trained_for(file)}. Use it with that model."
        )
    return len(file.modules)


def _strays(file: LoraFile, module: str, module_shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    a, b = (file.arrays.get(f"{module}.lora_{part}.weight") for part in "AB")
    magnitude = file.arrays.get(f"{module}.lora_magnitude_vector")
    if module not in module_shapes:
        return [f"{module}: the model has no such layer"]
    if a is None or b is None or (file.use_dora and magnitude is None):
        part = "lora_A" if a is None else "lora_B" if b is None else "lora_magnitude_vector"
        return [f"{module}: {part} is missing"]
    out_features, in_features = module_shapes[module]
    expected = {"lora_A": (a.shape[0], in_features), "lora_B": (out_features, a.shape[0])}
    found = {"lora_A": a.shape, "lora_B": b.shape}
    if magnitude is not None:
        expected["magnitude"], found["magnitude"] = (out_features,), magnitude.shape
    return [
        f"{module}: {part} is {list(found[part])}, the model needs {list(shape)}"
        for part, shape in expected.items()
        if tuple(found[part]) != shape
    ]


def _trained_for(file: LoraFile) -> str:
    """Say what model the block numbers and widths of a LoRA point at."""
    blocks = [int(found[1]) for m in file.modules if (found := re.match(r"transformer_blocks\.(\d+)\.", m))]
    widths = Counter(
        array.shape[1]
        for name, array in file.arrays.items()
        if name.endswith("lora_A.weight") and array.ndim == 2 and ".attn1." in name
    )
    if not blocks or not widths:
        return "another kind of model (no CogVideoX attention layer is in it)"
    depth, width = max(blocks) + 1, widths.most_common(1)[0][0]
    configs = {name: facts.transformer for name, facts in PUBLISHED.items()} | LARGER
    names = [name for name, config in configs.items() if (config.num_layers, config.width) == (depth, width)]
    return f"{' or '.join(names) or 'a model'} ({depth} blocks, width {width})"


def _is_target(module: str, targets: tuple[str, ...] | str) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)
