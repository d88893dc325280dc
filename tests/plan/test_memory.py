"""Memory by formula against real tensors: weights and optimizer to the byte, activations and peak by tracing."""

import itertools
import weakref
from dataclasses import replace

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, tiny_facts
from cogvideox_factory.plan.memory import Training, need, savings
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import float8
from cogvideox_factory.torch_engine.linear import set_float8
from cogvideox_factory.torch_engine.lora import add_lora
from cogvideox_factory.torch_engine.low_bit import BASES, quantize
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.passage import plain_parts
from cogvideox_factory.torch_engine.swap import Swap
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

CPU = torch.device("cpu")
RANK = 16
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
EVERYTHING = (*ATTENTION, "ff.net.0.proj", "ff.net.2")
BLOCK = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
FRAMES, SIDE, TEXT = 3, 24, 32


def numbers(**options) -> Training:
    """Return a run of a small model in float32."""
    config = replace(
        PUBLISHED["cogvideox-5b"].transformer, num_layers=3, num_attention_heads=4, text_embed_dim=32, time_embed_dim=32
    )
    values = {"model": config, "video_tokens": FRAMES * SIDE**2 // 4, "text_tokens": TEXT, "item_bytes": 4}
    return Training(**values | {"rank": RANK, "checkpointing": "none"} | options)


def model_of(run: Training) -> CogVideoXTransformer:
    """Return the transformer that `run` is about."""
    model = CogVideoXTransformer(run.model).to({2: torch.bfloat16, 4: torch.float32}[run.item_bytes])
    if run.base != "model":
        quantize(model, run.base, device=CPU)
    if run.method == "lora":
        add_lora(model, rank=run.rank, alpha=4, seed=0, use_dora=run.use_dora, target_modules=run.adapted)
    model.set_checkpointing(run.checkpointing, run.checkpointing_layers)
    set_float8(model.transformer_blocks, "rowwise" if run.fp8 else None)
    return model


# --- weights and optimizer --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("item_bytes", [2, 4])
def test_weights_of_every_model_are_exact(variant, item_bytes):
    run = numbers(model=tiny_facts(variant).transformer, method="full", item_bytes=item_bytes)
    model = model_of(run)
    assert need(run).weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("adapted", [ATTENTION, EVERYTHING, ("ff.net.2",)])
@pytest.mark.parametrize("use_dora", [False, True])
def test_weights_and_adapters_are_exact(adapted, use_dora):
    run = numbers(adapted=adapted, use_dora=use_dora, item_bytes=2)
    model = model_of(run)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert run.num_trained == sum(p.numel() for p in trained)
    assert need(run).weights == sum(p.nbytes for p in model.parameters())


@pytest.mark.parametrize("base", BASES)
def test_a_base_of_few_bits_is_as_small_as_it_says(base):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    run = numbers(base=base, item_bytes=2)
    held = sum(part.nbytes for p in model_of(run).parameters() for part in plain_parts(p))
    assert need(run).weights == pytest.approx(held, rel=0 if base != "nf4" else 1e-3)


def test_swapped_weights_are_on_the_host():
    run = numbers(swapped_blocks=3)
    moved = Swap(model_of(run).blocks, 3, device=CPU)
    sizes = [sum(p.nbytes for p in visitor.parameters) for visitor in moved.visitors.values()]
    assert need(run).host == sum(sizes)
    assert need(numbers()).weights - need(run).weights == sizes[0]  # two of three are here


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full", "item_bytes": 4}, {"method": "full", "item_bytes": 2}, {"item_bytes": 2},
        {"method": "full", "item_bytes": 2, "stochastic": True}, {"method": "full", "optimizer": "came"},
        {"method": "full", "optimizer": "adamw8bit"}, {"method": "full", "item_bytes": 2, "optimizer": "prodigy"},
        {"item_bytes": 2, "optimizer": "came", "use_dora": True}, {"optimizer": "adamw8bit", "rank": 64},
        {"method": "full", "item_bytes": 2, "optimizer_offload": True, "average": True},
        {"item_bytes": 4, "optimizer_offload": True, "average": True},
    ],
)  # fmt: skip
def test_masters_moments_and_gradients_are_exact(options):
    run = numbers(model=tiny_facts("cogvideox-5b").transformer, **options)
    model = model_of(run)
    if run.method == "full":
        model.requires_grad_(True)
    update = Update(
        model.named_parameters(), dtype=model.proj_out.weight.dtype, device=CPU, betas=(0.9, 0.95), eps=1e-8,
        weight_decay=0.0, max_grad_norm=1.0, stochastic_bf16=run.stochastic, seed=0, optimizer=run.optimizer,
        offload=run.optimizer_offload,
    )  # fmt: skip
    for parameter in update.trained.values():
        parameter.sum().backward()
    masters = sum(m.nbytes for name, m in update.masters.items() if m is not update.trained[name])
    kept = [t for name, t in update.tensors().items() if name.startswith("optimizer.") and t.numel() > 1]
    moments = sum(t.nbytes for t in kept)
    average = sum(t.nbytes for t in Ema(update, decay=0.9).averages.values()) if run.average else 0
    of_masters, of_model = ([t.grad for t in held.values()] for held in (update.masters, update.trained))
    on_model = [*(g for g in of_model if g is not None), *update._sums.values()]
    gradients = sum({g.data_ptr(): g.nbytes for g in on_model}.values())
    told = need(run)
    assert told.gradients == gradients
    if run.optimizer_offload:
        copies = sum(g.nbytes for g in of_masters if g is not None)
        assert copies == gradients
        assert told.host == masters + moments + average + copies
        masters = moments = average = 0
    assert (told.masters, told.moments, told.average) == (masters, moments, average)


