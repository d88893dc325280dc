"""A token stream over several ranks against the same stream in one process: output, gradients, collectives."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.offload import Offload
from cogvideox_factory.torch_engine.ranks import make_ranks
from cogvideox_factory.torch_engine.sequence_parallel import RING_OP, ulysses_degree
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.processes import run_in
from tests.torch_engine.test_transformer import config_of, example, positions_for


class Counted(TorchDispatchMode):
    """Counts collectives and what they send."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple[str, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "all_to_all" in str(func):
            self.calls.append((str(func), args[0].numel() * args[0].element_size()))
        return func(*args, **(kwargs or {}))


def model_and_input(variant: str, heads: int, text: int, checkpointing: str, adapters: bool, width: int = 12):
    config = config_of(variant, num_attention_heads=heads, attention_head_dim=16, max_text_seq_length=text)
    model = CogVideoXTransformer(config)
    model.initialize(3)
    model.set_checkpointing(checkpointing)
    if adapters:
        # On all there is: of text and video, too, of which a rank may have no row.
        lora.add_lora(model, rank=2, alpha=2, seed=0, target_modules=[".*"])
        for parameter in lora.lora_parameters(model):
            parameter.data.add_(0.1)  # B is zero at first, and then A has no gradient
    else:
        model.requires_grad_(True)
    return model, example(config, frames=4, text=text, width=width)


def gradients(model, inputs):
    latents, prompt, timesteps, ofs = inputs
    out = model(latents, prompt, timesteps, positions=positions_for(model, latents, prompt), ofs=ofs)
    target = torch.linspace(-1, 1, out.numel()).view_as(out)
    loss = (out - target).square().mean()
    loss.backward()
    return out.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def one_rank(cases):
    """Return each case's output, its gradients as a reduction would give them, and its collectives."""
    return [one_case(case, layout) for case, layout in cases]


def one_case(case, layout):
    model, inputs = model_and_input(*case)
    ranks = make_ranks(layout, num_heads=model.config.num_attention_heads, device_type="cpu")
    model.sequence = ranks.sequence
    counted = Counted()
    with torch.no_grad(), counted:
        latents, prompt, timesteps, ofs = inputs
        model(latents, prompt, timesteps, positions=positions_for(model, latents, prompt), ofs=ofs)
    out, grads = gradients(model, inputs)
    for grad in grads.values():
        dist.all_reduce(grad)
        grad /= layout.size
    return out, grads, counted.calls


# variant, heads, text tokens, checkpointing, LoRA; ring. No number of tokens here divides by 4.
CASES = {
    2: [
        (("cogvideox1.5-5b", 4, 16, "none", False), None),
        (("cogvideox-2b", 3, 17, "save_attention", False), None),
    ],
    4: [
        (("cogvideox1.5-5b", 4, 15, "none", False), None),
        (("cogvideox1.5-5b-i2v", 6, 13, "full", False), None),
        (("cogvideox-5b", 4, 15, "save_attention", True), 2),
        (("cogvideox-5b-i2v", 4, 15, "none", True), None),
        (("cogvideox1.5-5b", 5, 3, "full", False), 4),
    ],
}


@pytest.mark.parametrize("size", CASES)
def test_equals_one_process(size, tmp_path):
    cases = [(case, Layout(size=size, sequence=size, ring=ring)) for case, ring in CASES[size]]
    results = run_in(size, one_rank, cases, folder=tmp_path)
    for number, (case, layout) in enumerate(cases):
        out, grads = gradients(*model_and_input(*case))
        largest = max(grad.abs().max() for grad in grads.values())
        for rank in range(size):
            their_out, their_grads, calls = results[rank][number]
            assert (their_out - out).abs().max() <= 1e-5 * out.abs().max(), case
            assert their_grads.keys() == grads.keys()
            for name, grad in grads.items():  # the bias of k has none but rounding: softmax does not see it
                assert (their_grads[name] - grad).abs().max() <= 1e-5 * grad.abs().max() + 1e-7 * largest, (case, name)
            if ulysses_degree(size, case[1], layout.ring) == size:
                assert_two_all_to_alls_a_layer(calls, case, size)


def assert_two_all_to_alls_a_layer(calls, case, size):
    """q, k and v go out in one, the output comes back in one; a rank's part of each is (S / P) d numbers."""
    model, (latents, prompt, *_) = model_and_input(*case)
    tokens = prompt.shape[1] + positions_for(model, latents, prompt).num_video_tokens
    layers, rows = model.config.num_layers, -(-tokens // size)
    assert tokens % size or size == 2
    assert len(calls) == 2 * layers
    assert sum(sent for _, sent in calls) == layers * 4 * len(latents) * rows * model.config.width * 4


class CountedRings(TorchDispatchMode):
    """Counts forward passes of attention on a ring."""

    num_forwards = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.num_forwards += func is RING_OP
        return func(*args, **(kwargs or {}))


def step_on_a_ring(offloaded: bool):
    """Return layers, forward passes of attention in a step, and gradients, with attention kept."""
    model, inputs = model_and_input("cogvideox-5b", 4, 15, "save_attention", True)
    ranks = make_ranks(Layout(size=2, sequence=2, ring=2), num_heads=4, device_type="cpu")
    model.sequence = ranks.sequence
    if offloaded:
        Offload(model.blocks, device=torch.device("cpu"), smallest=1)
    with CountedRings() as counted:
        _, grads = gradients(model, inputs)
    return len(model.blocks), counted.num_forwards, grads


def both_on_a_ring():
    return [step_on_a_ring(offloaded) for offloaded in (False, True)]


def test_attention_on_a_ring_runs_once_also_where_it_waits_on_the_host(tmp_path):
    for (layers, plain, grads), (_, moved, moved_grads) in run_in(2, both_on_a_ring, folder=tmp_path):
        assert plain == moved == layers > 1
        assert all(torch.equal(moved_grads[name], grad) for name, grad in grads.items())


@pytest.mark.parametrize(
    ("size", "heads", "degree"), [(2, 30, 2), (4, 30, 2), (8, 30, 2), (8, 48, 8), (6, 30, 6), (7, 30, 1)]
)
def test_as_many_ranks_as_can_divide_the_heads(size, heads, degree):
    assert ulysses_degree(size, heads) == degree


def test_a_ring_that_does_not_fit_is_refused_with_those_that_do():
    with pytest.raises(FactoryError, match=r"parallel\.ring=1 with parallel\.sequence=4.*2 or 4"):
        ulysses_degree(4, 30, 1)
