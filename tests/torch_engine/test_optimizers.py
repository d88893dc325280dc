"""Every optimizer against the package it is known from, and what `Update` and a checkpoint ask of it."""

import json

import pytest
import torch
from came_pytorch import CAME
from prodigyopt import Prodigy
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torchao.optim import AdamW8bit

from cogvideox_factory.checkpoints import checkpoint_folder
from cogvideox_factory.plan.optimizer import optimizer_memory
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import checkpoint, low_precision
from cogvideox_factory.torch_engine.border import whole
from cogvideox_factory.torch_engine.low_precision import Code
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.optimizers import make_optimizer
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.sharding import like
from tests.torch_engine.host_reads import HostReads
from tests.torch_engine.processes import run_in

CPU = torch.device("cpu")
NAMES = ["adamw", "adam", "adamw8bit", "prodigy", "came"]
RATES = {"prodigy": 1.0}
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1
# Matrices with whole blocks of 256, with a rest, small; a vector; and fewer rows than processes.
SHAPES = {"blocks": (17, 512), "rest": (12, 400), "small": (5, 7), "vector": (300,), "low": (2, 64)}
MODES = [*[(name, "float32") for name in NAMES], ("adamw", "stochastic"), ("adamw8bit", "stochastic")]


def drawn(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def module(shapes=SHAPES, *, seed=0, dtype=torch.float32) -> nn.Module:
    """Return weights that stand alone, one of them all zero as a LoRA's are."""
    own = nn.Module()
    for number, (name, shape) in enumerate(shapes.items()):
        value = torch.zeros(shape) if name == "small" else drawn(100 * seed + number, shape)
        own.register_parameter(name, nn.Parameter(value.to(dtype)))
    return own


def update_of(own: nn.Module, name: str, mode: str = "float32", **options) -> Update:
    return Update(
        own.named_parameters(), dtype=torch.float32, device=CPU, betas=BETAS, eps=1e-8, weight_decay=WEIGHT_DECAY,
        max_grad_norm=options.pop("max_grad_norm", 1e9), stochastic_bf16=mode == "stochastic", seed=1,
        optimizer=name, **options,
    )  # fmt: skip


def gradient(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """Return a gradient with a lasting direction and columns of very different sizes, as training has them."""
    lasting, fresh = drawn(len(name), shape), drawn(1000 * step + len(name), shape)
    return (lasting + 0.5 * fresh) * torch.logspace(-4, 0, shape[-1])


def move(own: nn.Module, update: Update, name: str, steps, *, factor=1.0) -> None:
    """Take steps along gradients that depend on nothing else."""
    for step in steps:
        for key, p in own.named_parameters():
            grad = (gradient(key, tuple(p.shape), step) * factor).to(p.dtype)
            if isinstance(p, DTensor):
                grad = like(part_of(grad, p), p)
            p.grad = grad
        update.step(RATES.get(name, 1e-2))


def part_of(x: torch.Tensor, p: DTensor) -> torch.Tensor:
    """Return the rows of `x` that this process holds of `p`."""
    shards = p.device_mesh["shards"]
    chunks = x.chunk(shards.size())
    rank = shards.get_local_rank()
    return chunks[rank].contiguous() if rank < len(chunks) else x[:0]


# --- the packages they are known from ---------------------------------------------------------------------------------


def reference(name: str, weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    rate, rest = RATES.get(name, 1e-2), {"betas": BETAS, "weight_decay": WEIGHT_DECAY}
    if name in ("adam", "adamw"):
        return {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[name](weights, lr=rate, fused=False, **rest)
    if name == "adamw8bit":
        return AdamW8bit(weights, lr=rate, **rest)
    if name == "prodigy":
        return Prodigy(weights, lr=rate, use_bias_correction=True, safeguard_warmup=True, **rest)
    return CAME(weights, lr=rate, **rest | {"betas": (*BETAS, 0.9999)})


@pytest.mark.parametrize("name", NAMES)
def test_ten_steps_are_those_of_the_package(name):
    """In float64, since Prodigy's first steps are lost in the rounding of float32; codes are made of float32."""
    dtype = torch.float32 if name == "adamw8bit" else torch.float64
    # The package cuts blocks through rows; where rows are whole blocks the two agree.
    shapes = {key: shape for key, shape in SHAPES.items() if name != "adamw8bit" or key != "rest"}
    ours, theirs = (module(shapes, dtype=dtype) for _ in range(2))
    start = [p.detach().clone() for p in ours.parameters()]
    optimizer = make_optimizer(
        name, list(ours.parameters()), shapes=[torch.Size(shape) for shape in shapes.values()], betas=BETAS,
        beta3=None, eps=1e-8, weight_decay=WEIGHT_DECAY, total=lambda x: x, seed=0,
        num_skipped=torch.zeros(()),
    )  # fmt: skip
    optimizer.param_groups[0]["lr"] = RATES.get(name, 1e-2)
    expected = reference(name, list(theirs.parameters()))
    with torch.compiler.set_stance("force_eager"):  # one of them compiles its step
        for step in range(10):
            for own in (ours, theirs):
                for key, p in own.named_parameters():
                    p.grad = gradient(key, tuple(p.shape), step).to(dtype)
            optimizer.step()
            expected.step()
    for a, b, before in zip(ours.parameters(), theirs.parameters(), start, strict=True):
        assert not torch.equal(a, before)
        assert (a - b).norm() <= (1e-5 if name == "adamw8bit" else 1e-9) * (b - before).norm()
    if name == "prodigy":
        assert optimizer.common["d"].item() == pytest.approx(expected.param_groups[0]["d"], rel=1e-9)
        assert optimizer.common["d"] > 1e-5, "the step size grew"


@pytest.mark.parametrize("signed", [True, False])
def test_codes_round_to_the_nearest_number_and_keep_zero(signed):
    code = Code(signed=signed, device=CPU)
    assert code.values.unique().numel() == 256
    assert code.values[-1] == 1
    x = drawn(0, (6, 700)) * torch.logspace(-6, 0, 700)
    x = x if signed else x.square()
    codes, scale = code.encode(x)
    assert (codes.dtype, codes.shape, scale.shape) == (torch.uint8, x.shape, (6, 3))
    back = code.decode(codes, scale)
    scales = scale.repeat_interleave(256, dim=1)[:, :700]
    nearest = (x.unsqueeze(-1) / scales.unsqueeze(-1) - code.values).abs().amin(-1) * scales
    torch.testing.assert_close((back - x).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert (code.decode(*code.encode(torch.zeros(3, 300))) == 0).all()


# --- what a run asks of each ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_step_that_is_not_finite_changes_no_bit(name, mode):
    own = module()
    update = update_of(own, name, mode)
    move(own, update, name, range(3))
    before = {key: value.clone() for key, value in update.tensors().items()}
    move(own, update, name, [3], factor=float("nan"))
    assert update.num_skipped == 1
    assert all(torch.equal(value, before[key]) for key, value in update.tensors().items())
    move(own, update, name, [4])
    assert not torch.equal(update.tensors()["model.rest"], before["model.rest"])


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_skipped_steps_do_not_count_as_steps(name, mode, monkeypatch):
    """Not even after a checkpoint; only the rounding goes on, which is plain here."""
    monkeypatch.setattr(low_precision, "round_stochastically", lambda value, draws: value.to(torch.bfloat16))
    through, around = module(), module()
    plain, skipping = update_of(through, name, mode), update_of(around, name, mode)
    move(through, plain, name, range(4))
    move(around, skipping, name, range(2))
    move(around, skipping, name, [8, 9], factor=float("nan"))
    resumed = update_of(around, name, mode)
    tensors = resumed.tensors()
    with torch.no_grad():
        for key, value in skipping.tensors().items():
            tensors[key].copy_(value)
    resumed.restore(skipping.scalars())
    move(around, resumed, name, range(2, 4))
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), around.parameters(), strict=True))


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_step_reads_nothing_from_the_device(name, mode):
    own = module()
    update = update_of(own, name, mode)
    with HostReads() as reads:
        move(own, update, name, range(2))
    assert not reads.found


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_checkpoint_goes_on_to_the_bit(name, mode, tmp_path):
    own = module()
    update = update_of(own, name, mode)
    move(own, update, name, range(3))
    state = {"scalars": update.scalars()}
    folder = checkpoint.save_checkpoint(tmp_path, 3, update.tensors(), state, keep=1)
    move(own, update, name, range(3, 6))
    other = module(seed=1)
    resumed = update_of(other, name, mode)
    resumed.restore(checkpoint.load_checkpoint(folder, resumed.tensors())["scalars"])
    move(other, resumed, name, range(3, 6))
    tensors = resumed.tensors()
    assert all(torch.equal(value, tensors[key]) for key, value in update.tensors().items())
    assert json.dumps(resumed.scalars()) == json.dumps(update.scalars())


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_memory_is_what_was_announced(name, mode):
    own = module()
    update = update_of(own, name, mode)
    announced = optimizer_memory(
        name, SHAPES.values(), half=mode == "stochastic", stochastic=mode == "stochastic", offload=False
    )
    state = [value for key, value in update.tensors().items() if key.startswith("optimizer.") and value.numel() > 1]
    assert sum(value.nbytes for value in state) == announced.state
    assert sum(p.nbytes for p in own.parameters()) == announced.weights
    for key, p in own.named_parameters():
        p.grad = gradient(key, tuple(p.shape), 0).to(p.dtype)
    assert sum(p.grad.nbytes for p in own.parameters()) == announced.gradients
    update.step(1e-3)
    assert all(p.grad is None for p in own.parameters()), "between steps there are none"


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_bfloat16_weights_follow_float32_ones(name):
    shapes = {key: SHAPES[key] for key in ("blocks", "rest")}
    half, exact = module(shapes, dtype=torch.bfloat16), module(shapes)
    exact.load_state_dict({key: value.float() for key, value in half.state_dict().items()})
    start = {key: p.detach().clone() for key, p in exact.named_parameters()}
    updates = update_of(half, name, "stochastic"), update_of(exact, name)
    for step in range(40):
        for own, update in zip((half, exact), updates, strict=True):
            for key, p in own.named_parameters():
                p.grad = gradient(key, tuple(p.shape), step).to(p.dtype)
            update.step(1e-3)
    for (key, a), b in zip(half.named_parameters(), exact.parameters(), strict=True):
        way, went = ((p.detach().float() - start[key]).flatten() for p in (b, a))
        assert (way @ went / (way @ way)).item() == pytest.approx(1, abs=0.02), "as far, on average"
        assert (a.float() - b).norm() < 0.02 * b.norm()


# --- many processes ---------------------------------------------------------------------------------------------------


def in_processes(folder):
    """Take three steps with divided weights, save, take three more; return the weights of each optimizer."""
    ranks = make_ranks(Layout(size=3, zero=3), num_heads=3, device_type="cpu")
    results = {}
    for name in NAMES:
        own = module()
        fully_shard(own, mesh=ranks.mesh)
        update = update_of(own, name, ranks=ranks, max_grad_norm=1.0)
        move(own, update, name, range(3))
        checkpoint.save_checkpoint(
            folder / name, 3, update.tensors(), {"scalars": update.scalars()}, keep=1, ranks=ranks
        )
        move(own, update, name, range(3, 6))
        results[name] = {key: whole(p.detach()).numpy() for key, p in own.named_parameters()}
    return results


def test_three_processes_take_the_steps_of_one_and_one_goes_on_from_three(tmp_path):
    results = run_in(3, in_processes, tmp_path, folder=tmp_path)
    for name in NAMES:
        own = module()
        update = update_of(own, name, ranks=Ranks(layout=Layout()), max_grad_norm=1.0)
        move(own, update, name, range(3))
        at_three = {key: value.clone() for key, value in update.tensors().items()}
        move(own, update, name, range(3, 6))
        for result in results:
            for key, p in own.named_parameters():
                torch.testing.assert_close(torch.from_numpy(result[name][key]), p.detach(), rtol=1e-5, atol=1e-6)
        other = module(seed=1)
        resumed = update_of(other, name, max_grad_norm=1.0)
        folder = checkpoint_folder(tmp_path / name, 3)
        resumed.restore(checkpoint.load_checkpoint(folder, resumed.tensors())["scalars"])
        for key, value in resumed.tensors().items():
            torch.testing.assert_close(value, at_three[key], rtol=1e-5, atol=1e-6, msg=lambda m, key=key: f"{key}: {m}")
        move(other, resumed, name, range(3, 6))
        for p, expected in zip(other.parameters(), own.parameters(), strict=True):
            torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


# --- in host memory ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["adamw", "adam"])
def test_the_optimizer_in_host_memory_takes_the_same_steps(name, dtype):
    runs = []
    for offload in (False, True):
        own = module(dtype=dtype)
        update = update_of(own, name, offload=offload, max_grad_norm=1.0)
        for step in range(4):
            factor = float("inf") if step == 2 else 1.0
            for micro in range(2):
                sum((p * gradient(key, tuple(p.shape), 2 * step + micro).to(dtype) * factor).sum()
                    for key, p in own.named_parameters()).backward()  # fmt: skip
            update.step(1e-2)
        assert update.num_skipped == 1
        runs.append(([p.detach() for p in own.parameters()], update.tensors()))
    (plain, plain_state), (offloaded, state) = runs
    assert all(torch.equal(a, b) for a, b in zip(plain, offloaded, strict=True))
    assert all(torch.equal(value, state[key]) for key, value in plain_state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_optimizer_in_host_memory_leaves_weights_and_gradients_on_the_device(dtype):
    """With tensors that only say where they are, since this machine may have one kind of memory."""
    with FakeTensorMode():
        own = nn.Module()
        own.register_parameter("weight", nn.Parameter(torch.empty(4, 8, dtype=dtype, device="cuda")))
        update = Update(
            own.named_parameters(), dtype=dtype, device=torch.device("cuda"), betas=BETAS, eps=1e-8,
            weight_decay=0.1, max_grad_norm=1.0, stochastic_bf16=False, seed=1, offload=True,
        )  # fmt: skip
        if dtype == torch.float32:  # a half gradient would have been added up already
            own.weight.grad = torch.empty_like(own.weight)
        assert {grad.device.type for grad in update._gradients().values()} == {"cuda"}
        norm = update.step(1e-3)
        assert norm.device.type == "cuda"
        assert {p.device.type for p in own.parameters()} == {"cuda"}
        assert {value.device.type for value in update.tensors().values()} == {"cpu"}
