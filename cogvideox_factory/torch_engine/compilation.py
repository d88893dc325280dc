"""Compiling the transformer's blocks: one graph for each shape, which all blocks but the ends share.

A block is compiled from its forward down, checkpointing included, so what stands around it (hooks that gather divided
weights) stays as it is. The last block leaves out the text, under a LoRA the input of the first asks for no gradient,
and layers may differ in their adapters and in checkpointing: each kind has a graph of its own. Shapes are fixed, which
makes the fastest code; a shape more is a compilation more. In a training run what is not trained, held-out losses and
sample videos, goes uncompiled: its shapes would cost more than they return. A block that makes videos has two shapes at
most, with guidance and without.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.torch_engine.device import require_compiler
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

# CUDA graphs keep the inputs of every block of every shape in memory of their own.
_MODES = {"default": None, "max_autotune": "max-autotune-no-cudagraphs"}


def compile_blocks(
    transformer: CogVideoXTransformer,
    mode: str,
    *,
    num_shapes: int,
    backend: str = "inductor",
    training: bool = True,
) -> int:
    """Let the blocks of `transformer` be compiled when they are first run; return the number of graphs they have.

    Args:
        transformer: with its LoRA, if it gets one, and divided among processes, if it is.
        mode: "default", or "max_autotune", which tries several kernels for each matrix product.
        num_shapes: different batches that there will be. One more is an error, not a slow step.
        backend: torch.compile's.
        training: compile what is trained, and leave out forward passes without gradients.

    Raises:
        FactoryError: no such mode.
        MissingError: no compiler on this machine.
    """
    if mode not in _MODES:
        raise FactoryError(f"compile={mode!r}{nearest(mode, list(_MODES))}: give {' or '.join(_MODES)}.")
    if backend == "inductor":
        require_compiler(next(transformer.parameters()).device)
    num_graphs = num_shapes * _num_kinds(transformer, training)
    from torch._inductor import config as inductor  # a second that other runs need not wait

    inductor.deterministic = torch.are_deterministic_algorithms_enabled()
    torch._dynamo.reset()  # what another run in this process compiled counts as well
    torch._dynamo.config.recompile_limit = num_graphs
    torch._dynamo.config.accumulated_recompile_limit = max(num_graphs, 256)
    for block in transformer.blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, mode=_MODES[mode], backend=backend)
        block.forward = _trained_fast(block.forward, compiled) if training else compiled
    return num_graphs


def _num_kinds(transformer: CogVideoXTransformer, training: bool) -> int:
    """Return how many different graphs the blocks have for a shape."""
    kinds = set()
    of_input = _is_trained(transformer.patch_embed)
    of_vectors = any(map(_is_trained, (transformer.time_embedding, transformer.ofs_embedding, transformer.modulation)))
    for index, block in enumerate(transformer.blocks):
        is_last = transformer.sequence is None and index == len(transformer.blocks) - 1
        weights = tuple((name, p.requires_grad) for name, p in block.named_parameters())
        kinds.add((block.checkpointing, of_input and training, is_last, weights))
        of_input = of_input or of_vectors or _is_trained(block)
    return len(kinds)


def _is_trained(module: nn.Module | None) -> bool:
    return module is not None and any(parameter.requires_grad for parameter in module.parameters())


def _trained_fast(forward: Callable[..., Tensor], compiled: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(forward)
    def run(*args: Any) -> Tensor:
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    return run
