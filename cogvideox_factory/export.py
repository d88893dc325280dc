"""Trained weights in the form another program reads: found, converted, and written with a card, complete or not at all.

A source is a finished run, a LoRA, or a transformer folder (`find_source`); what a checkpoint holds is read by the
engine that wrote it. `write` makes the folder. Whole models go tensor by tensor, so 5B needs a shard and no more.
"""

import shutil
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cogvideox_factory.checkpoints import STATE, checkpoint_folders
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.lora_files import PEFT_CONFIG_NAME, LoraFile, load_lora, resolve_lora
from cogvideox_factory.lora_forms import in_dtype, save_comfyui, save_diffusers, save_peft
from cogvideox_factory.merge import merged_tensors
from cogvideox_factory.model_card import CARD, LOSS, SAMPLES
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.module_names import to_comfyui
from cogvideox_factory.tensors import Deferred, TensorFile, narrowed, open_tensors, save_tensors
from cogvideox_factory.weights import MODEL_STEM, find_weight_files, iterate_tensors, resolve_transformer, save_folder

Target = Literal["diffusers", "peft", "comfyui", "merged"]
_EXPORTED = {CARD, LOSS, SAMPLES, PEFT_CONFIG_NAME, "transformer"}
Arrays = Iterable[tuple[str, np.ndarray]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported: a LoRA, a whole transformer, or a checkpoint that is yet to be read."""

    path: Path
    run: Path | None = None
    """The run folder it comes from, if it lies in one."""
    lora: LoraFile | None = None
    transformer: Path | None = None
    is_checkpoint: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """What is written: a LoRA, or a transformer whose arrays are made while they are written."""

    lora: LoraFile | None = None
    config: TransformerConfig | None = None
    arrays: Callable[[], Arrays] | None = None
    """(diffusers name, array) of a whole transformer."""
    folder: Path | None = None
    """Where that lies already."""


def find_source(path: Path) -> Source:
    """Return what a run folder, a checkpoint, a LoRA or a transformer folder holds.

    Raises:
        FactoryError: nothing there that could be exported, or a run that is not finished.
        UnfitError: damaged.
    """
    if (path / STATE).is_file():
        return Source(path=path, run=_run_of(path), is_checkpoint=True)
    inner = path / "final" if (path / "config.yaml").is_file() else path
    if inner != path and not inner.is_dir():
        made = checkpoint_folders(path)
        way = f"Give one of its checkpoints, such as {made[-1]}." if made else "It has no checkpoint yet either."
        raise FactoryError(f"{path} is a run that is not finished. {way}")
    for find in (resolve_transformer, resolve_lora):
        try:
            found = find(inner)
        except FactoryError:
            continue
        if find is resolve_transformer:
            return Source(path=path, run=_run_of(path), transformer=found)
        return Source(path=path, run=_run_of(path), lora=load_lora(found))
    raise FactoryError(
        f"{path}: nothing to export there. Give a run folder, one of its checkpoints, a LoRA (a .safetensors file, or "
        "the folder of one) or a transformer folder."
    )


def _run_of(path: Path) -> Path | None:
    """Return the run folder that `path` is, or lies in as final/, as a file of that, or as a checkpoint."""
    places = [path]
    places += [path.parent] if path.name == "final" or (path / STATE).is_file() else []
    places += [path.parent.parent] if path.parent.name == "final" else []
    return next((place for place in places if (place / "config.yaml").is_file()), None)


def write(
    folder: Path,
    weights: Weights,
    *,
    target: Target,
    name: str,
    baked: bool = False,
    dtype: str | None = None,
    base: str | None = None,
    base_transformer: Path | None = None,
    strength: float = 1.0,
    max_shard_bytes: int,
) -> list[str]:
    """Write `weights` into an empty folder and return the names of the files, first the one to load.

    Args:
        folder: where to; whoever calls makes it final.
        weights: what.
        target: the form.
        name: of ComfyUI's file, without a suffix.
        baked: multiply the LoRA's scaling into its tensors.
        dtype: of the tensors; None is their own.
        base: the model a LoRA belongs to, for PEFT's config.
        base_transformer: what a LoRA is merged into.
        strength: of a LoRA that is merged.
        max_shard_bytes: of one file of a transformer folder.

    Raises:
        UnfitError: weights that do not fit each other, or the form.
        StorageError: the disk is full, read-only or failing.
    """
    file = weights.lora
    if file is not None:
        _require_known_layers(file)
    if target == "merged":
        assert file is not None, target
        assert base_transformer is not None, target
        arrays = merged_tensors(base_transformer, file, strength=strength, dtype=dtype)
        _save_transformer(folder, arrays, TransformerConfig.from_folder(base_transformer), max_shard_bytes)
    elif file is not None:
        file = in_dtype(file, dtype, baked=baked)
        if target == "comfyui":
            save_comfyui(folder / f"{name}.safetensors", file)
        elif target == "peft":
            save_peft(folder, file, base=base)
        else:
            save_diffusers(folder, file)
    elif target == "comfyui" and weights.folder:
        save_comfyui_model(folder / f"{name}.safetensors", weights.folder, dtype=dtype)
    else:
        assert weights.arrays is not None, weights
        assert weights.config is not None, weights
        arrays = ((key, narrowed(a, np.dtype(dtype or a.dtype), what=key)) for key, a in weights.arrays())
        _save_transformer(folder, arrays, weights.config, max_shard_bytes)
        if target == "comfyui":
            save_comfyui_model(folder / f"{name}.safetensors", folder / "transformer")
            shutil.rmtree(folder / "transformer")
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.safetensors"))


def _require_known_layers(file: LoraFile) -> None:
    if strays := [module for module in file.modules if to_comfyui(module) is None]:
        raise UnfitError(
            f"{file.source}: {len(strays)} of {len(file.modules)} layers are none of a CogVideoX transformer: "
            f"{', '.join(strays[:5])}. Is it a LoRA of another model, or of a text encoder too?"
        )


def require_replaceable(out: Path, source: Path) -> None:
    """Refuse to replace anything but an export, which can be made again.

    Raises:
        FactoryError: `out` is a file, holds the source, or something that no export writes.
    """
    if out.resolve() in (source.resolve(), *source.resolve().parents):
        raise FactoryError(f"--overwrite True: {out} holds {source}, which is exported. Give another --out.")
    names = {path.name for path in out.iterdir()} if out.is_dir() else {out.name}
    if strays := sorted(name for name in names - _EXPORTED if not name.endswith(".safetensors")):
        raise FactoryError(f"--overwrite True: {out} is no export, it holds {strays[0]}. Give another --out.")


def _save_transformer(folder: Path, arrays: Arrays, config: TransformerConfig, max_shard_bytes: int) -> None:
    save_folder(folder / "transformer", arrays, config=config.to_dict(), max_shard_bytes=max_shard_bytes)


def save_comfyui_model(path: Path, transformer: Path, *, dtype: str | None = None) -> None:
    """Write a transformer folder as the one file that ComfyUI's diffusion model loader reads: the same, renamed.

    `dtype` is that of all tensors; None is each one's own.

    Raises:
        UnfitError: a tensor that ComfyUI's model does not have; a damaged file; a number beyond `dtype`.
        StorageError: the disk is full, read-only or failing.
    """
    arrays: dict[str, Deferred] = {}
    with ExitStack() as stack:
        for shard in find_weight_files(transformer, MODEL_STEM):
            file = stack.enter_context(open_tensors(shard))
            for name in file.names:
                arrays[_comfyui_name(name, transformer)] = _deferred(file, name, dtype)
        save_tensors(path, arrays)


def _comfyui_name(name: str, source: Path) -> str:
    module, _, kind = name.rpartition(".")
    theirs = "patch_embed" if kind == "pos_embedding" else to_comfyui(module)
    if theirs is None:
        raise UnfitError(f"{source}: ComfyUI's CogVideoX has no tensor for {name}, so it cannot load this model.")
    return f"{theirs}.{kind}"


def _deferred(file: TensorFile, name: str, dtype: str | None) -> Deferred:
    kind = np.dtype(dtype or file.dtype(name))
    return Deferred(shape=file.shape(name), dtype=kind, make=lambda: narrowed(file.read(name), kind, what=name))


def transformer_weights(folder: Path) -> Weights:
    """Return the weights of a transformer folder."""
    return Weights(config=TransformerConfig.from_folder(folder), arrays=lambda: iterate_tensors(folder), folder=folder)


def stored_kind(state: Mapping[str, Any], asked: str, *, source: Path) -> str:
    """Return where the weights asked for (raw, average, auto) lie in a checkpoint: under "model" or "ema".

    Raises:
        FactoryError: the average of a run that keeps none.
    """
    has_average = any(name.startswith("ema.") for name in state["tensors"])
    if asked == "average" and not has_average:
        raise FactoryError(f"{source} holds no average: the run had no train.ema_decay. Use --weights raw.")
    return "ema" if has_average and asked != "raw" else "model"
