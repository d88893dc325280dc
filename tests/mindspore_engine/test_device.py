"""Choosing device, dtype and how functions run."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import numpy as np

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.mindspore_engine import device
from cogvideox_factory.mindspore_engine.border import to_tensor
from cogvideox_factory.mindspore_engine.device import Mode, pick_device, pick_dtype
from cogvideox_factory.models import PUBLISHED

without_card = pytest.mark.skipif(device.is_ascend(), reason="this machine has an Ascend card")


@without_card
def test_a_device_that_is_not_there_is_said():
    with pytest.raises(MissingError, match="only cpu"):
        pick_device("ascend")
    with pytest.raises(FactoryError, match=r"did you mean 'ascend'"):
        pick_device("ascent")
    assert pick_device("auto") == pick_device("cpu") == "cpu"


@without_card
def test_a_cpu_computes_in_float32_and_refuses_bfloat16():
    assert pick_dtype("auto", PUBLISHED["cogvideox-5b"].transformer) == ms.float32
    assert pick_dtype("float16") == ms.float16
    with pytest.raises(FactoryError, match="no bfloat16 arithmetic on a CPU"):
        pick_dtype("bfloat16")
    with pytest.raises(FactoryError, match=r"did you mean 'float32'"):
        pick_dtype("float23")


def test_a_card_computes_in_the_dtype_of_the_checkpoint(monkeypatch):
    monkeypatch.setattr(device, "is_ascend", lambda: True)
    assert pick_dtype("auto", PUBLISHED["cogvideox-2b"].transformer) == ms.float16
    assert pick_dtype("auto", PUBLISHED["cogvideox-5b"].transformer) == pick_dtype("auto") == ms.bfloat16


@without_card
def test_jit_levels():
    with pytest.raises(FactoryError, match=r"O0, O1, O2"):
        Mode(graph=True, jit_level="O3")
    with pytest.raises(FactoryError, match="Use O0 or O1"):
        Mode(graph=True, jit_level="O2")


def test_pynative_runs_the_function_itself_and_a_graph_is_made_once_a_shape():
    calls = []

    def double(x):
        calls.append(x)  # compiled, this line runs when the graph is made
        return x * 2

    assert Mode().compiled(double) is double

    traced = []

    class Counting:
        num_changes = 0

    def run(x):
        return x * 2

    graph = Mode(graph=True).compiled(run, of=Counting)
    for size in (2, 3, 2):
        traced.append(graph(to_tensor(np.ones(size, np.float32))).shape)
    assert traced == [(2,), (3,), (2,)]
