"""Frozen weights that come and go: which, when, how many at once, and that no bit depends on it."""

import pytest
import torch

from cogvideox_factory.torch_engine import swap
from cogvideox_factory.torch_engine.swap import Swap, spread
from tests.torch_engine.stepping import CPU, adapt, assert_same_bits, loss_of, small_model, step


def swapped(num_blocks, *, mode="none", num_layers=4, dtype=torch.float32, **options):
    model = small_model(num_layers=num_layers, dtype=dtype)
    adapt(model, **options)
    model.set_checkpointing(mode)
    return model, Swap(model.blocks, num_blocks, device=CPU) if num_blocks else None


@pytest.mark.parametrize("mode", ["none", "full", "save_attention"])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"target_modules": ["to_q", "ff.net.2"]}])
def test_no_bit_depends_on_it(mode, options):
    expected = step(swapped(0, mode=mode, **options)[0], times=2)
    assert_same_bits(step(swapped(3, mode=mode, **options)[0], times=2), expected)


def test_half_precision_weights_come_and_go_too():
    expected = step(swapped(0, dtype=torch.bfloat16)[0], times=2)
    assert_same_bits(step(swapped(3, dtype=torch.bfloat16)[0], times=2), expected)


@pytest.fixture
def arrivals(monkeypatch):
    """Return the list of loads, by visitor."""
    seen = []
    arrive = swap.Visitor.arrive

    def arriving(self):
        if not self.is_here:
            seen.append(self)
        arrive(self)

    monkeypatch.setattr(swap.Visitor, "arrive", arriving)
    return seen


@pytest.mark.parametrize("mode", ["none", "full"])
def test_loads_are_in_order_and_two_are_here_at_most(mode, arrivals, monkeypatch):
    model, moved = swapped(4, mode=mode, num_layers=6)
    most = 0
    at = {visitor: index for index, visitor in moved.visitors.items()}
    places = spread(4, 6)
    assert list(moved.visitors) == places == sorted(set(places))

    def counted(visitor):
        nonlocal most
        most = max(most, sum(v.is_here for v in moved.visitors.values()))

    leave, arrive = swap.Visitor.leave, swap.Visitor.arrive
    monkeypatch.setattr(swap.Visitor, "arrive", lambda self: (arrive(self), counted(self))[0])
    monkeypatch.setattr(swap.Visitor, "leave", lambda self: (leave(self), counted(self))[0])
    a, b, c, d = places
    step(model)
    assert [at[v] for v in arrivals] == [a, b, c, d, c, b, a]  # the last is still here when the way turns
    arrivals.clear()
    step(model)
    assert [at[v] for v in arrivals] == [b, c, d, c, b, a]
    arrivals.clear()
    with torch.no_grad():
        loss_of(model)
        loss_of(model)
    assert [at[v] for v in arrivals] == [b, c, d, a, b, c, d]
    assert most == 2


def test_only_frozen_weights_leave_and_their_memory_is_gone():
    model, moved = swapped(2)
    with torch.no_grad():
        loss_of(model)
    here = [v.is_here for v in moved.visitors.values()]
    assert here == [False, True]
    away = next(v for v in moved.visitors.values() if not v.is_here)
    assert sum({p.untyped_storage().data_ptr(): p.untyped_storage().size() for p in away.parameters}.values()) == 0
    assert len(moved.parameters) == sum(
        not p.requires_grad for i in moved.visitors for p in model.blocks[i].parameters()
    )
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.untyped_storage().size() >= p.nbytes for p in trained)


@pytest.mark.parametrize(
    ("count", "length", "places"), [(1, 4, [2]), (2, 4, [1, 3]), (4, 4, [0, 1, 2, 3]), (3, 42, [7, 21, 35])]
)
def test_blocks_are_spread_evenly(count, length, places):
    assert spread(count, length) == places
