"""The frozen base of a LoRA, or a model that makes videos, in 8 or 4 bits a weight, by torchao's tensors.

Dettmers et al., QLoRA (arXiv 2305.14314): adapters train as well over a base that is rounded once. The matrices of the
blocks, 85 % of a model's weights, are kept as codes and scales; `linear.dense` makes a matrix of one again for each
product and drops it. All else (norms, embeddings, the modulation, the head) stays as it is.

| base | a weight | scales |
|---|---|---|
| int8 | 8 bits, symmetric | float32 a row |
| fp8 | 8 bits, e4m3 | float32 a row |
| nf4 | 4 bits, the 16 quantiles of a normal distribution (the paper's appendix E) | 8 bits each 64, and those of 256 |
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from cogvideox_factory.errors import FactoryError, MissingError, nearest
from cogvideox_factory.torch_engine.linear import Linear
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

BASES = ("int8", "fp8", "nf4")

_NF4_GROUP = 64 * 256
"""Weights that share a scale of scales; torchao takes whole groups only."""


def require_torchao(base: str, *, setting: str = "lora.base") -> None:
    """Check, before anything is loaded, that a `base` of few bits can be made; `setting` is what asks for it.

    Raises:
        FactoryError: no such base.
        MissingError: torchao is not installed.
    """
    if base not in BASES:
        raise FactoryError(f"{setting}={base!r}{nearest(base, list(BASES))}: give model, {', '.join(BASES)}.")
    try:
        import torchao  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingError(
            f"{setting}={base} needs torchao, which is not installed: pip install 'cogvideox-factory[lowbit]'. "
            f"Or use --{setting} model."
        ) from error


@torch.no_grad()
def quantize(transformer: CogVideoXTransformer, base: str, *, device: torch.device) -> None:
    """Round the matrices of all blocks to `base`, one at a time, on `device`, where they stay; freeze them.

    Raises:
        FactoryError: no such base, or a matrix whose size it cannot take.
        MissingError: torchao is not installed.
    """
    require_torchao(base)
    pack = _packer(base)
    for name, module in transformer.transformer_blocks.named_modules():
        if isinstance(module, Linear):
            if base == "nf4" and module.weight.numel() % _NF4_GROUP:
                raise FactoryError(
                    f"nf4 takes matrices of a multiple of {_NF4_GROUP} weights; {name} has "
                    f"{module.out_features} x {module.in_features}. Use int8 or fp8."
                )
            module.weight = nn.Parameter(pack(module.weight.detach().to(device)), requires_grad=False)


def _packer(base: str) -> Callable[[Tensor], Tensor]:
    # Imported late: it takes two seconds.
    from torchao.quantization import Float8Tensor, Int8Tensor, PerRow, to_nf4
    from torchao.quantization.quantize_.common import KernelPreference

    if base == "int8":
        return lambda weight: Int8Tensor.from_hp(weight, PerRow())
    if base == "fp8":
        return lambda weight: Float8Tensor.from_hp(
            weight, granularity=PerRow(), kernel_preference=KernelPreference.TORCH
        )
    return to_nf4
