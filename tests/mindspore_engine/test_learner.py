"""Ten steps of training against the golden files of the other engine: accumulated, clipped, LoRA and all weights."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from tests.golden import cases
from tests.mindspore_engine import parity
from tests.mindspore_engine.parity import MODES


@pytest.mark.parametrize("case", cases.TRAININGS)
def test_ten_steps_are_those_of_the_other_engine(case):
    parity.hold(parity.training(case, MODES["PyNative"]))


@pytest.mark.parametrize("case", cases.TRAININGS)
def test_so_they_are_in_graphs(case):
    parity.hold(parity.training(case, MODES["O0"]))


def test_so_they_are_in_graphs_of_level_1():
    parity.hold(parity.training("i2v lora", MODES["O1"]))
