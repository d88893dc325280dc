"""Figures of a block that no machine's speed changes: operations, memory kept for the backward pass, attention calls.

What diffusers' block costs by the same counts (reference: the project's performance notes): 122 operations, 23.1 units
kept with trained weights, 12.4 with frozen ones, 2 attention forwards under checkpointing.
"""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, tiny_facts
from cogvideox_factory.torch_engine import attention, linear, rotary
from cogvideox_factory.torch_engine.block import VECTORS_PER_BLOCK, Block
from cogvideox_factory.torch_engine.lora import add_lora
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

MAX_OPERATIONS, MAX_UNITS, MAX_UNITS_FROZEN = 60, 16, 9


class Count(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[str(func)] += 1
        return func(*args, **(kwargs or {}))


def block_and_inputs(dtype=torch.float32, *, heads=2, text=16, video=48, batch=1):
    """Return a block, and arguments that all ask for gradients."""
    config = replace(PUBLISHED["cogvideox-5b"].transformer, num_attention_heads=heads, num_layers=1)
    draw = torch.Generator().manual_seed(0)
    block = Block(config)
    for parameter in block.parameters():
        parameter.data.copy_(0.05 * torch.randn(parameter.shape, generator=draw))
    vector = (config.width,) if batch == 1 else (batch, 1, config.width)
    x = torch.randn(batch, text + video, config.width, generator=draw).to(dtype).requires_grad_()
    vectors = tuple(torch.randn(vector, generator=draw).to(dtype).requires_grad_() for _ in range(VECTORS_PER_BLOCK))
    angles = torch.randn(text + video, 1, 32, generator=draw)
    return block.to(dtype), (x, vectors, (angles.cos(), angles.sin()), text)


# --- operations -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("grad", [True, False])
def test_operations_of_a_forward(batch, dtype, grad, monkeypatch):
    """Views included; bfloat16 as on a machine with the instructions."""
    monkeypatch.setattr(linear, "_SOFTWARE", set())
    block, args = block_and_inputs(dtype, batch=batch)
    with torch.set_grad_enabled(grad), Count() as count:
        block(*args)
    assert count.calls["cogvideox.attention_forward.default"] == 1
    assert sum(count.calls.values()) <= MAX_OPERATIONS, count.calls


def test_operations_of_a_forward_and_inside_our_attention_operator(monkeypatch):
    """The stricter count: a dispatch count sees the operator, not the kernel and the views in it."""
    monkeypatch.setattr(rotary, "attention_forward", attention.attention_forward._init_fn)
    block, args = block_and_inputs()
    with Count() as count:
        block(*args)
    assert count.calls["aten._scaled_dot_product_flash_attention_for_cpu.default"] == 1
    assert sum(count.calls.values()) <= MAX_OPERATIONS, count.calls


def test_modulation_is_one_product_for_all_blocks():
    model = CogVideoXTransformer(tiny_facts("cogvideox-5b").transformer)
    with Count() as count:
        model.modulation(torch.randn(2, 32))
    assert count.calls["aten.addmm.default"] == 1


# --- memory -----------------------------------------------------------------------------------------------------------


def saved_units(block: torch.nn.Module, args) -> float:
    """Return the bytes autograd keeps of a forward, parameters apart, in activations [S, D] of the stream.

    A storage counts once, however many nodes keep it. Everything else counts: statistics, vectors, rotary tables.
    """
    parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(*args)
    assert out.requires_grad
    return sum(kept.values()) / args[0].nbytes


REAL = {"heads": 12, "text": 226, "video": 1350}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_kept_with_trained_weights(dtype, record_property):
    units = saved_units(*block_and_inputs(dtype, **REAL))
    record_property("saved_units", units)
    assert units <= MAX_UNITS
    assert units == pytest.approx(11.2, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_units_kept_with_frozen_weights(dtype, record_property):
    block, (x, vectors, *rest) = block_and_inputs(dtype, **REAL)
    block.requires_grad_(False)
    units = saved_units(block, (x, tuple(v.detach() for v in vectors), *rest))
    record_property("saved_units", units)
    assert units <= MAX_UNITS_FROZEN


def test_units_kept_with_lora_on_attention(record_property):
    """The adapters add the input of q, k and v, 1 unit, and their own small activations."""
    config = replace(PUBLISHED["cogvideox-5b"].transformer, num_attention_heads=12, num_layers=1, text_embed_dim=32)
    model = CogVideoXTransformer(config).bfloat16()
    add_lora(model, rank=64, alpha=64, seed=0)
    block, (x, vectors, *rest) = block_and_inputs(torch.bfloat16, **REAL)
    block.ff.requires_grad_(False)
    model.transformer_blocks[0].ff = block.ff
    units = saved_units(model.transformer_blocks[0], (x, tuple(v.detach() for v in vectors), *rest))
    record_property("saved_units", units)
    assert units <= MAX_UNITS_FROZEN + 1.5


# --- attention under checkpointing ------------------------------------------------------------------------------------


@pytest.fixture
def kernel_calls(monkeypatch):
    """Count what the attention kernel really does, below operator and dispatcher."""
    calls = Counter()
    attention.set_attention_backend(None)

    def counted(name):
        backend = attention._BACKENDS[name]

        def forward(*args):
            calls["forward"] += 1
            return backend.forward(*args)

        def backward(*args):
            calls["backward"] += 1
            return backend.backward(*args)

        return replace(backend, forward=forward, backward=backward)

    for name in ("cpu", "math"):
        monkeypatch.setitem(attention._BACKENDS, name, counted(name))
    yield calls
    attention.set_attention_backend(None)


def train_step(mode: str, layers: int | None = None, *, frozen=False, dtype=torch.float32, seen: Counter | None = None):
    """Return loss and gradients of one step of a model of two blocks."""
    model = CogVideoXTransformer(tiny_facts("cogvideox-5b").transformer).to(dtype)
    if frozen:
        add_lora(model, rank=4, alpha=4, seed=0)
        for parameter in model.parameters():
            if parameter.requires_grad:  # B too, which starts at zero
                parameter.data.normal_(generator=torch.Generator().manual_seed(1))
    model.set_checkpointing(mode, layers)
    draw = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 3, 16, 8, 12, generator=draw), torch.randn(1, 16, 32, generator=draw)
    positions = model.positions(
        latent_frames=3, latent_height=8, latent_width=12, text_length=16, device="cpu", dtype=dtype
    )
    with Count() as count:
        out = model(latents.to(dtype), prompt.to(dtype), torch.tensor([500]), positions=positions)
        loss = out.float().square().mean()
        loss.backward()
    if seen is not None:
        seen.update(count.calls)
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("backend", ["cpu", "math"])
@pytest.mark.parametrize(("mode", "forwards"), [("none", 1), ("save_attention", 1), ("full", 2)])
def test_attention_forwards_a_layer_and_step(mode, forwards, backend, frozen, kernel_calls):
    """Full checkpointing runs it twice, which shows that the count would notice."""
    attention.set_attention_backend(backend)
    dispatched: Counter = Counter()
    train_step(mode, frozen=frozen, seen=dispatched)
    num_layers = 2
    assert kernel_calls == {"forward": forwards * num_layers, "backward": num_layers}
    assert dispatched["cogvideox.attention_forward.default"] == forwards * num_layers
    assert dispatched["cogvideox.attention_backward.default"] == num_layers


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", ["full", "save_attention"])
def test_no_mode_changes_a_bit(mode, dtype, frozen):
    expected_loss, expected = train_step("none", frozen=frozen, dtype=dtype)
    loss, grads = train_step(mode, frozen=frozen, dtype=dtype)
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        # A frozen feed-forward multiplies part of its columns out again, in products of another size.
        same = torch.equal(grad, expected[name]) if not frozen else torch.allclose(grad, expected[name], rtol=1e-6)
        assert same or (grad - expected[name]).norm() <= 1e-6 * expected[name].norm(), name


@pytest.mark.parametrize("mode", ["full", "save_attention"])
def test_layers_may_differ_and_change_no_bit(mode, kernel_calls):
    expected_loss, expected = train_step("none")
    kernel_calls.clear()
    loss, grads = train_step(mode, 1)
    assert kernel_calls["forward"] == (3 if mode == "full" else 2)  # the first of two layers alone runs again
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(grad, expected[name]) for name, grad in grads.items())


