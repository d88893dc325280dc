import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
import torch

from cogvideox_factory.torch_engine.border import to_array, to_tensor


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64", "uint8", "int64", "bool", ml_dtypes.bfloat16])
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 3, 4)])
def test_there_and_back_keeps_every_bit(dtype, shape):
    array = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    tensor = to_tensor(array)
    back = to_array(tensor)
    assert tuple(tensor.shape) == shape
    assert back.dtype == array.dtype
    assert back.tobytes() == array.tobytes()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_memory_is_shared_both_ways(dtype):
    array = np.zeros(4, dtype)
    tensor = to_tensor(array)
    tensor[1] = 2
    assert array[1] == 2
    to_array(tensor)[2] = 3
    assert array[2] == 3


def test_bfloat16_bits_mean_the_same_number():
    values = [0.0, -0.0, 1.0, -1.5, 3.140625, 1e38, float("inf"), 2.0**-130]
    array = np.array(values, ml_dtypes.bfloat16)
    assert to_tensor(array).float().tolist() == array.astype(np.float32).tolist()
    assert to_array(torch.tensor(values, dtype=torch.bfloat16)).tobytes() == array.tobytes()


def test_views_and_read_only_arrays_are_taken_silently(recwarn):
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    array.setflags(write=False)
    assert to_tensor(array.T).tolist() == array.T.tolist()
    assert to_tensor(array[:, ::2]).tolist() == array[:, ::2].tolist()
    assert to_tensor(array).tolist() == array.tolist()
    assert not recwarn


def test_gradients_and_strides_do_not_stop_an_export():
    tensor = torch.arange(6.0).view(2, 3).requires_grad_()
    assert to_array(tensor.T).tolist() == [[0, 3], [1, 4], [2, 5]]


def test_dtype_is_converted():
    assert to_tensor(np.ones(2, np.float32), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_one_process_does_not_pay_for_many():
    """Importing torch's DTensor takes a second; loading a model and making a video need none of it."""
    code = (
        "import sys; import cogvideox_factory.torch_engine.generate; "
        "sys.exit('torch.distributed.tensor' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
