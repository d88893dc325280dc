"""LoRA on our transformer: choosing targets, adding, loading, mixing, merging and exporting adapters.

Targets are named as diffusers names its modules (`transformer_blocks.0.attn1.to_q`), so patterns, files and metadata
are interchangeable with peft and with the other engine. The arithmetic is in `lora_linear`.

```python
add_lora(transformer, rank=64, alpha=64, seed=0)  # freezes the base; train lora_parameters(transformer)
save_lora(path, lora_arrays(transformer), **lora_settings(transformer))
load_lora_into(transformer, load_lora(path), "mine")
set_adapters(transformer, ["mine", "theirs"], [1.0, 0.5])
```
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from mindspore import Parameter, nn

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.lora_names import ATTENTION, initial_down, new_adapter
from cogvideox_factory.mindspore_engine.border import put, to_array
from cogvideox_factory.mindspore_engine.linear import Linear
from cogvideox_factory.mindspore_engine.lora_linear import LoraFactors, LoraLinear
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer


def find_targets(transformer: CogVideoXTransformer) -> dict[str, Linear]:
    """Return every linear layer by its diffusers name, in the order of the model.

    The patch projection of CogVideoX 1.0 is a convolution in its checkpoint, so it is not among them.
    """
    cells = transformer.cells_and_names()
    return {name: cell for name, cell in cells if isinstance(cell, Linear) and cell.weight.ndim == 2}


def add_lora(
    transformer: CogVideoXTransformer,
    *,
    rank: int,
    alpha: float,
    use_rslora: bool = False,
    use_dora: bool = False,
    target_modules: Sequence[str] = ATTENTION,
    seed: int,
    adapter_name: str = "default",
) -> list[str]:
    """Freeze `transformer` and add one trainable adapter, the only one that is then on; return its targets.

    It changes nothing until it is trained: B is zero. A is uniform in +-1/sqrt(in_features) as in peft, drawn
    from (seed, target), so it is the same on every engine, device and for any number of ranks.

    Args:
        transformer: its weights loaded.
        rank: inner size R of the adapters.
        alpha: the update is scaled by alpha / rank, or with `use_rslora` by alpha / sqrt(rank).
        use_rslora: rank-stabilised scale (Kalajdzievski 2023, arXiv 2312.03732).
        use_dora: also learn the length of each row of the weight (Liu et al. 2024, arXiv 2402.09353).
        target_modules: endings of module names, or regular expressions for whole names.
        seed: of the draw of A.
        adapter_name: under what name it is trained, mixed and saved.

    Raises:
        FactoryError: a pattern that matches no linear layer, a rank below 1, or a name in use.
    """
    targets = find_targets(transformer)
    names, scale, settings = new_adapter(
        list(targets), rank=rank, alpha=alpha, use_rslora=use_rslora, use_dora=use_dora, target_modules=target_modules
    )
    _require_new(transformer, adapter_name)
    _freeze(transformer)
    for name in names:
        layer = _adapted(transformer, name, targets[name])
        part = layer.attach(adapter_name, rank=rank, scale=scale, settings=settings)
        put(part.lora_A, initial_down(seed, name, rank, layer.in_features))
        layer.reset_magnitude(adapter_name)
    _settle(transformer)
    set_adapters(transformer, [adapter_name])
    return names


def load_lora_into(
    transformer: CogVideoXTransformer, file: LoraFile, adapter_name: str = "default", *, trainable: bool = False
) -> int:
    """Add the adapter of a LoRA file, the only one that is then on; return how many modules it adapts.

    That is every module in the file. Adapters may differ in rank and targets. With `trainable` all else is
    frozen, as in `add_lora`.

    Raises:
        UnfitError: a tensor of the file has no place in this model or another shape, or a half is missing.
        FactoryError: `adapter_name` is in use.
    """
    targets = find_targets(transformer)
    count = check_lora(file, {name: (layer.out_features, layer.in_features) for name, layer in targets.items()})
    _require_new(transformer, adapter_name)
    if trainable:
        _freeze(transformer)
    given = file.target_modules
    settings = {
        "rank": file.rank, "alpha": file.alpha, "alpha_pattern": dict(file.alpha_pattern),
        "use_rslora": file.use_rslora, "use_dora": file.use_dora,
        "target_modules": given if isinstance(given, str) else list(given),
    }  # fmt: skip
    for name in [name for name in targets if f"{name}.lora_A.weight" in file.arrays]:
        down, up = (file.arrays[f"{name}.lora_{half}.weight"] for half in "AB")
        layer = _adapted(transformer, name, targets[name])
        part = layer.attach(adapter_name, rank=down.shape[0], scale=file.scaling(name), settings=settings)
        put(part.lora_A, down)
        put(part.lora_B, up)
        if part.magnitude is not None:
            put(part.magnitude, file.arrays[f"{name}.lora_magnitude_vector"])
        for parameter in part.trainable():
            parameter.requires_grad = trainable
    _settle(transformer)
    set_adapters(transformer, [adapter_name])
    return count


def set_adapters(
    transformer: CogVideoXTransformer, names: str | Sequence[str], weights: float | Sequence[float] | None = None
) -> None:
    """Switch on exactly the adapters `names`, each with its weight (default 1); others stay loaded, off.

    DoRA adapters apply in the order of `names`, as in peft. A weight of 0 is off. Compiled functions go on where only
    weights change.

    Raises:
        FactoryError: an unknown or repeated name, or another number of weights.
    """
    names = [names] if isinstance(names, str) else list(names)
    _require_unmerged(transformer)
    for name in names:
        _require_known(transformer, name)
    values = list(weights) if isinstance(weights, Sequence) else [1.0 if weights is None else weights] * len(names)
    if len(values) != len(names) or len(set(names)) != len(names):
        raise FactoryError(
            f"set_adapters got names {names} and weights {values}: give each adapter once, with one weight."
        )
    wanted = dict(zip(names, map(float, values), strict=True))
    changed = [layer.switch(wanted) for layer in _layers(transformer).values()]
    if any(changed):
        transformer.num_changes += 1


def adapter_names(transformer: CogVideoXTransformer) -> list[str]:
    """Return the names of the adapters that are loaded, whether on or off."""
    return list(dict.fromkeys(name for layer in _layers(transformer).values() for name in layer.names))


def lora_parameters(transformer: CogVideoXTransformer, adapter_name: str = "default") -> list[Parameter]:
    """Return the parameters of one adapter, in a fixed order."""
    return [parameter for part in _parts(transformer, adapter_name).values() for parameter in part.trainable()]


def lora_arrays(transformer: CogVideoXTransformer, adapter_name: str = "default") -> dict[str, np.ndarray]:
    """Return a copy of one adapter, named as in a LoRA file without its `transformer.` prefix."""
    endings = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    return {
        f"{name}.{ending}": to_array(parameter)
        for name, part in _parts(transformer, adapter_name).items()
        for ending, parameter in zip(endings, part.trainable())
    }


def lora_settings(transformer: CogVideoXTransformer, adapter_name: str = "default") -> dict[str, Any]:
    """Return what one adapter was made with, as keyword arguments of `save_lora`."""
    _require_known(transformer, adapter_name)
    layers = _layers(transformer).values()
    return dict(next(layer.settings[adapter_name] for layer in layers if adapter_name in layer.settings))


def merge_lora(transformer: CogVideoXTransformer, *, restorable: bool = False) -> None:
    """Fold the adapters that are on, with their weights, into the base weights, and take all adapters off.

    The sum is formed in float32 and rounded once. With `restorable` the adapters and the original weights are
    kept aside, so that `unmerge_lora` gives back every bit.
    """
    for name, layer in _layers(transformer).items():
        layer.merge(restorable=restorable)
        if not restorable:
            _replace(transformer, name, layer.plain())
    _settle(transformer)


def unmerge_lora(transformer: CogVideoXTransformer) -> None:
    """Undo `merge_lora(restorable=True)` exactly."""
    for layer in _layers(transformer).values():
        layer.unmerge()
    _settle(transformer)


def remove_lora(transformer: CogVideoXTransformer, adapter_name: str | None = None) -> None:
    """Take one adapter, or all, off; a Linear left without any becomes the plain base again.

    Raises:
        FactoryError: no adapter of that name.
    """
    if adapter_name is not None:
        _require_known(transformer, adapter_name)
    unmerge_lora(transformer)
    for path, layer in _layers(transformer).items():
        for name in [adapter_name] if adapter_name is not None else list(layer.names):
            layer.drop(name)
        if not layer.names:
            _replace(transformer, path, layer.plain())
    _settle(transformer)


def _layers(transformer: CogVideoXTransformer) -> dict[str, LoraLinear]:
    return {name: cell for name, cell in transformer.cells_and_names() if isinstance(cell, LoraLinear)}


def _parts(transformer: CogVideoXTransformer, adapter_name: str) -> dict[str, LoraFactors]:
    _require_known(transformer, adapter_name)
    found = {name: layer.part(adapter_name) for name, layer in _layers(transformer).items()}
    return {name: part for name, part in found.items() if part is not None}


def _adapted(transformer: CogVideoXTransformer, name: str, layer: Linear) -> LoraLinear:
    """Return the layer of that name, wrapped if it is still a plain Linear."""
    if isinstance(layer, LoraLinear):
        return layer
    wrapped = LoraLinear(layer)
    _replace(transformer, name, wrapped)
    return wrapped


def _replace(transformer: CogVideoXTransformer, name: str, layer: Linear) -> None:
    """Put `layer` where `name` says."""
    *path, last = name.split(".")
    parent: nn.Cell = transformer
    for step in path:
        parent = parent[int(step)] if isinstance(parent, nn.CellList) else getattr(parent, step)
    if isinstance(parent, nn.CellList):
        parent[int(last)] = layer
    else:
        setattr(parent, last, layer)


def _settle(transformer: CogVideoXTransformer) -> None:
    """Name parameters by where they now are, as graphs need, and let no graph of before be used."""
    for name, parameter in transformer.parameters_and_names():
        parameter.name = name
    transformer.num_changes += 1


def _freeze(transformer: CogVideoXTransformer) -> None:
    for parameter in transformer.get_parameters():
        parameter.requires_grad = False


def _require_known(transformer: CogVideoXTransformer, adapter_name: str) -> None:
    known = adapter_names(transformer)
    if adapter_name not in known:
        loaded = f"Loaded: {', '.join(known)}." if known else "None is loaded; load or add one first."
        raise FactoryError(f"adapter {adapter_name!r} is not loaded{nearest(adapter_name, known)}. {loaded}")


def _require_new(transformer: CogVideoXTransformer, adapter_name: str) -> None:
    _require_unmerged(transformer)
    if adapter_name in adapter_names(transformer):
        raise FactoryError(f"adapter name {adapter_name!r} is in use. Choose another, or remove_lora it first.")
    if not re.fullmatch(r"[\w-]+", adapter_name):
        raise FactoryError(f"adapter name {adapter_name!r} cannot be used: letters, digits, - and _ can.")


def _require_unmerged(transformer: CogVideoXTransformer) -> None:
    if any(layer.is_merged for layer in _layers(transformer).values()):
        raise FactoryError("the adapters are merged into the base weights; call unmerge_lora first.")
