"""LoRA on our transformer: choosing targets, adding, loading, mixing, merging and exporting adapters.

Targets are named as diffusers names its modules (`transformer_blocks.0.attn1.to_q`), whatever the transformer fused
them into, so patterns, files and metadata are interchangeable with peft. The arithmetic is in `lora_linear`.

```python
add_lora(transformer, rank=64, alpha=64, seed=0)  # freezes the base; train lora_parameters(transformer)
save_lora(path, lora_arrays(transformer), **lora_settings(transformer))
load_lora_into(transformer, load_lora(path), "mine")
set_adapters(transformer, ["mine", "theirs"], [1.0, 0.5])
```
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.lora_names import ATTENTION, initial_down, new_adapter
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine.border import local, put_rows, to_array, to_tensor, whole
from cogvideox_factory.torch_engine.lora_linear import LoraFactors, LoraLinear
from cogvideox_factory.torch_engine.lora_targets import Target, find_targets, shapes_of
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer


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
    from (seed, target), so it is the same on every device and for any number of ranks.

    Args:
        transformer: its weights loaded; on the meta device, `initialize_lora` must follow when they are.
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
    transformer.requires_grad_(False)
    for name in names:
        _attach(transformer, targets[name], adapter_name, rank=rank, scale=scale, settings=settings)
    if not transformer.proj_out.weight.is_meta:
        initialize_lora(transformer, seed=seed, adapter_name=adapter_name)
    set_adapters(transformer, [adapter_name])
    return names


@torch.no_grad()
def initialize_lora(transformer: CogVideoXTransformer, *, seed: int, adapter_name: str = "default") -> None:
    """Give an adapter the values it starts from, over loaded weights that processes may have divided meanwhile."""
    for part in _parts(transformer, adapter_name):
        put_rows(part.lora_A, to_tensor(initial_down(seed, part.rows.name, part.rank, part.lora_A.shape[1])))
        local(part.lora_B.detach()).zero_()
    for layer in _layers(transformer):
        layer.reset_magnitudes(adapter_name)


def load_lora_into(
    transformer: CogVideoXTransformer,
    file: LoraFile,
    adapter_name: str = "default",
    *,
    trainable: bool = False,
) -> int:
    """Add the adapter of a LoRA file, the only one that is then on; return how many modules it adapts.

    That is every module in the file. Adapters may differ in rank and targets. With `trainable` all else is
    frozen, as in `add_lora`. On the meta device, `fill_lora` must follow when weights are there.

    Raises:
        UnfitError: a tensor of the file has no place in this model or another shape, or a half is missing.
        FactoryError: `adapter_name` is in use.
    """
    targets = find_targets(transformer)
    count = check_lora(file, shapes_of(targets))
    _require_new(transformer, adapter_name)
    if trainable:
        transformer.requires_grad_(False)
    given = file.target_modules
    settings = {
        "rank": file.rank, "alpha": file.alpha, "alpha_pattern": dict(file.alpha_pattern),
        "use_rslora": file.use_rslora, "use_dora": file.use_dora,
        "target_modules": given if isinstance(given, str) else list(given),
    }  # fmt: skip
    for name in [name for name in targets if f"{name}.lora_A.weight" in file.arrays]:
        rank = file.arrays[f"{name}.lora_A.weight"].shape[0]
        part = _attach(transformer, targets[name], adapter_name, rank=rank, scale=file.scaling(name), settings=settings)
        part.requires_grad_(trainable)
    if not transformer.proj_out.weight.is_meta:
        fill_lora(transformer, file, adapter_name)
    set_adapters(transformer, [adapter_name])
    return count


@torch.no_grad()
def fill_lora(transformer: CogVideoXTransformer, file: LoraFile, adapter_name: str) -> None:
    """Copy the values of a LoRA file into its adapter, or what this process holds of it."""
    for part in _parts(transformer, adapter_name):
        name = part.rows.name
        put_rows(part.lora_A, to_tensor(file.arrays[f"{name}.lora_A.weight"]))
        put_rows(part.lora_B, to_tensor(file.arrays[f"{name}.lora_B.weight"]))
        if part.magnitude is not None:
            put_rows(part.magnitude, to_tensor(file.arrays[f"{name}.lora_magnitude_vector"]))


def check_fit(file: LoraFile, config: TransformerConfig) -> None:
    """Check a LoRA file against a model that is not loaded.

    Raises:
        UnfitError: as `load_lora_into` would.
    """
    with torch.device("meta"):
        transformer = CogVideoXTransformer(config)
    check_lora(file, shapes_of(find_targets(transformer)))


def set_adapters(
    transformer: CogVideoXTransformer,
    names: str | Sequence[str],
    weights: float | Sequence[float] | None = None,
) -> None:
    """Switch on exactly the adapters `names`, each with its weight (default 1); others stay loaded, off.

    DoRA adapters apply in the order of `names`, as in peft. A weight of 0 is off.

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
    for layer in _layers(transformer):
        layer.weights = dict(zip(names, map(float, values), strict=True))


def adapter_names(transformer: CogVideoXTransformer) -> list[str]:
    """Return the names of the adapters that are loaded, whether on or off."""
    return list(dict.fromkeys(name for layer in _layers(transformer) for name in layer.adapters))


