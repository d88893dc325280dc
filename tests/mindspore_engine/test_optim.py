"""Updates against AdamW and Adam written out in float64."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import numpy as np
from mindspore import Parameter

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.optim import Update

SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1, "max_grad_norm": 1.0}


def weights(dtype=ms.float32) -> list[Parameter]:
    values = [draws.normal(0, "weight", n, shape=shape) for n, shape in enumerate([(3, 4), (5,)])]
    return [Parameter(to_tensor(value, dtype), name=f"weight{n}") for n, value in enumerate(values)]


def gradients(step: int, scale: float = 1.0) -> list[np.ndarray]:
    shapes = [(3, 4), (5,)]
    return [np.float32(scale) * draws.normal(step, "gradient", n, shape=shape) for n, shape in enumerate(shapes)]


def written_out(start: list[np.ndarray], rates: list[float], *, decoupled: bool) -> list[np.ndarray]:
    """Return the weights after steps of these rates in float64; two equal micro-batches a step."""
    (beta1, beta2), eps, decay = SETTINGS["betas"], SETTINGS["eps"], SETTINGS["weight_decay"]
    p = [array.astype(np.float64) for array in start]
    m, v = [np.zeros_like(x) for x in p], [np.zeros_like(x) for x in p]
    for t, rate in enumerate(rates, start=1):
        grads = [2 * g.astype(np.float64) for g in gradients(t)]
        norm = np.sqrt(sum((g**2).sum() for g in grads))
        for i, g in enumerate(grads):
            g = g * min(1.0, SETTINGS["max_grad_norm"] / (norm + 1e-6))
            g = g if decoupled else g + decay * p[i]
            m[i] = beta1 * m[i] + (1 - beta1) * g
            v[i] = beta2 * v[i] + (1 - beta2) * g**2
            if decoupled:
                p[i] = p[i] * (1 - rate * decay)
            p[i] = p[i] - rate * (m[i] / (1 - beta1**t)) / (np.sqrt(v[i] / (1 - beta2**t)) + eps)
    return p


@pytest.mark.parametrize("decoupled", [True, False])
@pytest.mark.parametrize("graph", [False, True])
def test_steps_are_the_formula(decoupled, graph):
    parameters, rates = weights(), [1e-2, 5e-2, 3e-2]
    start = [to_array(p) for p in parameters]
    update = Update(parameters, decoupled=decoupled, mode=Mode(graph=graph), **SETTINGS)
    for step, rate in enumerate(rates, start=1):
        for _ in range(2):
            update.add([to_tensor(g) for g in gradients(step)])
        norm = float(update.step(rate))
        assert norm == pytest.approx(2 * np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in gradients(step))))
    for parameter, expected in zip(parameters, written_out(start, rates, decoupled=decoupled)):
        np.testing.assert_allclose(to_array(parameter), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(bad):
    one, other = weights(), weights()
    disturbed, plain = Update(one, **SETTINGS), Update(other, **SETTINGS)
    for step in (1, 2):
        for update in (disturbed, plain):
            update.add([to_tensor(g) for g in gradients(step)])
            update.step(1e-2)
        if step == 1:
            disturbed.add([to_tensor(g * np.float32(bad)) for g in gradients(9)])
            before = [to_array(p) for p in one]
            assert not np.isfinite(float(disturbed.step(1e-2)))
            assert all(np.array_equal(to_array(p), array) for p, array in zip(one, before))
    assert all(np.array_equal(to_array(a), to_array(b)) for a, b in zip(one, other))
    assert float(disturbed.num_skipped) == 1
    assert float(disturbed.num_updates) == 2


def test_half_precision_weights_have_float32_masters():
    """Two hundred steps, each too small for float16 to keep, add up."""
    parameters = weights(ms.float16)
    start = [to_array(p).astype(np.float64) for p in parameters]
    update = Update(parameters, **{**SETTINGS, "weight_decay": 0.0})
    for _ in range(50):
        update.add([to_tensor(np.ones(p.shape, np.float16)) for p in parameters])
        update.step(1e-4)
    for parameter, before, master in zip(parameters, start, update.masters):
        assert parameter.dtype == ms.float16
        np.testing.assert_allclose(to_array(master), before - 50e-4, rtol=0, atol=1e-5)
        np.testing.assert_allclose(to_array(parameter), before - 50e-4, rtol=1e-3, atol=1e-4)


def test_nothing_to_train_is_said():
    with pytest.raises(FactoryError, match=r"lora\.target_modules"):
        Update([], **SETTINGS)