def test_what_is_divided_is_divided():
    one, many = numbers(method="full", item_bytes=2), numbers(method="full", item_bytes=2, processes=8)
    assert need(many).moments == need(one).moments
    assert need(many).weights == 2 * need(one).weights  # float32 parts are their own masters
    assert need(many).masters == 0
    zero3 = need(replace(many, zero=3))
    assert zero3.moments == need(one).moments // 8
    assert zero3.weights + zero3.gathered < need(many).weights + need(many).gathered
    assert need(replace(many, zero=3, replicas=2)).moments == need(one).moments // 4
    assert need(replace(many, zero=1)).gradients == need(many).gradients > zero3.gradients
    halves = need(replace(many, sequence=2))
    assert halves.activations == pytest.approx(need(many).activations / 2, rel=0.02)


# --- activations ------------------------------------------------------------------------------------------------------


class Trace(TorchDispatchMode):
    """Counts the bytes of tensors made within, while they live."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        there = (*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters() if p.grad is not None))
        self.seen = {part.untyped_storage().data_ptr() for tensor in there for part in plain_parts(tensor)}
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is None or storage.data_ptr() in self.seen or storage.data_ptr() in self.live:
                continue
            self.live[storage.data_ptr()] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.data_ptr())
        return out

    def _free(self, place: int) -> None:
        self.now -= self.live.pop(place, 0)


def traced(run: Training) -> tuple[int, int]:
    """Return bytes (between forward and backward, at most) of a step whose gradients are there already."""
    model = model_of(run)
    draw = torch.Generator().manual_seed(0)
    latents = torch.randn(run.batch_size, FRAMES, 16, SIDE, SIDE, generator=draw)
    prompt = torch.randn(run.batch_size, TEXT, 32, generator=draw)
    positions = model.positions(
        latent_frames=FRAMES, latent_height=SIDE, latent_width=SIDE, text_length=TEXT, device=CPU, dtype=torch.float32
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    with Trace(model) as trace:
        loss = model(latents, prompt, torch.tensor([500] * run.batch_size), positions=positions).square().mean()
        held = trace.now
        loss.backward()
    return held, trace.peak


@pytest.mark.parametrize(
    "options",
    [
        {"method": "full"}, {"method": "full", "checkpointing": "save_attention"}, {}, {"batch_size": 2},
        {"checkpointing": "full"}, {"checkpointing": "save_attention", "checkpointing_layers": 2},
        {"adapted": EVERYTHING}, {"use_dora": True}, {"adapted": ("to_out.0",), "checkpointing": "save_attention"},
    ],
)  # fmt: skip
def test_activations_and_peak(options):
    run = numbers(**options)
    held, peak = traced(run)
    told = need(run)
    rotary = 2 * 4 * 32 * (run.video_tokens + run.text_tokens)  # made before, and counted by the formula
    assert told.activations == pytest.approx(held + rotary, rel=0.1)
    assert told.activations + told.working == pytest.approx(peak + rotary, rel=0.15)


@pytest.mark.parametrize("options", [{"method": "full"}, {"adapted": EVERYTHING, "checkpointing": "full"}])
def test_float8_needs_no_more_than_is_told(options, monkeypatch):
    """Matrices are rounded where a card rounds them; its product makes nothing but the result, and so does this one."""
    monkeypatch.setattr(float8, "_in_float32", lambda left, right, *scales: torch.zeros(left.shape[0], right.shape[1]))
    run = numbers(fp8=True, **options)
    held, peak = traced(run)
    assert held == traced(replace(run, fp8=False))[0]
    assert need(run) == need(replace(run, fp8=False))
    told, rotary = need(run), 2 * 4 * 32 * (run.video_tokens + run.text_tokens)
    assert told.activations + told.working == pytest.approx(peak + rotary, rel=0.15)


def test_offloaded_activations_are_on_the_host():
    run = numbers()
    plain, moved = need(run), need(replace(run, activation_offload=True))
    assert moved.host + moved.activations == pytest.approx(plain.activations, rel=0.35)  # one block is on both sides
    assert moved.activations < plain.activations


# --- advice -----------------------------------------------------------------------------------------------------------


def real(**options) -> Training:
    """Return CogVideoX-5B at 49 x 480 x 720."""
    model = PUBLISHED["cogvideox-5b"].transformer
    return Training(**{"model": model, "video_tokens": 17550, "text_tokens": 226} | options)


def test_published_figures():
    """The older trainers give 20.8 GB for a LoRA of 5B with full checkpointing."""
    run = real(checkpointing="full")
    assert 15 < need(run).device / 1e9 < 20.8
    assert need(real(method="full", stochastic=True)).weights * 4 == pytest.approx(8 * 5.57e9, rel=0.01)


def test_the_best_saving_comes_first_and_is_what_it_says():
    run = real(checkpointing="none", batch_size=2)
    found = savings(run, accelerator=True)
    assert [saved for saved, _ in found] == sorted((saved for saved, _ in found), reverse=True)
    told = {setting: saved for saved, setting in found}
    for setting, other in (
        ("--train.checkpointing full", replace(run, checkpointing="full")),
        ("--train.swapped-blocks 42", replace(run, swapped_blocks=42)),
        ("--lora.base nf4", replace(run, base="nf4")),
    ):
        assert told[setting] == need(run).device - need(other).device > 2**30
    assert "activation-offload" in found[0][1] or "checkpointing full" in found[0][1]
    on_cpu = [setting for _, setting in savings(run, accelerator=False)]
    assert not [setting for setting in on_cpu if "offload" in setting or "swapped" in setting or "dtype" in setting]


def test_nothing_is_advised_that_is_set_already():
    run = real(
        checkpointing="full", base="nf4", swapped_blocks=42, activation_offload=True, rank=16, optimizer="adamw8bit"
    )
    assert savings(run, accelerator=True) == []
    sharded = real(
        method="full", processes=8, zero=3, sequence=8, checkpointing="full", stochastic=True, optimizer="adamw8bit"
    )
    assert [setting for _, setting in savings(sharded, accelerator=False)] == [
        "--train.method lora (and no --train.master-weights)"
    ]


@pytest.mark.parametrize(("compiled", "fp8"), [(False, False), (True, False), (False, True)])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_advised_is_allowed(method, compiled, fp8):
    """Every advice, put into the recipe it is for, makes a valid recipe."""
    advised = set()
    for optimizer, offload, stochastic, bfloat16 in itertools.product(
        ("adamw", "adam", "adamw8bit", "prodigy", "came"), (False, True), (False, True), (False, True)
    ):
        train = {"method": method, "optimizer": optimizer, "optimizer_offload": offload, "checkpointing": "none"}
        train |= {"master_weights": "stochastic_bf16"} if stochastic else {}
        train |= {"compile": "default"} if compiled else {}
        train |= {"fp8": "rowwise"} if fp8 else {}
        values = {"train": train, "data": {"root": "clips"}}
        if not is_valid(values) or (stochastic and not bfloat16):
            continue
        run = real(
            method=method, optimizer=optimizer, optimizer_offload=offload, stochastic=stochastic, bfloat16=bfloat16,
            compiled=compiled, fp8=fp8, batch_size=1,
        )  # fmt: skip
        for _, setting in savings(run, accelerator=True):
            advised.add(setting)
            words = setting.replace("-", "_").removeprefix("__").split(" (and no __train.master_weights")
            name, value = words[0].split(" ")
            section, field = name.split(".")
            kept = {key: old for key, old in values["train"].items() if len(words) == 1 or key != "master_weights"}
            changed = {**values, "train": kept}
            changed[section] = {**changed.get(section, {}), field: yaml.safe_load(value)}
            assert is_valid(changed), (setting, values)
            assert bfloat16 or "stochastic" not in setting
    assert ("--train.activation-offload True" in advised) == (not compiled)
    assert ("--lora.base nf4" in advised) == (method == "lora" and not compiled and not fp8)
    assert ("--train.master-weights stochastic_bf16" in advised) == (method == "full")


def is_valid(values) -> bool:
    try:
        check(values, source="test")
    except FactoryError:
        return False
    return True
