"""What a training run needs in memory, part by part, from numbers alone, and what each setting would save.

Activations are counted in units: one activation of the stream in the run's dtype, tokens x width of all clips of a
pass. What a block keeps for its backward pass (`torch_engine.checkpointing`, held by `tests/plan/test_memory.py`):

| | units |
|---|---|
| its input; qkv; the attention output; the stream between its halves | 1 + 3 + 1 + 1 |
| the input of trained or adapted q, k, v | 1 |
| the hidden columns of the feed-forward: trained, or checkpointed; frozen | 4; 2.75 |
| with adapters on the feed-forward: the normed stream, hidden, GELU of it | up 1, 4, down 4 |

The last layers after the blocks keep the stream, its norm and, trained, two more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from math import prod
from typing import Literal

from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.plan.optimizer import optimizer_memory

MATRIX_BYTES = {
    "int8": (1, 5),
    "fp8": (1, 4),
    "nf4": (0.5 + 1 / 64, 0),
}
"""Of a base of few bits: bytes a weight, and bytes a row besides."""

FROZEN_KEPT = 11 / 16
"""Part of a feed-forward's hidden columns kept when no weight of it is trained, for 5 % more matrix products."""
_LIVE = 2
"""Blocks whose activations or weights are on the device at a time when the others' are in host memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """One training run as numbers; sizes of a clip are those of the largest."""

    model: TransformerConfig
    video_tokens: int
    text_tokens: int
    batch_size: int = 1
    """Clips of one forward pass in one process."""
    item_bytes: int = 2
    """Of a value in the run's dtype."""
    bfloat16: bool = True
    """With two bytes: the dtype is that one, not float16."""
    compiled: bool = False
    """Blocks are compiled."""
    method: Literal["lora", "full"] = "lora"
    rank: int = 64
    adapted: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Linear layers of each block that carry an adapter, by the endings of their names."""
    use_dora: bool = False
    base: str = "model"
    fp8: bool = False
    """Products of the blocks' linear layers are made in float8."""
    checkpointing: str = "save_attention"
    checkpointing_layers: int | None = None
    activation_offload: bool = False
    swapped_blocks: int = 0
    optimizer: str = "adamw"
    optimizer_offload: bool = False
    """float32 weights, their averages and what the optimizer remembers are in host memory, gradients there too."""
    stochastic: bool = False
    """Weights, gradients and moments in bfloat16 (full fine-tuning)."""
    average: bool = False
    """A moving average of what is trained."""
    processes: int = 1
    replicas: int = 1
    sequence: int = 1
    zero: int = 0

    @property
    def num_checkpointed(self) -> int:
        """Layers that recompute."""
        if self.checkpointing == "none":
            return 0
        return min(self.checkpointing_layers or self.model.num_layers, self.model.num_layers)

    @property
    def num_trained(self) -> int:
        """Parameters that are trained."""
        return sum(map(prod, self.trained_shapes))

    @property
    def trained_shapes(self) -> list[tuple[int, ...]]:
        """Shapes of what is trained; all vectors of a model count as one."""
        if self.method == "full":
            matrices = _shapes_of_matrices(self.model)
            return [*matrices, (self.model.num_parameters - sum(map(prod, matrices)),)]
        shapes = []
        for rows, columns in (linear_sizes(self.model)[name] for name in self._adapted):
            shapes += [(self.rank, columns), (rows, self.rank)] + ([(rows,)] if self.use_dora else [])
        return self.model.num_layers * shapes

    @property
    def _adapted(self) -> list[str]:
        return [name for name in linear_sizes(self.model) if any(f".{name}".endswith(f".{a}") for a in self.adapted)]

    def adapts(self, name: str) -> bool:
        """Whether the linear layer `name` of a block carries an adapter."""
        return self.method == "lora" and name in self._adapted


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes of each part in one process, on its device; `host` is beside it."""

    weights: int
    """The model's, adapters included."""
    gathered: int
    """What zero and mixed precision make of divided weights for computing."""
    masters: int
    """float32 copies of half-precision weights."""
    moments: int
    gradients: int
    average: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    working: int
    """A block while it is recomputed and while its gradients are made, an estimate."""
    host: int
    """In host memory: swapped weights, offloaded activations, an offloaded optimizer with gradients and averages."""

    @property
    def device(self) -> int:
        """All but `host`."""
        return sum(getattr(self, field.name) for field in fields(self)) - self.host


