"""Ten steps of both samplers against the golden files of the other engine, sample by sample."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from cogvideox_factory.mindspore_engine.sampling import Predict
from tests.golden import cases
from tests.mindspore_engine import parity
from tests.mindspore_engine.parity import MODES


@pytest.fixture(scope="module")
def predict_of() -> dict[tuple[str, str], Predict]:
    """By variant and mode: both samplers go through the same graphs."""
    return {}


@pytest.mark.parametrize(
    ("mode", "case"), [*((mode, case) for mode in ("PyNative", "O0") for case in cases.DENOISING), ("O1", "t2v dpm")]
)
def test_every_step_leads_where_it_leads_in_the_other_engine(mode, case, predict_of):
    variant = cases.DENOISING[case]
    if (variant, mode) not in predict_of:
        predict_of[variant, mode] = parity.predict_by(parity.model_of(variant), MODES[mode])
    parity.hold(parity.denoising(case, predict_of[variant, mode]))
