"""A batch on disk is the batch; another file is refused."""

import numpy as np
import pytest

from cogvideox_factory.data.replay import read_batch, write_batch
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.tensors import save_tensors


def test_a_batch_comes_back_to_the_bit(tmp_path):
    batch = {
        "noise": np.float32([1.5, np.nan]),
        "timesteps": np.int64([7, 8]),
        "clip_ids": ["a", "b"],
        "captions": [""],
    }
    write_batch(tmp_path / "b.safetensors", batch)
    found = read_batch(tmp_path / "b.safetensors")
    assert found.keys() == batch.keys()
    assert found["noise"].tobytes() == batch["noise"].tobytes()
    assert (found["timesteps"] == batch["timesteps"]).all()
    assert (found["clip_ids"], found["captions"]) == (["a", "b"], [""])


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, "has no `lists` in its header"),
        ({"lists": "{"}, "is not valid JSON"),
        ({"lists": "[1]"}, "holds a list"),
        ({"lists": "[" * 100_000}, "is not valid JSON"),
    ],
)
def test_another_file_is_refused(tmp_path, metadata, says):
    save_tensors(tmp_path / "b.safetensors", {"noise": np.zeros(2, np.float32)}, metadata=metadata)
    with pytest.raises(UnfitError, match=says) as caught:
        read_batch(tmp_path / "b.safetensors")
    assert "RUN/replay/" in str(caught.value)