@pytest.mark.parametrize("layers", [0, 3])
def test_no_more_layers_recompute_than_there_are(layers):
    with pytest.raises(FactoryError, match=f"checkpointing_layers={layers}: this model has 2 layers. Use 1 to 2"):
        train_step("full", layers)


def test_a_recomputed_block_leaves_its_last_product_out():
    counts = {}
    for mode in ("none", "full"):
        counts[mode] = Counter()
        train_step(mode, seen=counts[mode])
    again = counts["full"]["aten.addmm.default"] - counts["none"]["aten.addmm.default"]
    assert again == 3 * 2  # qkv, out and up, but not down, of two blocks


@pytest.mark.parametrize(("mode", "units"), [("full", 1), ("save_attention", 2)])
def test_memory_held_between_forward_and_backward(mode, units):
    """What lives as long as the graph: the block's input and, in one mode, the attention output."""
    block, args = block_and_inputs(**REAL)
    block.set_checkpointing(mode)
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(out):
                storage = tensor.untyped_storage()
                made.append((weakref.ref(tensor), storage.data_ptr(), storage.nbytes()))
            return out

    with Watch():
        out = block(*args)
    lent = {t.untyped_storage().data_ptr() for t in (out, args[0], *args[1], *args[2], *block.parameters())}
    held = {(pointer, size) for tensor, pointer, size in made if tensor() is not None and pointer not in lent}
    small = 0.1  # log-sum-exp
    assert sum(size for _, size in held) / args[0].nbytes == pytest.approx(units - 1, abs=small)


# --- compilers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["none", "save_attention"])
def test_a_block_compiles_whole_and_runs_attention_once(mode, kernel_calls):
    block, args = block_and_inputs()
    block(*args).square().sum().backward()
    expected, args[0].grad = args[0].grad, None
    block.set_checkpointing(mode)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    kernel_calls.clear()
    compiled(*args).square().sum().backward()
    assert kernel_calls == {"forward": 1, "backward": 1}
    torch.testing.assert_close(args[0].grad, expected, rtol=1e-5, atol=1e-5)
