"""Compiling the transformer's blocks for training: a graph or three for each shape, which all blocks share.

A block is compiled from its forward down, checkpointing included, so what stands around it (hooks that gather divided
weights) stays as it is. Shapes are fixed, which makes the fastest code; a shape more is a compilation more. What is
not trained, held-out losses and sample videos, runs uncompiled: their shapes would cost more than they return.
"""

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from cogvideox_factory.errors import FactoryError, MissingError, nearest
from cogvideox_factory.torch_engine.block import Block
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

Compile = Literal["none", "default", "max_autotune"]

# CUDA graphs keep the inputs of every block of every shape in memory of their own.
_MODES = {"default": None, "max_autotune": "max-autotune-no-cudagraphs"}


def compile_blocks(transformer: CogVideoXTransformer, mode: str, *, num_shapes: int, backend: str = "inductor") -> int:
    """Let the blocks of `transformer` be compiled when they are first trained; return the largest number of graphs.

    Args:
        transformer: with its LoRA, if it gets one; before or after it is divided among processes.
        mode: "default", or "max_autotune", which tries several kernels for each matrix product.
        num_shapes: different batches that training will have. One more is an error, not a slow step.
        backend: torch.compile's.

    Raises:
        FactoryError: no such mode.
        MissingError: no compiler on this machine.
    """
    if mode not in _MODES:
        raise FactoryError(f"compile={mode!r}{nearest(mode, list(_MODES))}: give {', '.join(get_args(Compile))}.")
    if backend == "inductor":
        require_compiler(next(transformer.parameters()).device)
    # With all weights before it frozen, the first block's input asks for no gradient; the last block drops the text,
    # where no other process needs it. Both are graphs of their own.
    frozen = any(not parameter.requires_grad for parameter in transformer.patch_embed.parameters())
    kinds = 1 + frozen + (transformer.sequence is None)
    num_graphs = num_shapes * min(kinds, len(transformer.transformer_blocks))
    from torch._inductor import config as inductor  # a second that other runs need not wait

    inductor.deterministic = torch.are_deterministic_algorithms_enabled()
    torch._dynamo.reset()  # what another run in this process compiled counts as well
    torch._dynamo.config.recompile_limit = max(num_graphs, 1)
    torch._dynamo.config.accumulated_recompile_limit = max(num_graphs, 256)
    for block in transformer.transformer_blocks:
        assert isinstance(block, Block)
        block.forward = _trained_fast(block.forward, mode=_MODES[mode], backend=backend)
    return num_graphs


def _trained_fast(forward: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
    compiled = torch.compile(forward, fullgraph=True, dynamic=False, **options)

    @functools.wraps(forward)
    def run(*args: Any) -> Tensor:
        return compiled(*args) if torch.is_grad_enabled() else forward(*args)

    return run


def require_compiler(device: torch.device) -> None:
    """Check for what turns graphs into machine code: a C++ compiler, and on a card Triton.

    Raises:
        MissingError: it is not here.
    """
    wanted = os.environ.get("CXX", "g++")  # as torch looks for it
    if shutil.which(wanted) is None:
        raise MissingError(
            f"train.compile needs a C++ compiler, and {wanted} is not here. Install it (apt-get install g++), or set "
            "--train.compile none."
        )
    if device.type != "cpu" and importlib.util.find_spec("triton") is None:
        raise MissingError(
            "train.compile needs Triton on a card. Install: pip install triton, or --train.compile none."
        )
