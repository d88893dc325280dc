"""Processes that wait for one another."""

import time

import pytest
import torch
import torch.distributed as dist

from cogvideox_factory.torch_engine.ranks import Layout, _is_broken_link, make_ranks
from tests.torch_engine.processes import run_in

PATIENCE_SECONDS = 5.0


def wait_in_vain(folder):
    """Let process 0 meet in every group that is made, and process 1 come to none; return what 0 gave up."""
    ranks = make_ranks(Layout(size=2, sequence=2), num_heads=3, device_type="cpu", timeout_seconds=PATIENCE_SECONDS)
    if ranks.rank == 1:
        while not (folder / "given-up").exists():
            time.sleep(0.05)
        return []
    assert ranks.mesh is not None
    assert ranks.sequence is not None
    groups = {"talk": ranks.talk, "sequence": ranks.sequence.group, "ring": ranks.sequence.ring}
    met = {name: dist.all_reduce(torch.ones(1), group=group, async_op=True) for name, group in groups.items()}
    given_up = []
    for name, work in met.items():
        assert work is not None
        with pytest.raises(RuntimeError) as caught:
            work.wait()
        given_up += [name] if _is_broken_link(caught.value) else []
    (folder / "given-up").touch()
    alone = ranks.mesh.get_group("shards")  # nobody to wait for: asked how long it would
    assert alone._get_backend(torch.device("cpu")).options._timeout.total_seconds() == PATIENCE_SECONDS
    return given_up


def test_every_group_gives_up_after_the_time_that_was_asked_for(tmp_path):
    """Torch's own is half an hour, which this test does not have."""
    given_up, _ = run_in(2, wait_in_vain, tmp_path, folder=tmp_path)
    assert given_up == ["talk", "sequence", "ring"]
