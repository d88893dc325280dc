"""The weights in a checkpoint, as `final/` would hold them: the run's own, or the average of them.

A checkpoint keeps what is trained, under the names of this tower, in as many pieces as there were processes. Nothing of
the size of the model is held here: a LoRA is small, and a whole transformer is read tensor by tensor.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from cogvideox_factory import intake, weights
from cogvideox_factory.checkpoints import STATE, read_state, verify_checkpoint
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.export import Weights, stored_kind
from cogvideox_factory.lora_files import LoraFile
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.recipe import check
from cogvideox_factory.tensors import TensorFile, open_tensors
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.checkpoint import find_pieces, read_rows, stored_shape
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.lora_linear import LoraFactors
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

_Pieces = dict[str, list[tuple[int, TensorFile]]]


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
    start = weights.resolve_model(
        base or config.model.path, revision=config.model.revision, subfolders=("transformer",)
    )
    model = intake.transformer_config(config, start)
    if config.train.method == "lora":
        settings = config.lora.model_dump(exclude={"base"})
        return Weights(lora=_read_lora(folder, model, settings, kind=kind))
    # Processes that divide float32 weights export those (`learner.load_transformer`); one process rounds them.
    many = state["layout"]["size"] > 1 and config.train.master_weights == "float32"
    dtype, frozen = "float32" if many else state["identity"]["run.dtype"], intake.transformer_folder(config, start)
    return Weights(config=model, arrays=lambda: _read_transformer(folder, model, frozen, kind=kind, dtype=dtype))


def _read_lora(folder: Path, model: TransformerConfig, settings: dict[str, Any], *, kind: str) -> LoraFile:
    """Return the LoRA that `settings`, keyword arguments of `lora.add_lora`, made."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer(model)
    lora.add_lora(transformer, seed=0, **settings)
    with _opened(folder) as pieces:
        for path, part in list(transformer.named_modules()):
            if isinstance(part, LoraFactors):
                for name, parameter in list(part.named_parameters()):
                    stored = _read(pieces, f"{kind}.{path}.{name}", tuple(parameter.shape), folder)
                    setattr(part, name, nn.Parameter(stored.float()))
    arrays, made = lora.lora_arrays(transformer), lora.lora_settings(transformer)
    targets = made["target_modules"]
    return LoraFile(
        source=str(folder), arrays=arrays, rank=made["rank"], alpha=made["alpha"], use_rslora=made["use_rslora"],
        use_dora=made["use_dora"], target_modules=targets if isinstance(targets, str) else tuple(targets),
    )  # fmt: skip


def _read_transformer(
    folder: Path, model: TransformerConfig, base: Path, *, kind: str, dtype: str
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (diffusers name, array); what was not trained is that of `base`, a transformer folder."""
    with _opened(folder) as pieces:
        trained = {name.removeprefix(f"{kind}.") for name in pieces if name.startswith(f"{kind}.")}
        slots = diffusers_names(model)
        frozen = {name for name, slot in slots.items() if slot.name not in trained}
        for name, slot in slots.items():
            if name not in frozen:
                rows = _read(pieces, f"{kind}.{slot.name}", None, folder, slot.start, slot.stop)
                yield name, to_array(rows.to(getattr(torch, dtype))).reshape(slot.shape)
        if frozen:
            for name, stored in weights.stored_tensors(base):
                if name in frozen:
                    if stored.shape != slots[name].shape:
                        raise UnfitError(
                            f"{base}: {name} is {list(stored.shape)}, the run's model has {list(slots[name].shape)}, "
                            "and a checkpoint keeps only what is trained. Export final/ of the finished run."
                        )
                    yield name, to_array(to_tensor(stored[:]).to(getattr(torch, dtype)))


@contextmanager
def _opened(folder: Path) -> Iterator[_Pieces]:
    with ExitStack() as stack:
        yield find_pieces(
            [stack.enter_context(open_tensors(path, verify=False)) for path in sorted(folder.glob("*.safetensors"))]
        )


def _read(
    pieces: _Pieces, name: str, shape: tuple[int, ...] | None, folder: Path, start: int = 0, stop: int | None = None
) -> Tensor:
    """Return rows of a stored tensor, of which all are of `shape`, if that is given."""
    stored = stored_shape(pieces.get(name, []), name)
    if not stored or (shape is not None and stored != shape) or (stop or 0) > stored[0]:
        raise UnfitError(
            f"{folder}: {name} has shape {stored or None}, this model needs {shape or f'{stop} rows'}. "
            "Give the model the run was started with: --base."
        )
    stop = stored[0] if stop is None else stop
    target = torch.empty(
        (stop - start, *stored[1:]), dtype=to_tensor(np.empty(0, pieces[name][0][1].dtype(name))).dtype
    )
    read_rows(target, start, stop, pieces[name], name)
    return target
