"""The weights in a checkpoint of this engine, as `final/` would hold them: the run's own, or the average of them.

They lie there under the checkpoint's names, so no framework is needed: `export` reads them where there is none.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory import intake, weights
from cogvideox_factory.checkpoints import STATE, read_state, verify_checkpoint
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.export import Weights, stored_kind
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.tensors import narrowed, open_tensors
from cogvideox_factory.tiny.layout import transformer_shapes

_FACTORS = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}
"""What `lora_linear` calls them, and what a LoRA file does."""


def read(folder: Path, *, asked: str, base: str | None = None) -> Weights:
    """Return what a checkpoint learnt.

    Args:
        folder: the checkpoint.
        asked: raw, average, or auto: what the run would export.
        base: the model the run started from, where it is not to be found as the run had it.

    Raises:
        FactoryError: the average of a run that keeps none; a base that is not here.
        UnfitError: a damaged checkpoint, or another base.
    """
    verify_checkpoint(folder)
    state = read_state(folder)
    config = check(state["settings"], source=str(folder / STATE))
    kind = stored_kind(state, asked, source=folder)
    if config.train.method == "lora":
        return Weights(lora=_read_lora(folder, config.lora.model_dump(exclude={"base"}), kind=kind))
    start = weights.resolve_model(
        base or config.model.path, revision=config.model.revision, subfolders=("transformer",)
    )
    model, frozen = intake.transformer_config(config, start), intake.transformer_folder(config, start)
    kept = _kept_in(
        state["identity"]["run.dtype"], amp_level=config.mindspore.amp_level, masters=config.train.master_weights
    )
    dtype = np.dtype(kept)
    return Weights(config=model, arrays=lambda: _read_transformer(folder, model, frozen, kind=kind, dtype=dtype))


def _kept_in(run_dtype: str, *, amp_level: str | None, masters: str) -> str:
    """Return the dtype a run keeps its model in (`device.pick_precision`, `learner.load_transformer`)."""
    if masters == "stochastic_bf16":
        return "bfloat16"
    return run_dtype if amp_level in (None, "O3") else "float32"


def _read_lora(folder: Path, settings: Mapping[str, Any], *, kind: str) -> LoraFile:
    arrays = {}
    for name, array in _trained(folder, kind):
        module, _, factor = name.partition(".parts.0.")  # a run trains one adapter
        arrays[f"{module}.{_FACTORS[factor]}"] = array.astype(np.float32)
    targets = settings["target_modules"]
    return LoraFile(
        source=str(folder), arrays=arrays, rank=settings["rank"], alpha=settings["alpha"],
        use_rslora=settings["use_rslora"], use_dora=settings["use_dora"],
        target_modules=targets if isinstance(targets, str) else tuple(targets),
    )  # fmt: skip


def _read_transformer(
    folder: Path, model: TransformerConfig, base: Path, *, kind: str, dtype: np.dtype
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (diffusers name, array); what was not trained is that of `base`, a transformer folder."""
    missing = transformer_shapes(model)
    for source, arrays in ((folder, _trained(folder, kind)), (base, weights.iterate_tensors(base))):
        for name, array in arrays:
            if name in missing:
                _require_shape(name, array, missing.pop(name), source)
                yield name, narrowed(array, dtype, what=name)
            elif source == folder:
                raise UnfitError(
                    f"{folder}: {name} is not in this model. Give the one the run was started with: --base."
                )
        if not missing:
            return
    raise UnfitError(
        f"{base} lacks {sorted(missing)[0]}, which the run did not train. Export final/ of the finished run."
    )


def _require_shape(name: str, array: np.ndarray, shape: tuple[int, ...], source: Path) -> None:
    if array.shape != shape:
        raise UnfitError(
            f"{source}: {name} is {list(array.shape)}, the run's model has {list(shape)}. Give the model the run was "
            "started with (--base), or export final/ of the finished run."
        )


def _trained(folder: Path, kind: str) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what was trained, without the word that says what it is of a run."""
    for path in sorted(folder.glob("*.safetensors")):
        with open_tensors(path, verify=False) as file:
            for name in file.names:
                if name.startswith(f"{kind}."):
                    yield name.removeprefix(f"{kind}."), file.read(name)
