"""Where numbers first stop being finite: a batch goes through the model once more, with a look at every module.

This waits for the device after every module, so it is for steps that went wrong. Weights, moments and gradients stay as
they are. It is asked by all processes of a run alike, because the model may be divided among them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.sharding import reduce_gradients


def first_not_finite(
    objective: Objective, update: Update | None, batches: Sequence[Mapping[str, Any]], ranks: Ranks
) -> str | None:
    """Return what is first not finite in the forward, then in the backward pass of `batches`; None if all is.

    Args:
        objective: of the run.
        update: whose loss scale and gradients are used, and cleared after it; None looks at the forward pass only.
        batches: this process' accumulation steps, encoded, on the device.
        ranks: of the run.
    """
    if found := ranks.agree(next((name for batch in batches if (name := _bad_input(batch))), None)):
        return found
    with _watched(objective.transformer, _outputs) as seen, torch.no_grad():
        for batch in batches:
            if not objective(dict(batch)).isfinite().all():
                seen.append("the loss")
    if (found := ranks.agree(next(iter(seen), None))) or update is None:
        return found
    # Compiled blocks have no place to look into, and would be compiled anew for it.
    with _watched(objective.transformer, _gradients) as seen, torch.compiler.set_stance("force_eager"):
        for index, batch in enumerate(batches):
            reduce_gradients(objective.transformer, ranks.layout, last=index == len(batches) - 1)
            (objective(dict(batch)).mean() * (update.loss_scale.scale / len(batches))).backward()
    update.clear_gradients()
    return ranks.agree(next(iter(seen), None))


def _bad_input(batch: Mapping[str, Any]) -> str | None:
    for key, value in batch.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            finite = value.isfinite().flatten(1).all(dim=1).tolist()
            if not all(finite):
                return f"{key} of clip {batch['clip_ids'][finite.index(False)]}, before the model sees it"
    return None


def _outputs(name: str, output: Any, seen: list[str]) -> None:
    if not seen and any(_is_bad(leaf) for leaf in tree_leaves(output)):
        seen.append(f"the output of {name}")


def _gradients(name: str, output: Any, seen: list[str]) -> None:
    """Look when the gradient comes by; now nothing may be computed, or checkpointing finds another forward pass."""

    def look(grad: Tensor) -> None:
        if not seen and _is_bad(grad):
            seen.append(f"the gradient that comes to the output of {name}")

    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaf.register_hook(look)


@contextmanager
def _watched(transformer: nn.Module, look: Callable[[str, Any, list[str]], None]) -> Iterator[list[str]]:
    """Yield a list to which `look` adds what it finds at modules' outputs, in turn, while they compute."""
    seen: list[str] = []

    def hook_of(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: look(name, output, seen)

    handles = [
        module.register_forward_hook(hook_of(name or "the transformer")) for name, module in transformer.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_bad(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and not leaf.isfinite().all()