def lora_parameters(transformer: CogVideoXTransformer, adapter_name: str = "default") -> list[nn.Parameter]:
    """Return the parameters of one adapter, in a fixed order."""
    return [parameter for part in _parts(transformer, adapter_name) for parameter in part.parameters()]


def lora_arrays(transformer: CogVideoXTransformer, adapter_name: str = "default") -> dict[str, np.ndarray]:
    """Return a float32 copy of one adapter, named as in a LoRA file without its `transformer.` prefix."""
    tensors: dict[str, torch.Tensor] = {}
    for part in _parts(transformer, adapter_name):
        name = part.rows.name
        tensors[f"{name}.lora_A.weight"] = part.lora_A
        tensors[f"{name}.lora_B.weight"] = part.lora_B
        if part.magnitude is not None:
            tensors[f"{name}.lora_magnitude_vector"] = part.magnitude
    return {name: to_array(whole(tensor.detach()).float().clone()) for name, tensor in tensors.items()}


def lora_settings(transformer: CogVideoXTransformer, adapter_name: str = "default") -> dict[str, Any]:
    """Return what one adapter was made with, as keyword arguments of `save_lora`."""
    _require_known(transformer, adapter_name)
    return dict(next(layer.settings[adapter_name] for layer in _layers(transformer) if adapter_name in layer.settings))


def merge_lora(transformer: CogVideoXTransformer, *, restorable: bool = False) -> None:
    """Fold the adapters that are on, with their weights, into the base weights, and take all adapters off.

    The sum is formed in float32 and rounded once. With `restorable` the adapters and the original weights are
    kept aside, so that `unmerge_lora` gives back every bit.
    """
    for path, layer in _named_layers(transformer):
        layer.merge()
        if not restorable:
            transformer.set_submodule(path, layer.plain())


def unmerge_lora(transformer: CogVideoXTransformer) -> None:
    """Undo `merge_lora(restorable=True)` exactly."""
    for layer in _layers(transformer):
        layer.unmerge()


def remove_lora(transformer: CogVideoXTransformer, adapter_name: str | None = None) -> None:
    """Take one adapter, or all, off; a Linear left without any becomes the plain base again.

    Raises:
        FactoryError: no adapter of that name.
    """
    if adapter_name is not None:
        _require_known(transformer, adapter_name)
    unmerge_lora(transformer)
    for path, layer in _named_layers(transformer):
        for name in [adapter_name] if adapter_name is not None else list(layer.adapters):
            layer.drop(name)
        if not len(layer.adapters):
            transformer.set_submodule(path, layer.plain())


def _named_layers(transformer: CogVideoXTransformer) -> list[tuple[str, LoraLinear]]:
    return [(path, module) for path, module in transformer.named_modules() if isinstance(module, LoraLinear)]


def _layers(transformer: CogVideoXTransformer) -> list[LoraLinear]:
    return [layer for _, layer in _named_layers(transformer)]


def _parts(transformer: CogVideoXTransformer, adapter_name: str) -> list[LoraFactors]:
    _require_known(transformer, adapter_name)
    return [part for layer in _layers(transformer) for part in layer.parts(adapter_name).values()]


def _attach(
    transformer: CogVideoXTransformer,
    target: Target,
    adapter_name: str,
    *,
    rank: int,
    scale: float,
    settings: Mapping[str, Any],
) -> LoraFactors:
    """Put the factors of one adapter on one target, wrapping its Linear if it is still plain."""
    layer = transformer.get_submodule(target.path)
    if not isinstance(layer, LoraLinear):
        assert isinstance(layer, nn.Linear)
        layer = LoraLinear(layer)
        transformer.set_submodule(target.path, layer)
    part = LoraFactors(
        target.rows, in_features=target.in_features, rank=rank, scale=scale, use_dora=settings["use_dora"],
        device=layer.weight.device,
    )  # fmt: skip
    layer.attach(adapter_name, target.key, part, settings)
    return part


def _require_known(transformer: CogVideoXTransformer, adapter_name: str) -> None:
    known = adapter_names(transformer)
    if adapter_name not in known:
        loaded = f"Loaded: {', '.join(known)}." if known else "None is loaded; load or add one first."
        raise FactoryError(f"adapter {adapter_name!r} is not loaded{nearest(adapter_name, known)}. {loaded}")


def _require_new(transformer: CogVideoXTransformer, adapter_name: str) -> None:
    _require_unmerged(transformer)
    if adapter_name in adapter_names(transformer):
        raise FactoryError(f"adapter name {adapter_name!r} is in use. Choose another, or remove_lora it first.")
    if not re.fullmatch(r"[\w-]+", adapter_name) or hasattr(nn.ModuleDict, adapter_name):
        raise FactoryError(
            f"adapter name {adapter_name!r} cannot be in a parameter name: use letters, digits, - and _, "
            "and no name of a torch method."
        )


def _require_unmerged(transformer: CogVideoXTransformer) -> None:
    if any(layer.original is not None for layer in _layers(transformer)):
        raise FactoryError("the adapters are merged into the base weights; call unmerge_lora first.")
