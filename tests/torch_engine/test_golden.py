"""This engine against its own golden files: what the other one is held to is what this one does."""

import numpy as np
import pytest

from tests.golden import __main__ as writer
from tests.golden import difference, golden


def test_ten_steps_of_training_are_what_this_engine_does():
    """Weights more loosely: where nothing depends on one, its gradient is rounding, and AdamW makes steps of that."""
    expected, found = golden("training"), writer.trainings()
    assert found.keys() == expected.keys()
    for key, values in expected.items():
        if key.endswith("weights"):
            assert max(difference(ours, theirs) for ours, theirs in zip(found[key], values, strict=True)) <= 1e-3, key
        else:
            np.testing.assert_allclose(found[key], values, rtol=2e-5, atol=2e-5, err_msg=key)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("transformer", writer.transformers),
        ("vae", writer.vaes),
        ("text_encoder", writer.texts),
        ("lora", writer.loras),
    ],
)
def test_golden_files_are_what_this_engine_computes(name, make):
    """To the rounding of another order of sums: other machines have other kernels."""
    expected, found = golden(name), make()
    assert found.keys() == expected.keys()
    for key, records in expected.items():
        rows = zip(found[key].reshape(-1, records.shape[-1]), records.reshape(-1, records.shape[-1]))
        floor = 1e-3 * float(records.reshape(-1, records.shape[-1])[:, 1].max())
        assert max(difference(ours, theirs, floor=floor) for ours, theirs in rows) <= 5e-5, key
