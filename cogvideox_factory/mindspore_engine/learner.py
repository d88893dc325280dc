"""What learns in a run: the transformer, loaded and made trainable, its loss and its updates, and its export."""

from collections.abc import Callable, Mapping
from pathlib import Path

import mindspore as ms
from mindspore import Tensor

from cogvideox_factory import weights
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.metrics import say
from cogvideox_factory.mindspore_engine import lora
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.linear import weights_in
from cogvideox_factory.mindspore_engine.objective import Objective, Scales
from cogvideox_factory.mindspore_engine.optim import Update
from cogvideox_factory.mindspore_engine.ranks import Ranks
from cogvideox_factory.mindspore_engine.start import Plan
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.publish import replace_folder


class Learner:
    """A training step: `micro` for each micro-batch, then `update`."""

    def __init__(
        self, objective: Objective, update: Update, *, num_micros: int, num_data_ranks: int = 1, mode: Mode = PYNATIVE
    ) -> None:
        """Compile both.

        Args:
            objective: the loss.
            update: what becomes of gradients.
            num_micros: micro-batches of a step.
            num_data_ranks: processes, or groups of them, that have clips of their own; their gradients add up.
            mode: how a micro-batch runs.
        """
        self.objective, self.update = objective, update
        num_shares = num_micros * num_data_ranks
        # Of an object in a closure the compiler forgets what it is when a second shape comes; not of its methods.
        losses_of, add, loss_scale = objective.losses, update.add, update.loss_scale

        def mean_loss(*arguments):
            losses = losses_of(*arguments)
            return losses.mean() * loss_scale / num_shares, losses

        gradients = ms.value_and_grad(mean_loss, None, ms.ParameterTuple(update.trained), has_aux=True)

        def micro(*arguments):
            values, grads = gradients(*arguments)
            add(grads)
            return values[1]

        def losses(*arguments):
            return losses_of(*arguments)

        self._losses = mode.compiled(losses, of=objective.transformer)
        self._micro = mode.compiled(micro, of=objective.transformer)

    def micro(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Add the gradients of one micro-batch; return the loss of each of its samples, float32 [B]."""
        return self._micro(*self.objective.arguments(batch))

    def losses(self, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each sample, float32 [B], and learn nothing."""
        return self._losses(*self.objective.arguments(batch))

    def step(self, learning_rate: float) -> Tensor:
        """Update the weights; return the norm of the gradient."""
        return self.update.step(learning_rate)


def load_transformer(plan: Plan) -> CogVideoXTransformer:
    """Load the transformer (or draw its weights), with a fresh LoRA or with all weights trainable.

    With `parallel.zero` 3 a process reads and holds its own rows of Linears, and no others.
    """
    config, machine = plan.config, plan.machine
    dtype, shards = machine.precision.weights, machine.shards
    if config.train.master_weights == "stochastic_bf16":
        dtype = ms.bfloat16
    if plan.is_random:
        with weights_in(dtype, shards):
            transformer = CogVideoXTransformer(plan.model)
        transformer.initialize(config.run.seed)
    else:
        transformer = CogVideoXTransformer.from_folder(
            plan.transformer_folder, config=plan.model, dtype=dtype, shards=shards
        )
    if config.train.method == "lora":
        targets = lora.add_lora(transformer, seed=config.run.seed, **config.lora.model_dump(exclude={"base"}))
        say(f"LoRA rank {config.lora.rank} on {len(targets)} modules")
    set_checkpointing(transformer, config.train.checkpointing)
    if machine.ranks.sequence is not None:
        transformer.divide(machine.ranks.sequence)
    return transformer


def set_checkpointing(transformer: CogVideoXTransformer, what: str) -> None:
    """Compute blocks again in the backward pass: none, full, or all but their attention (save_attention)."""
    for block in transformer.transformer_blocks:
        if what == "full":
            block.recompute()
        elif what == "save_attention":
            for part in (block.norm1, block.norm2, block.ff):
                part.recompute()


def make_learner(plan: Plan, transformer: CogVideoXTransformer) -> Learner:
    """Return the training step of the run's transformer."""
    train, ranks, vae = plan.config.train, plan.machine.ranks, VaeConfig.from_folder(plan.folder / "vae")
    image_scale = vae.image_scale if train.image_scale == "pipeline" else vae.scaling_factor
    objective = Objective(
        transformer, alphas_cumprod=alphas_cumprod(plan.scheduler), dtype=plan.machine.dtype,
        scales=Scales(video=vae.scaling_factor, image=image_scale),
    )  # fmt: skip
    update = Update(
        transformer.trainable_params(), betas=(train.beta1, train.beta2), eps=train.epsilon,
        weight_decay=train.weight_decay, max_grad_norm=train.max_grad_norm, decoupled=train.optimizer == "adamw",
        scales_loss=plan.machine.dtype == ms.float16,
        rounding_seed=plan.config.run.seed if train.master_weights == "stochastic_bf16" else None,
        ranks=ranks, mode=plan.machine.mode,
    )  # fmt: skip
    return Learner(
        objective, update, num_micros=train.gradient_accumulation, num_data_ranks=ranks.layout.num_data_ranks,
        mode=plan.machine.mode,
    )  # fmt: skip


def export(
    transformer: CogVideoXTransformer, run_folder: Path, *, method: str, ranks: Ranks,
    describe: Callable[[Path], None] = lambda folder: None,
) -> None:  # fmt: skip
    """Write `final/`: a LoRA file or a transformer folder that diffusers loads as it is.

    Divided weights are gathered one at a time, from all processes; the leading one writes, shard by shard, and lets
    `describe` add what belongs beside them.

    Raises:
        StorageError: the disk is full, read-only or failing; in all processes.
    """
    arrays = transformer.iterate_arrays() if method == "full" else iter(lora.lora_arrays(transformer).items())

    def write() -> None:
        with replace_folder(run_folder / "final") as folder:
            if method == "lora":
                file = folder / "pytorch_lora_weights.safetensors"
                save_lora(file, dict(arrays), **lora.lora_settings(transformer))
            else:
                weights.save_folder(folder / "transformer", arrays, config=transformer.config.to_dict())
            describe(folder)

    ranks.lead_through(arrays, write)
