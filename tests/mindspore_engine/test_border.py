"""Arrays there and back, and weights that compiled graphs see change."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import ml_dtypes
import numpy as np
from mindspore import nn

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.mindspore_engine.border import load_parameters, put, to_array, to_tensor, to_tensors
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.linear import Linear


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "uint8", "int64", "bool", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_there_and_back_keeps_every_bit(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = to_tensor(array)
    back = to_array(tensor)
    assert tuple(tensor.shape) == shape
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


def test_bfloat16_bits_mean_the_same_number():
    values = [0.0, -0.0, 1.0, -1.5, 3.140625, 1e38, float("inf"), 2.0**-120]
    array = np.array(values, ml_dtypes.bfloat16)
    assert to_array(to_tensor(array, ms.float32)).tolist() == array.astype(np.float32).tolist()
    assert to_array(to_tensor(np.array(values, np.float32), ms.bfloat16)).tobytes() == array.tobytes()


def test_views_are_taken_and_nothing_is_shared():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = to_tensor(array.T[::2])
    back = to_array(tensor)
    array[:] = 0
    assert back.tolist() == [[0, 4, 8], [2, 6, 10]]
    back[:] = 7
    assert to_array(tensor).tolist() == [[0, 4, 8], [2, 6, 10]]


def test_a_batch_of_the_ground_becomes_tensors_and_names_stay_names():
    batch = {"latents": np.ones((1, 2), np.float32), "timesteps": np.array([3]), "clip_ids": ["a"]}
    moved = to_tensors(batch)
    assert moved["clip_ids"] == ["a"]
    assert moved["latents"].dtype == ms.float32
    assert to_array(moved["timesteps"]).tolist() == [3]


def test_a_compiled_graph_sees_a_weight_that_is_put():
    cell = Linear(2, 1, bias=False)
    put(cell.weight, np.ones((1, 2), np.float32))

    def run(x):
        return cell(x)

    graph = Mode(graph=True).compiled(run)
    x = to_tensor(np.ones((1, 2), np.float32))
    assert float(graph(x)[0, 0]) == 2
    put(cell.weight, np.full((1, 2), 3.0, np.float32))
    assert float(graph(x)[0, 0]) == float(cell(x)[0, 0]) == 6


def test_weights_that_do_not_fit_are_named_all_at_once():
    cell = nn.CellList([Linear(2, 3)])
    good = {"0.weight": np.zeros((3, 2), np.float32), "0.bias": np.zeros(3, np.float32)}
    load_parameters(cell, good.items(), source="weights")
    wrong = [("0.weight", np.zeros((2, 3), np.float32)), ("0.extra", np.zeros(1)), ("0.extra", np.zeros(1))]
    with pytest.raises(UnfitError, match=r"a file .* in 4 places: 0.weight is \[2, 3\], expected \[3, 2\]") as caught:
        load_parameters(cell, wrong, source="a file")
    assert "0.extra is not in this model" in str(caught.value)
    assert "0.bias is missing" in str(caught.value)
    with pytest.raises(UnfitError, match=r"0\.bias comes twice"):
        load_parameters(cell, [*good.items(), ("0.bias", good["0.bias"])], source="a file")
    load_parameters(cell, [("0.bias", np.ones(3, np.float32))], source="a file", strict=False)
    assert to_array(cell[0].bias).tolist() == [1, 1, 1]
