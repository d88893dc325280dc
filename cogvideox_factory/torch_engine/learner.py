"""What learns in a run: the transformer, loaded and made trainable, its loss, its updates, and its export."""

from collections import deque
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from cogvideox_factory import weights
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.errors import StorageError
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.metrics import say
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.publish import replace_folder
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.linear import is_low_bit, set_float8
from cogvideox_factory.torch_engine.low_bit import quantize
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.offload import Offload
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.ranks import Ranks, leads_machine
from cogvideox_factory.torch_engine.sharding import distribute, drop_gathered
from cogvideox_factory.torch_engine.start import Plan
from cogvideox_factory.torch_engine.swap import Swap
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer


def load_transformer(plan: Plan, ranks: Ranks) -> CogVideoXTransformer:
    """Load the transformer (or draw its weights), with a fresh LoRA or with all weights trainable."""
    train = plan.config.train
    load = _load_sparingly if plan.config.lora.base != "model" or train.swapped_blocks else _load_divided
    transformer = load(plan, ranks)
    if train.fp8 != "none":
        set_float8(transformer.transformer_blocks, train.fp8)
    if train.activation_offload:
        Offload(transformer.blocks, device=plan.device)
    return transformer.train()


def _load_divided(plan: Plan, ranks: Ranks) -> CogVideoXTransformer:
    """Divide the transformer before there is any memory behind it, so that a process reads and holds its own part."""
    config = plan.config
    dtype, is_lora = plan.dtype, config.train.method == "lora"
    if ranks.mesh is not None and not is_lora and config.train.master_weights == "float32":
        dtype = torch.float32  # what is kept; blocks are gathered in the run's dtype
    with torch.device("meta"):
        transformer = CogVideoXTransformer(plan.model).to(dtype)
    transformer.set_checkpointing(config.train.checkpointing, config.train.checkpointing_layers)
    if is_lora:
        targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump(exclude={"base"}))
        say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    else:
        transformer.requires_grad_(True)
    distribute(transformer, ranks, dtype=plan.dtype)
    transformer.to_empty(device=plan.device)
    if plan.is_random:
        transformer.initialize(config.run.seed)
    else:
        transformer.load_folder(plan.transformer_folder, verify=leads_machine())
    if is_lora:
        lora.initialize_lora(transformer, seed=config.run.seed)
    return transformer


def _load_sparingly(plan: Plan, ranks: Ranks) -> CogVideoXTransformer:
    """Load the transformer of a LoRA in host memory, so that it never is on the device whole or as it is in the files.

    Its blocks are rounded to few bits there one matrix at a time, or keep their weights on the host.
    """
    config = plan.config
    transformer = CogVideoXTransformer.from_folder(
        plan.transformer_folder, config=plan.model, dtype=plan.dtype, verify=leads_machine()
    )
    transformer.set_checkpointing(config.train.checkpointing, config.train.checkpointing_layers)
    if config.lora.base != "model":
        quantize(transformer, config.lora.base, device=plan.device)
    targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump(exclude={"base"}))
    say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    whole: set[nn.Parameter] = set()
    if config.train.swapped_blocks:
        whole = Swap(transformer.blocks, config.train.swapped_blocks, device=plan.device).parameters
    transformer.to(plan.device)
    whole |= {parameter for parameter in transformer.parameters() if is_low_bit(parameter)}
    distribute(transformer, ranks, dtype=plan.dtype, whole=whole)
    return transformer


def make_objective(plan: Plan, transformer: CogVideoXTransformer) -> Objective:
    """Return the loss of the run's transformer."""
    config = VaeConfig.from_folder(plan.folder / "vae")
    return Objective(
        transformer,
        alphas_cumprod=alphas_cumprod(plan.scheduler),
        scales=Scales(video=config.scaling_factor, image=_image_scale(plan, config)),
        device=plan.device,
        dtype=plan.dtype,
    )


def make_update(plan: Plan, transformer: CogVideoXTransformer, ranks: Ranks) -> Update:
    """Return what turns gradients into weights."""
    train = plan.config.train
    return Update(
        transformer.named_parameters(), dtype=plan.dtype, device=plan.device, betas=(train.beta1, train.beta2),
        eps=train.epsilon, weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm,
        stochastic_bf16=train.master_weights == "stochastic_bf16", seed=plan.config.run.seed,
        optimizer=train.optimizer, beta3=train.beta3, offload=train.optimizer_offload, ranks=ranks,
        spike_factor=train.spike_factor,
    )  # fmt: skip


def export(
    transformer: CogVideoXTransformer, run_folder: Path, *, method: str, ranks: Ranks,
    max_shard_bytes: int = weights.MAX_SHARD_BYTES, describe: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write `final/`: a LoRA file or a transformer folder that diffusers loads as it is.

    Divided weights are gathered one parameter at a time, from all processes; the leading one writes, shard by shard,
    and lets `describe` add what belongs beside them.

    Raises:
        StorageError: in all processes.
    """
    drop_gathered(transformer)
    arrays = transformer.iterate_arrays() if method == "full" else iter(lora.lora_arrays(transformer).items())
    problem: StorageError | None = None
    if ranks.leads:
        try:
            with replace_folder(run_folder / "final") as folder:
                if method == "lora":
                    file = folder / "pytorch_lora_weights.safetensors"
                    save_lora(file, dict(arrays), **lora.lora_settings(transformer))
                else:
                    config = transformer.config.to_dict()
                    weights.save_folder(folder / "transformer", arrays, config=config, max_shard_bytes=max_shard_bytes)
                describe(folder)
        except StorageError as error:
            problem = error
    deque(arrays, maxlen=0)  # the others wait for their parts to be asked for, to the end
    ranks.from_lead(lambda: _raise(problem))


def _raise(problem: StorageError | None) -> None:
    if problem is not None:
        raise problem


def _image_scale(plan: Plan, vae: VaeConfig) -> float:
    return vae.image_scale if plan.config.train.image_scale == "pipeline" else vae.scaling_factor
