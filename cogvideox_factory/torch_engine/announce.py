"""What a run says before its first step: its arithmetic, and what that needs."""

from dataclasses import asdict
from pathlib import Path

import torch

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.metrics import say
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.plan import memory
from cogvideox_factory.plan.decoding import parameters
from cogvideox_factory.plan.optimizer import optimizer_memory
from cogvideox_factory.run_plan import num_tokens
from cogvideox_factory.torch_engine.attention import backend_name
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.start import Plan


def say_arithmetic(plan: Plan, sampler: Sampler, update: Update, start: Path | None, ranks: Ranks) -> None:
    """Say what the run comes to: processes, clips and shapes, what is trained and how, and where it begins."""
    train, shape = plan.config.train, plan.shape
    trained = sum(p.numel() for p in update.trained.values())
    layout = ranks.layout
    if layout.size > 1:
        say(
            f"{layout.size} processes: {layout.num_data_ranks} take clips of their own, {layout.sequence} share a "
            f"video's tokens; ZeRO {layout.zero}, {layout.grid[0]} copies of the model in {layout.grid[1]} parts"
        )
    say(f"{len(sampler)} clips at {shape.fps:g} fps, {sampler.epochs(train.steps):.1f} epochs in {train.steps} steps:")
    if len(sampler.set_counts) > 1 or sampler.places != len(sampler):
        for name, (count, weight) in sampler.set_counts.items():
            say(f"  data set {name}: {count} clips x weight {weight:g} = {count * weight:g} places an epoch")
    for key, count in sampler.counts.items():
        size = sampler.batch_sizes[key]
        say(
            f"  {count} of {key} (frames x height x width) = {num_tokens(plan, Bucket.parse(key))} + "
            f"{plan.text_length} tokens; batch {size} ({size // train.gradient_accumulation} x "
            f"{train.gradient_accumulation} accumulated)"
        )
    left = sum(sampler.waiting(1).values())
    say(f"  {left} clips are left over when the first epoch ends: the next fills their batches up, none is dropped")
    say(
        f"{train.method}: {trained:,} of {plan.model.num_parameters:,} parameters, {plan.dtype} on {plan.device}, "
        f"checkpointing {train.checkpointing}, "
        f"attention {backend_name(plan.device, plan.dtype, plan.model.attention_head_dim)}"
    )
    if train.fp8 != "none":
        where = ", as a CPU can: the same numbers, no time saved" if plan.device.type == "cpu" else ""
        say(f"matrix products of blocks in float8, scales {train.fp8}{where}")
    _say_optimizer(plan, update)
    say(f"going on from {start}" if start else f"a fresh run in {plan.run_folder}")


def say_memory(plan: Plan, numbers: memory.Training, *, raw: bool) -> None:
    """Say what training needs, and what works beside it; `raw` says whether clips are encoded on the way."""
    say(memory.in_words(memory.need(numbers)))
    work = ["encodes raw clips (a cache, made by `cogvideox prepare`, spares that)"] if raw else []
    work += ["decodes sample videos"] if plan.config.validation.prompts else []
    if work:
        weights = sum(parameters(VaeConfig.from_folder(plan.folder / "vae"))) * plan.dtype.itemsize
        say(f"  and beside it the VAE, which {' and '.join(work)}: {weights / 2**30:.2f} GiB of weights, and its work")


def _say_optimizer(plan: Plan, update: Update) -> None:
    train, trained = plan.config.train, list(update.trained.values())
    cost = optimizer_memory(
        train.optimizer, [p.shape for p in trained], half=any(p.dtype != torch.float32 for p in trained),
        stochastic=train.master_weights == "stochastic_bf16", offload=train.optimizer_offload,
    )  # fmt: skip
    count = sum(p.numel() for p in trained)
    parts = {name.replace("_", " "): value / count for name, value in asdict(cost).items() if value}
    say(
        f"optimizer {train.optimizer}: {sum(parts.values()):.3g} bytes a trained parameter "
        f"({', '.join(f'{name} {value:.3g}' for name, value in parts.items())}"
        f"{'; masters and state in host memory' if train.optimizer_offload else ''})"
    )
    if train.optimizer == "prodigy" and train.learning_rate < 0.1:
        say(
            f"train.learning_rate={train.learning_rate:g}: prodigy finds the step size itself and multiplies it with "
            "this; it is made for 1.0"
        )
