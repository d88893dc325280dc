"""A pipeline as `generate` wants it: LoRAs on, weights in few bits, in host memory or divided, never whole on the way.

| | the transformer's weights |
|---|---|
| as they are | read straight to the device |
| divided (zero 3) | each process reads its own rows alone |
| in few bits | read to host memory, rounded on the device one matrix at a time |
| taking turns | read to host memory, where they wait |
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from cogvideox_factory.lora_files import LoraFile, load_lora, resolve_lora
from cogvideox_factory.models import SchedulerConfig, TransformerConfig
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.low_bit import quantize
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.ranks import Ranks, leads_machine
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.turns import Turns
from cogvideox_factory.torch_engine.vae import CogVideoXVAE


@dataclass(frozen=True, kw_only=True, slots=True)
class Keeping:
    """How weights are kept while videos are made."""

    base: str = "model"
    """Of the blocks' matrices: model (as they are), int8, fp8 or nf4."""
    offload: str = "none"
    """none, or a mode of `turns`."""
    group: int = 1
    """Blocks that come at a time with offload=group."""

    def turns(self, device: torch.device) -> Turns | None:
        """Return what lets models share `device`, if they are to."""
        return None if self.offload == "none" else Turns(device, self.offload, group=self.group)


AS_IT_IS = Keeping()


def load_pipeline(
    folder: Path,
    *,
    transformer_folder: Path,
    config: TransformerConfig,
    dtype: torch.dtype,
    device: torch.device,
    tiling: bool,
    loras: Sequence[str] = (),
    lora_weights: Sequence[float] = (),
    merge: bool = False,
    keeping: Keeping,
    ranks: Ranks,
) -> CogVideoXPipeline:
    """Load a model folder without its text encoder, and LoRAs (weight 1.0 each by default), for these processes.

    LoRAs are folded into the weights with `merge`, for which divided weights are whole for a time.

    Raises:
        MissingError, UnfitError: as `CogVideoXPipeline.from_pretrained` and `load_lora_weights`.
        FactoryError: matrices that few bits cannot hold.
    """
    files = [load_lora(resolve_lora(path)) for path in loras]
    turns, divided = keeping.turns(device), ranks.layout.zero == 3
    assert not divided or keeping == AS_IT_IS, keeping
    if divided and not merge:
        transformer = _load_divided(transformer_folder, config, files, dtype=dtype, device=device, ranks=ranks)
    else:
        first = torch.device("cpu") if turns or keeping.base != "model" or divided else device
        transformer = CogVideoXTransformer.from_folder(
            transformer_folder, config=config, dtype=dtype, device=first, verify=leads_machine()
        )
        if keeping.base != "model":
            quantize(transformer, keeping.base, device=device)
        for name, file in _named(files):
            lora.load_lora_into(transformer, file, name)
    if files:
        lora.set_adapters(transformer, [name for name, _ in _named(files)], list(lora_weights) or None)
        if merge:
            lora.merge_lora(transformer)
            if divided:
                _divide(transformer, dtype=dtype, ranks=ranks)
    vae = CogVideoXVAE.from_folder(folder / "vae", dtype=dtype, device="cpu" if turns else device)
    if tiling:
        vae.enable_tiling()
    transformer.requires_grad_(False)
    if turns:
        turns.add(transformer, transformer.blocks)
        turns.add(vae.encoder)
        turns.add(vae.decoder)
        vae.to(device)  # what is outside both
    else:
        transformer.to(device)
    pipe = CogVideoXPipeline(
        transformer=transformer, vae=vae, text_encoder=None,
        scheduler=SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json"),
        device=device, dtype=dtype,
    )  # fmt: skip
    pipe.share(ranks)
    return pipe


def load_text_encoder(folder: Path, *, dtype: torch.dtype, device: torch.device, keeping: Keeping) -> TextEncoder:
    """Load the text encoder of a model folder; where blocks come one by one, its own do as well."""
    if keeping.offload in ("none", "model"):
        return TextEncoder.from_folder(folder, dtype=dtype, device=device)
    encoder = TextEncoder.from_folder(folder, dtype=dtype)
    Turns(device, keeping.offload, group=keeping.group).add(encoder.model, encoder.blocks)
    return encoder


def _load_divided(
    folder: Path,
    config: TransformerConfig,
    files: Sequence[LoraFile],
    *,
    dtype: torch.dtype,
    device: torch.device,
    ranks: Ranks,
) -> CogVideoXTransformer:
    """Load the rows that this process holds; weights are divided before there is any memory behind them."""
    with torch.device("meta"):
        transformer = CogVideoXTransformer(config).to(dtype)
    for name, file in _named(files):
        lora.load_lora_into(transformer, file, name)
    _divide(transformer, dtype=dtype, ranks=ranks)
    transformer.to_empty(device=device)
    transformer.load_folder(folder, verify=leads_machine())
    for name, file in _named(files):
        lora.fill_lora(transformer, file, name)
    return transformer


def _divide(transformer: CogVideoXTransformer, *, dtype: torch.dtype, ranks: Ranks) -> None:
    from cogvideox_factory.torch_engine.sharding import distribute  # a second that others need not wait

    distribute(transformer, ranks, dtype=dtype)


def _named(files: Sequence[LoraFile]) -> list[tuple[str, LoraFile]]:
    return [(f"lora-{index}", file) for index, file in enumerate(files)]
