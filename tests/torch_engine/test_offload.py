"""What a block keeps waits on the host: what moves, when, and that no bit depends on it."""

import weakref

import pytest
import torch

from cogvideox_factory.torch_engine import offload
from cogvideox_factory.torch_engine.offload import Offload
from tests.torch_engine.stepping import CPU, adapt, assert_same_bits, loss_of, small_model, step

SMALL = 8192
"""Bytes; the stream of the small model has 45 kB, what is left alone less than this."""


def model_with(mode, *, lora=False, offloaded=True, layers=None):
    model = small_model()
    if lora:
        adapt(model)
    model.set_checkpointing(mode, layers)
    return model, Offload(model.blocks, device=CPU, smallest=SMALL) if offloaded else None


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("mode", "layers"), [("none", None), ("full", None), ("save_attention", 2)])
def test_no_bit_depends_on_it(mode, layers, lora):
    plain, _ = model_with(mode, lora=lora, layers=layers, offloaded=False)
    moved, _ = model_with(mode, lora=lora, layers=layers)
    assert_same_bits(step(moved, times=2), step(plain, times=2))


@pytest.fixture
def moves(monkeypatch):
    """Return the list of moves, as they happen: ("out" | "back" | "late", shelf)."""
    seen, shelves = [], []

    def number(shelf):
        if shelf not in shelves:
            shelves.append(shelf)
        return shelves.index(shelf)

    pack, fetch, unpack = offload.Shelf.pack, offload.Shelf._fetch, offload.Shelf.unpack

    def packing(self, tensor):
        before = len(self._parcels)
        kept = pack(self, tensor)
        seen.extend([("out", number(self))] * (len(self._parcels) - before))
        return kept

    def fetching(self, parcel):
        if parcel.here is None:
            seen.append(("back", number(self)))
        return fetch(self, parcel)

    def unpacking(self, kept):
        if isinstance(kept, offload.Parcel) and kept.here is None:
            seen.append(("late", number(self)))
        return unpack(self, kept)

    monkeypatch.setattr(offload.Shelf, "pack", packing)
    monkeypatch.setattr(offload.Shelf, "_fetch", fetching)
    monkeypatch.setattr(offload.Shelf, "unpack", unpacking)
    return seen


@pytest.mark.parametrize(("mode", "tensors"), [("full", 1), ("save_attention", 2), ("none", 6)])
def test_every_tensor_goes_once_and_comes_back_a_block_ahead(mode, tensors, moves):
    """Without checkpointing: input, its norm, qkv, attention, the stream between the halves, hidden columns."""
    model, _ = model_with(mode)
    loss = loss_of(model)
    assert moves == [("out", block) for block in range(3) for _ in range(tensors)]  # the last of four stays
    moves.clear()
    loss.backward()
    # What block 2 kept has not left the device when the backward pass begins; nobody waits for the others.
    assert moves == [("back", block) for block in (1, 0) for _ in range(tensors)]


def test_the_device_holds_two_blocks(monkeypatch):
    model, moved = model_with("none")
    kept = []
    pack = offload.Shelf.pack

    def packing(self, tensor):
        out = pack(self, tensor)
        if isinstance(out, offload.Parcel):
            kept.append((self, weakref.ref(out.here)))
        return out

    monkeypatch.setattr(offload.Shelf, "pack", packing)
    loss = loss_of(model)
    held = {moved.shelves.index(shelf) for shelf, here in kept if here() is not None}
    assert held == {2}
    loss.backward()
    assert not any(here() is not None for shelf, here in kept if shelf is not moved.shelves[0])


def test_weights_shared_tables_and_small_tensors_stay():
    model, moved = model_with("none", lora=True)
    loss = loss_of(model)
    sizes = {parcel.away.nbytes for shelf in moved.shelves for parcel in shelf._parcels.values()}
    tokens, width = 16 + 3 * 4 * 6, 128
    stream = tokens * width * 4
    assert sizes == {stream, 3 * stream, round(2.75 * stream)}
    assert tokens * 32 * 4 >= SMALL  # the rotary tables are large enough, and are not among them
    loss.backward()


def test_nothing_moves_without_gradients(moves):
    model, _ = model_with("save_attention")
    with torch.no_grad():
        loss_of(model)
    assert not moves