def linear_sizes(model: TransformerConfig) -> dict[str, tuple[int, int]]:
    """Return (outputs, inputs) of the linear layers of a block by their diffusers names."""
    d, t = model.width, model.time_embed_dim
    attention = {f"attn1.{name}": (d, d) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    feed_forward = {"ff.net.0.proj": (4 * d, d), "ff.net.2": (d, 4 * d)}
    return {"norm1.linear": (6 * d, t), "norm2.linear": (6 * d, t)} | attention | feed_forward


def _shapes_of_matrices(model: TransformerConfig) -> list[tuple[int, ...]]:
    """Return the shapes of a transformer's matrices, as trained: q, k and v are one, and norms of all blocks."""
    d, t = model.width, model.time_embed_dim
    patch = model.patch_size**2 * (model.patch_size_t or 1)
    block = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    ends = [(d, model.in_channels * patch), (d, model.text_embed_dim), (2 * d, t), (model.out_channels * patch, d)]
    times = [(t, d), (t, t)] + ([(model.ofs_embed_dim,) * 2] * 2 if model.ofs_embed_dim else [])
    norms = [(2 * model.num_layers, d)] * 2 if model.norm_elementwise_affine else []
    return [*block * model.num_layers, (12 * d * model.num_layers, t), *norms, *ends, *times]


def need(run: Training) -> Need:
    """Return what one process of `run` needs."""
    shards = run.processes // run.replicas if run.zero else 1
    kept_float32 = run.method == "full" and run.processes > 1 and not run.stochastic
    stored = 4 if kept_float32 else run.item_bytes
    swapped = _swapped_bytes(run)
    on_device = round(_model_bytes(run, stored) / shards) - swapped
    cost = optimizer_memory(
        run.optimizer, run.trained_shapes, half=run.method == "full" and stored == 2, stochastic=run.stochastic,
        offload=run.optimizer_offload,
    )  # fmt: skip
    adapters = cost.weights // shards if run.method == "lora" else 0
    masters, moments = cost.masters // shards, cost.state // shards
    average = 4 * run.num_trained // shards if run.average else 0
    activations, host = _activations(run)
    if run.optimizer_offload:
        host += masters + moments + average + cost.host_gradients // shards
        masters = moments = average = 0
    return Need(
        weights=on_device + adapters, gathered=_gathered(run, shards, stored), masters=masters, moments=moments,
        gradients=cost.gradients // (1 if run.zero == 1 else shards), average=average,
        activations=activations, working=_working(run), host=host + _swapped_bytes(run, here=0),
    )  # fmt: skip


def peak_of_one_pass(run: Training) -> int:
    """Return the bytes on the device of a step of one pass: a layer's gradients come as its activations go."""
    parts = need(run)
    return parts.device - min(parts.activations, parts.gradients)


def savings(run: Training, *, accelerator: bool) -> list[tuple[int, str]]:
    """Return (bytes saved on the device, what to set) for each single change that saves some, the most first."""
    now = need(run).device
    found = [(now - need(other).device, setting) for setting, other in _changes(run, accelerator)]
    return sorted((item for item in found if item[0] > 0), reverse=True)


def in_words(need: Need) -> str:
    """Return the line about memory that a run begins with."""
    parts = {
        "weights": need.weights + need.gathered, "optimizer": need.masters + need.moments + need.average,
        "gradients": need.gradients, "activations": need.activations, "a block at work": need.working,
    }  # fmt: skip
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    host = f"; {need.host / 2**30:.2f} GiB of host memory" if need.host else ""
    return f"training needs about {need.device / 2**30:.2f} GiB a process: {listed}{host}"


# --- activations ------------------------------------------------------------------------------------------------------


def _unit(run: Training) -> int:
    """Return the bytes of one activation of the stream in one process."""
    tokens = -(-(run.video_tokens + run.text_tokens) // run.sequence)
    return run.batch_size * tokens * run.model.width * run.item_bytes


def _kept_units(run: Training, checkpointing: str) -> float:
    """Return the units that a block keeps between forward and backward, rows' statistics apart."""
    if checkpointing != "none":
        return {"full": 1, "save_attention": 2}[checkpointing]
    return 6 + _input_units(run) + _hidden_units(run, checkpointed=False) + _low_rank_units(run)


def _input_units(run: Training) -> int:
    attention = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
    return int(run.method == "full" or any(run.adapts(name) for name in attention))


def _hidden_units(run: Training, *, checkpointed: bool) -> float:
    up, down = run.adapts("ff.net.0.proj"), run.adapts("ff.net.2")
    if up or down:
        return up + 4 + 4 * down
    return 4 if checkpointed or run.method == "full" else 4 * FROZEN_KEPT


def _low_rank_units(run: Training) -> float:
    """Return what adapters keep: each target's inner activation, and with DoRA its output."""
    sizes, width = linear_sizes(run.model), run.model.width
    names = [name for name in sizes if run.adapts(name) and not name.startswith("norm")]
    return sum(run.rank + (sizes[name][0] if run.use_dora else 0) for name in names) / width


def _row_bytes(run: Training) -> int:
    """Return the bytes a block keeps a token besides: log-sum-exp of each head, mean and deviation of two norms."""
    return 4 * run.model.num_attention_heads + 4 * 4


def _activations(run: Training) -> tuple[int, int]:
    """Return what is kept (on the device, on the host)."""
    model, u = run.model, _unit(run)
    tokens = u // (model.width * run.item_bytes)
    recomputing = _kept_units(run, run.checkpointing) * u
    recomputing += 4 * model.num_attention_heads * tokens * (run.checkpointing == "save_attention")
    everything = _kept_units(run, "none") * u + _row_bytes(run) * tokens
    blocks = [recomputing] * run.num_checkpointed
    blocks += [everything] * (model.num_layers - run.num_checkpointed)
    if run.method == "lora" and not run.num_checkpointed:
        blocks[0] -= u  # nothing before the first block is trained, so its input needs no gradient
    video_rows = run.video_tokens / (run.video_tokens + run.text_tokens) * tokens
    stream = video_rows * model.width * run.item_bytes
    patch = model.patch_size**2 * (model.patch_size_t or 1)
    outside = u + (3 if run.method == "full" else 1) * stream
    outside += 4 * video_rows * run.sequence * model.out_channels * patch  # the error, of all rows in every process
    if run.method == "full":  # the input of the patch projection and of the text's
        outside += run.item_bytes * (video_rows * model.in_channels * patch)
        outside += run.item_bytes * (tokens - video_rows) * model.text_embed_dim
    if model.use_rotary_positional_embeddings:
        outside += 4 * model.attention_head_dim * (tokens // max(run.batch_size, 1))
    if not run.activation_offload:
        return round(sum(blocks) + outside), 0
    return round(sum(sorted(blocks)[-_LIVE:]) + outside), round(sum(blocks[:-1]))


def _working(run: Training) -> int:
    """Return an estimate of what one block's backward pass takes beside what was kept.

    Matrices of few bits are whole for the time of a product, with eight bytes a weight while they are made.
    A checkpointed block is first made again. While it is, blocks that kept everything are gone already, so the larger
    of the two moments counts.
    """
    model, u = run.model, _unit(run)
    matrix = 4 * model.width**2 * (2 if run.item_bytes == 2 else 4)  # the feed-forward's gradient, where it is trained
    up_or_down = run.adapts("ff.net.0.proj") or run.adapts("ff.net.2")
    if run.method == "full":
        gradients = max(8 * u + matrix, 6 * u + 3 * matrix)
        keeping, recomputing = gradients, gradients
    else:
        keeping, recomputing = (5 * u, 5 * u) if up_or_down else (12 * u, 7.5 * u)
        whole = 0 if run.base == "model" else 4 * model.width**2 * (2 * run.item_bytes + 8)
        keeping, recomputing = keeping + whole, recomputing + whole
    if not run.num_checkpointed:
        return round(keeping)
    kept = _kept_units(replace(run, checkpointing="none"), "none")
    again = kept - _kept_units(run, run.checkpointing) + (
        _hidden_units(run, checkpointed=True) - _hidden_units(run, checkpointed=False)
    )  # fmt: skip
    gone = (model.num_layers - run.num_checkpointed) * kept * u
    recomputing += again * u - gone
    return round(max(recomputing, keeping) if run.num_checkpointed < model.num_layers else recomputing)


# --- weights ----------------------------------------------------------------------------------------------------------


def _matrices(model: TransformerConfig) -> tuple[int, int]:
    """Return (weights, rows) of the matrices of one block; the modulation is outside the blocks."""
    return 12 * model.width**2, 9 * model.width


def _matrix_bytes(run: Training, item_bytes: int) -> int:
    weights, rows = _matrices(run.model)
    if run.base == "model":
        return weights * item_bytes
    each, a_row = MATRIX_BYTES[run.base]
    return round(weights * each + rows * a_row)


def _model_bytes(run: Training, item_bytes: int) -> int:
    model = run.model
    matrices = _matrices(model)[0] * model.num_layers
    total = (model.num_parameters - matrices) * item_bytes + _matrix_bytes(run, item_bytes) * model.num_layers
    if model.use_learned_positional_embeddings:
        frames = (model.sample_frames - 1) // model.temporal_compression_ratio + 1
        native = frames * (model.sample_height // model.patch_size) * (model.sample_width // model.patch_size)
        total += (model.max_text_seq_length + native) * model.width * item_bytes
    return total


def _swapped_bytes(run: Training, *, here: int = _LIVE) -> int:
    """Return the bytes of swapped blocks when `here` of them are on the device."""
    vectors = _matrices(run.model)[1] + 4 * run.model.attention_head_dim  # biases; norms of q and k
    block = _matrix_bytes(run, run.item_bytes) + vectors * run.item_bytes
    return max(run.swapped_blocks - here, 0) * block


def _gathered(run: Training, shards: int, stored: int) -> int:
    if run.processes == 1 or (shards == 1 and stored == run.item_bytes):
        return 0
    if run.zero < 3:
        return run.model.num_parameters * run.item_bytes
    model, block = run.model, _matrices(run.model)[0]
    modulation = model.num_layers * 2 * 6 * model.width * model.time_embed_dim  # whole only before and after the blocks
    rest = model.num_parameters - model.num_layers * block - modulation
    return (rest + max(_LIVE * block, modulation)) * run.item_bytes


# --- what would help --------------------------------------------------------------------------------------------------


def _changes(run: Training, accelerator: bool) -> Iterator[tuple[str, Training]]:
    """Yield (setting, the run with it) for all that could be set otherwise."""
    layers = run.model.num_layers
    for mode in ("save_attention", "full"):
        if run.checkpointing not in (mode, "full"):
            yield f"--train.checkpointing {mode}", replace(run, checkpointing=mode)
    if run.num_checkpointed not in (0, layers):
        yield "no --train.checkpointing-layers", replace(run, checkpointing_layers=None)
    if run.batch_size > 1:
        half = run.batch_size // 2
        yield (
            f"--train.batch-size for {half} clip(s) a process, not {run.batch_size} (and more gradient_accumulation)",
            replace(run, batch_size=half),
        )
    if run.item_bytes == 4 and accelerator:
        yield "--run.dtype bfloat16", replace(run, item_bytes=2)
    if accelerator and not run.activation_offload and not run.compiled:
        yield "--train.activation-offload True", replace(run, activation_offload=True)
    yield from _changes_of_optimizer(run, accelerator)
    if run.method == "full":
        also = " (and no --train.master-weights)" if run.stochastic else ""
        yield f"--train.method lora{also}", replace(run, method="lora", stochastic=False)
    if run.method == "lora" and not run.zero:
        for base in MATRIX_BYTES:
            if run.base == "model" and not run.compiled and not run.fp8:
                yield f"--lora.base {base}", replace(run, base=base)
        if accelerator and run.swapped_blocks < layers:
            yield f"--train.swapped-blocks {layers}", replace(run, swapped_blocks=layers)
    if run.method == "lora" and run.rank > 16:
        yield f"--lora.rank {run.rank // 2}", replace(run, rank=run.rank // 2)
    if run.processes > 1 and run.zero < 3 and run.base == "model" and not run.swapped_blocks:
        yield "--parallel.zero 3", replace(run, zero=3)
    if run.processes % (2 * run.sequence) == 0:
        yield f"--parallel.sequence {2 * run.sequence}", replace(run, sequence=2 * run.sequence)


def _changes_of_optimizer(run: Training, accelerator: bool) -> Iterator[tuple[str, Training]]:
    if run.optimizer_offload:  # which is for float32 masters of plain optimizers
        return
    is_half = run.method == "full" and run.item_bytes == 2 and run.bfloat16
    if is_half and not run.stochastic and run.optimizer in ("adamw", "adamw8bit"):
        yield "--train.master-weights stochastic_bf16", replace(run, stochastic=True)
    if run.optimizer == "adamw":
        yield "--train.optimizer adamw8bit", replace(run, optimizer="adamw8bit")
    if accelerator and run.optimizer in ("adam", "adamw") and not run.stochastic:
        yield "--train.optimizer-offload True", replace(run, optimizer_offload=True)
