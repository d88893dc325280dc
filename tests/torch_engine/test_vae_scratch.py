"""Buffers come back, fit, and never serve two at once."""

import torch

from cogvideox_factory.torch_engine.vae_scratch import Scratch

LIKE = torch.zeros(1)


def test_a_buffer_given_back_is_taken_again() -> None:
    scratch = Scratch()
    first = scratch.take(LIKE, 4, 5)
    where = first.data_ptr()
    assert scratch.take(LIKE, 4, 5).data_ptr() != where
    scratch.give(first)
    smaller = scratch.take(LIKE, 2, 3)
    assert smaller.data_ptr() == where
    assert smaller.shape == (2, 3)
    assert smaller.is_contiguous()


def test_the_smallest_fitting_buffer_is_taken_and_dtypes_do_not_mix() -> None:
    scratch = Scratch()
    large, small = scratch.take(LIKE, 100), scratch.take(LIKE, 10)
    scratch.give(large)
    scratch.give(small)
    assert scratch.take(LIKE.double(), 5).data_ptr() not in (large.data_ptr(), small.data_ptr())
    large, small = scratch.take(LIKE, 100), scratch.take(LIKE, 10)
    where = small.data_ptr()
    scratch.give(large)
    scratch.give(small)
    assert scratch.take(LIKE, 9).data_ptr() == where


def test_what_was_made_elsewhere_is_emptied_and_nothing_while_recording() -> None:
    foreign = torch.ones(8)
    Scratch(is_active=False).give(foreign)
    assert foreign.sum() == 8
    Scratch().give(foreign)
    assert foreign.untyped_storage().nbytes() == 0
