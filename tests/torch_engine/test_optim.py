import pytest
import torch
from torch import nn

from cogvideox_factory.torch_engine.low_precision import round_stochastically
from cogvideox_factory.torch_engine.optim import Ema, Update

CPU = torch.device("cpu")


def make(model: nn.Module, dtype=torch.float32, stochastic=False, max_grad_norm=1.0) -> Update:
    return Update(
        model.named_parameters(), dtype=dtype, device=CPU, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01,
        max_grad_norm=max_grad_norm, stochastic_bf16=stochastic, seed=1,
    )  # fmt: skip


def model(dtype=torch.float32, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)).to(dtype)


def inputs(step: int, dtype=torch.float32):
    g = torch.Generator().manual_seed(step)
    return torch.randn(5, 6, generator=g).to(dtype), torch.randn(5, 3, generator=g).to(dtype)


def test_equals_torch_adamw_with_clipping():
    ours, theirs = model(), model()
    update = make(ours)
    reference = torch.optim.AdamW(theirs.parameters(), lr=0.0, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    for step in range(6):
        x, y = inputs(step)
        (10 * (ours(x) - y).square().sum()).backward()
        (10 * (theirs(x) - y).square().sum()).backward()
        norm = update.step(1e-2)
        expected = nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
        reference.param_groups[0]["lr"] = 1e-2
        reference.step()
        reference.zero_grad()
        torch.testing.assert_close(norm, expected)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_masters_keep_updates_that_bfloat16_would_lose():
    net = model(torch.bfloat16)
    start = [p.detach().clone() for p in net.parameters()]
    update = make(net, torch.bfloat16)
    for step in range(300):
        x, y = inputs(step % 3, torch.bfloat16)
        (net(x) - y).float().square().mean().backward()
        assert all(p.grad is None for p in net.parameters()), "half gradients live only until they are added"
        update.step(1e-5)
    for p, before, master in zip(net.parameters(), start, update.masters.values(), strict=True):
        assert master.dtype == torch.float32
        torch.testing.assert_close(p, master.bfloat16(), rtol=0, atol=0)
        assert not torch.equal(p, before) or not torch.equal(master, before.float())
    moved = sum((m - b.float()).abs().sum() for m, b in zip(update.masters.values(), start, strict=True))
    assert moved > 0.05


def test_accumulated_halves_are_added_in_float32():
    net = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    update = make(net, torch.bfloat16, max_grad_norm=1e9)
    for value in (256.0, 1.0):  # 257 does not exist in bfloat16
        net(torch.full((1, 1), value, dtype=torch.bfloat16)).sum().backward()
    assert next(iter(update.masters.values())).grad.item() == 257.0


def test_stochastic_rounding_keeps_the_mean_and_is_exact_on_representable_values():
    value = torch.full((200_000,), 1.0 + 1 / 512)  # a quarter of the way between two bfloat16 numbers
    draws = torch.Generator().manual_seed(0)
    rounded = round_stochastically(value, draws).float()
    assert set(rounded.unique().tolist()) == {1.0, 1.0078125}
    assert rounded.mean().item() == pytest.approx(1 + 1 / 512, abs=3e-5)
    exact = torch.tensor([0.0, -0.0, 1.5, -3.25, 2.0**-120])
    assert torch.equal(round_stochastically(exact, draws).float(), exact)
    negative = round_stochastically(-value, draws).float()
    assert negative.mean().item() == pytest.approx(-1 - 1 / 512, abs=3e-5)


def test_stochastic_bf16_follows_float32_adamw_and_repeats():
    runs = []
    for _ in range(2):
        net, exact = model(torch.bfloat16), model()
        exact.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
        update, reference = make(net, torch.bfloat16, stochastic=True), make(exact)
        for step in range(200):
            x, y = inputs(step % 3)
            (net(x.bfloat16()) - y.bfloat16()).float().square().mean().backward()
            (exact(x) - y).square().mean().backward()
            update.step(1e-3)
            reference.step(1e-3)
        assert all(t.dtype == torch.bfloat16 for t in update.tensors().values())
        runs.append([p.detach().clone() for p in net.parameters()])
    for a, b, e in zip(*runs, exact.parameters(), strict=True):
        assert torch.equal(a, b)
        assert (a.float() - e).norm() / e.norm() < 0.05


@pytest.mark.parametrize("stochastic", [False, True])
def test_a_non_finite_gradient_changes_nothing_and_is_counted(stochastic):
    net = model(torch.bfloat16)
    update = make(net, torch.bfloat16, stochastic=stochastic)
    x, y = inputs(0, torch.bfloat16)
    (net(x) - y).float().square().mean().backward()
    update.step(1e-3)
    before = {k: v.clone() for k, v in update.tensors().items()}
    (net(x) * float("inf")).sum().backward()
    norm = update.step(1e-3)
    assert not norm.isfinite()
    assert update.num_skipped == 1
    for name, value in update.tensors().items():
        assert torch.equal(value, before[name]), name
    (net(x) - y).float().square().mean().backward()
    assert update.step(1e-3).isfinite()


def test_loss_scale_halves_on_overflow_and_grows_after_good_steps():
    net = model()
    update = make(net, torch.float16)
    assert update.loss_scale.scale == 2**16
    x, y = inputs(0)
    ((net(x) - y).square().mean() * float("inf")).backward()
    update.step(1e-3)
    assert update.loss_scale.scale == 2**15
    update.loss_scale.good_steps.fill_(1999)
    ((net(x) - y).square().mean() * update.loss_scale.scale).backward()
    norm = update.step(1e-3)
    assert update.loss_scale.scale == 2**16
    assert norm < 10, "the norm is that of the unscaled gradients"


def test_ema_follows_with_warm_up():
    net = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(net.weight)
    ema = Ema(make(net), decay=0.9)
    torch.nn.init.ones_(net.weight)
    ema.update(step=1)
    assert torch.allclose(ema.averages["weight"], torch.full((1, 3), 1 - 2 / 11))
    for step in range(2, 200):
        ema.update(step=step)
    assert torch.allclose(ema.averages["weight"], torch.ones(1, 3), atol=1e-6)
