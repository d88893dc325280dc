"""Every layout of processes against one process: loss and gradients, curves of whole runs, resuming elsewhere."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.border import whole
from cogvideox_factory.torch_engine.linear import is_low_bit, set_float8
from cogvideox_factory.torch_engine.low_bit import quantize
from cogvideox_factory.torch_engine.offload import Offload
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.sharding import distribute, reduce_gradients, total_norm
from cogvideox_factory.torch_engine.swap import Swap
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.processes import run_in
from tests.torch_engine.test_transformer import config_of, positions_for

NUM_CLIPS = 4


@dataclass(frozen=True, kw_only=True)
class Case:
    variant: str = "cogvideox1.5-5b"
    heads: int = 2
    checkpointing: str = "none"
    adapters: bool = False
    micros: int = 1
    small: bool = False
    """A base of few bits, a block whose weights come and go, activations elsewhere."""
    scaling: str | None = None
    """Of products in float8."""


def loss_and_gradients(case: Case, ranks: Ranks):
    """Return the loss of a global batch and every gradient, whole, as one process or as many make them."""
    config = config_of(case.variant, num_attention_heads=case.heads, attention_head_dim=16)
    model = CogVideoXTransformer(config)
    model.initialize(3)
    model.set_checkpointing(case.checkpointing)
    if case.small:
        quantize(model, "int8", device=torch.device("cpu"))
    if case.adapters:
        lora.add_lora(model, rank=2, alpha=2, seed=0)
        for parameter in lora.lora_parameters(model):
            parameter.data.add_(0.1)
    else:
        model.requires_grad_(True)
    set_float8(model.transformer_blocks, case.scaling)
    whole_weights = {p for p in model.parameters() if is_low_bit(p)}
    if case.small:
        whole_weights |= Swap(model.blocks, 1, device=torch.device("cpu")).parameters
    distribute(model, ranks, dtype=torch.float32, whole=whole_weights)
    if case.small:
        Offload(model.blocks, device=torch.device("cpu"), smallest=1024)
    draw = torch.Generator().manual_seed(1)
    latents = torch.randn(NUM_CLIPS, 4, config.in_channels, 8, 12, generator=draw)
    prompt = torch.randn(NUM_CLIPS, config.max_text_seq_length, config.text_embed_dim, generator=draw)
    timesteps = torch.randint(0, 1000, (NUM_CLIPS,), generator=draw)
    target = torch.randn(NUM_CLIPS, 4, config.out_channels, 8, 12, generator=draw)
    ofs = torch.full((1,), 2.0) if config.ofs_embed_dim else None
    count = ranks.layout.num_data_ranks * case.micros
    losses = []
    for micro in range(case.micros):
        reduce_gradients(model, ranks.layout, last=micro == case.micros - 1)
        own = slice(*(n * NUM_CLIPS // count for n in (ranks.data_rank + micro * ranks.layout.num_data_ranks,) * 2))
        own = slice(own.start, own.start + NUM_CLIPS // count)
        positions = positions_for(model, latents, prompt)
        out = model(latents[own], prompt[own], timesteps[own], positions=positions, ofs=ofs)
        loss = (out - target[own]).square().mean() / case.micros
        loss.backward()
        losses.append(loss.detach())
    loss = ranks.mean(torch.stack(losses).sum())
    held = [p.grad for p in model.parameters() if p.grad is not None]
    norm = total_norm([g.to_local() if ranks.mesh else g for g in held], ranks)  # pyright: ignore
    grads = {name: whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), norm.item(), {name: grad.numpy().copy() for name, grad in grads.items()}


def in_processes(cases):
    return [
        loss_and_gradients(case, make_ranks(layout, num_heads=case.heads, device_type="cpu")) for case, layout in cases
    ]


CASES = {
    2: [
        (Case(), Layout(size=2, zero=0)),
        (Case(checkpointing="save_attention", micros=2), Layout(size=2, zero=1)),
        (Case(micros=2), Layout(size=2, zero=2)),
        (Case(checkpointing="full"), Layout(size=2, zero=3)),
        (Case(adapters=True, variant="cogvideox1.5-5b-i2v"), Layout(size=2, zero=0)),
        (Case(adapters=True), Layout(size=2, zero=3)),
        (Case(adapters=True, small=True), Layout(size=2, zero=0)),
        (Case(heads=3, variant="cogvideox-2b"), Layout(size=2, zero=3, sequence=2)),
    ],
    4: [
        (Case(checkpointing="save_attention"), Layout(size=4, zero=3, sequence=2)),
        (Case(variant="cogvideox1.5-5b-i2v", heads=3), Layout(size=4, zero=0, sequence=4)),
        (Case(micros=2), Layout(size=4, zero=3, replicas=2, sequence=2)),
        (Case(adapters=True, checkpointing="full"), Layout(size=4, zero=2, sequence=2)),
        (Case(variant="cogvideox-5b-i2v"), Layout(size=4, zero=1, replicas=2)),
    ],
}  # fmt: skip


@pytest.mark.parametrize("size", CASES)
def test_loss_gradients_and_norm_equal_one_process(size, tmp_path):
    results = run_in(size, in_processes, CASES[size], folder=tmp_path)
    for number, (case, layout) in enumerate(CASES[size]):
        loss, norm, grads = loss_and_gradients(case, Ranks(layout=Layout()))
        largest = max(np.abs(grad).max() for grad in grads.values())
        for rank in range(size):
            their_loss, their_norm, their_grads = results[rank][number]
            assert their_loss == pytest.approx(loss, rel=1e-5), (case, layout)
            assert their_norm == pytest.approx(norm, rel=1e-5), (case, layout)
            assert their_grads.keys() == grads.keys()
            for name, grad in grads.items():
                allowed = 1e-5 * np.abs(grad).max() + 1e-7 * largest
                assert np.abs(their_grads[name] - grad).max() <= allowed, (case, layout, name)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"size": 4, "sequence": 3}, r"parallel\.sequence=3 does not divide the 4 process\(es\).*\[1, 2, 4\]\.$"),
        (
            {"size": 1, "sequence": 4},
            r"the 1 process\(es\)\. Use one of \[1\], or start more processes \(cogvideox launch\)\.",
        ),
        ({"size": 4, "zero": 3, "replicas": 3}, r"parallel\.replicas=3 with 4 processes"),
        ({"size": 4, "zero": 0, "replicas": 2}, r"parallel\.replicas=2 with 4 processes and parallel\.zero=0"),
        ({"size": 4, "zero": 4}, r"parallel\.zero=4"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(numbers, message):
    with pytest.raises(FactoryError, match=message):
        Layout(**numbers)
