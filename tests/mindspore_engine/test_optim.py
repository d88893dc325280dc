"""Updates against AdamW and Adam written out in float64."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import mindspore as ms
import numpy as np
from mindspore import Parameter

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine import optim
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.low_precision import RoundingDraws, round_stochastically, uniform
from cogvideox_factory.mindspore_engine.optim import FIRST_LOSS_SCALE, Update

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


# --- float16: a scaled loss -------------------------------------------------------------------------------------------


def test_a_scaled_loss_makes_the_same_steps():
    one, other = weights(), weights()
    plain, scaled = Update(one, **SETTINGS), Update(other, scales_loss=True, **SETTINGS)
    for step in (1, 2):
        plain.add([to_tensor(g) for g in gradients(step)])
        scaled.add([to_tensor(g) for g in gradients(step, FIRST_LOSS_SCALE)])
        assert float(scaled.step(1e-2)) == float(plain.step(1e-2)), "a power of two changes no digit"
    assert all(np.array_equal(to_array(a), to_array(b)) for a, b in zip(one, other))


@pytest.mark.parametrize("graph", [False, True])
def test_the_scale_halves_after_an_overflow_and_doubles_after_good_steps_in_a_row(graph, monkeypatch):
    monkeypatch.setattr(optim, "GROWTH_STEPS", 3)
    parameters, found = weights(), []
    update = Update(parameters, scales_loss=True, mode=Mode(graph=graph), **SETTINGS)
    for bad in (False, False, True, False, False, False, False):
        before = [to_array(p) for p in parameters]
        update.add([to_tensor(g * np.float32(np.inf if bad else 1)) for g in gradients(1)])
        update.step(1e-2)
        assert bad == all(np.array_equal(to_array(p), array) for p, array in zip(parameters, before))
        found.append((float(update.loss_scale) / FIRST_LOSS_SCALE, float(update.good_steps)))
    assert found == [(1, 1), (1, 2), (0.5, 0), (0.5, 1), (0.5, 2), (1, 0), (1, 1)]
    again = Update(weights(), scales_loss=True, **SETTINGS)
    again.restore(update.scalars())
    assert again.scalars() == update.scalars() == {
        "good_steps": 1, "loss_scale": FIRST_LOSS_SCALE, "num_skipped": 1, "num_updates": 6
    }  # fmt: skip


# --- bfloat16 weights -------------------------------------------------------------------------------------------------


def test_a_number_is_rounded_up_as_often_as_its_remainder_says():
    """Over all draws there are, for numbers all over the range and at the borders of powers of two."""
    some = draws.generator(0, "rounded").standard_normal(40, dtype=np.float32) * np.float32(2.0) ** np.arange(
        -60, 60, 3
    )
    ones = np.float32([1, -1, 1 - 2**-20, 1 + 2**-20, 2 - 2**-12, 1.00390625, -1.99609375, 0, -0.0, 3e38])
    every = to_tensor((np.arange(2**16) * 2.0**-16).astype(np.float32))
    for value in np.concatenate([some, ones]).astype(np.float32):
        rounded = to_array(round_stochastically(to_tensor(np.full(2**16, value)), every))
        low = value.view(np.uint32) & np.uint32(0xFFFF)
        smaller = (value.view(np.uint32) - low).view(np.float32)
        larger = (value.view(np.uint32) - low + np.uint32(0x10000)).view(np.float32)
        assert set(np.abs(rounded)) <= {abs(smaller), abs(larger)}, value
        assert (rounded != smaller).sum() == low, value


def test_no_two_draws_of_a_step_have_anything_in_common():
    """Neither of one row, one column, one weight nor one part of it; over many steps."""
    shapes = [(3, 2), (2, 1, 3)]
    made = RoundingDraws(shapes, seed=3)

    def drawn(step):
        rows, columns, keys = map(to_array, made.of(step))
        assert (len(rows), len(columns), len(keys)) == (3, 3, 6)
        bits = rows[:, None, None] ^ columns[:, None] ^ keys
        return np.concatenate([bits[:3, :2].ravel(), bits[:2, :3, :2].ravel()]) / 2**16

    assert np.array_equal(drawn(1), drawn(1))
    found = np.stack([drawn(step) for step in range(400)])  # [steps, numbers]
    assert np.abs(found.mean(0) - 0.5).max() < 4.5 * 12**-0.5 / 20
    assert np.abs(found.var(0) - 1 / 12).max() < 0.02
    size = found.shape[1]
    assert np.abs(np.corrcoef(found[:, :36].T) - np.eye(36)).max() < 4.5 / 20
    assert np.abs(np.corrcoef(found[1:].T, found[:-1].T)[:size, size:]).max() < 4.5 / 20
    rows, columns, keys = made.of(1)
    part = to_array(uniform(rows, columns, keys[5:6], shapes[1]))
    bits = to_array(rows)[:2, None, None] ^ to_array(columns)[None, None, :] ^ to_array(keys)[5]
    assert np.array_equal(part, (bits / 2**16).astype(np.float32))


@pytest.mark.parametrize("graph", [False, True])
def test_steps_too_small_for_bfloat16_add_up_on_average(graph):
    """Each is a twentieth of what rounding to nearest would keep."""
    weight = Parameter(to_tensor(np.ones((64, 64), np.float32), ms.bfloat16), name="weight")
    settings = SETTINGS | {"weight_decay": 0.0}
    update = Update([weight], rounding_seed=0, mode=Mode(graph=graph), **settings)
    for _ in range(40):
        update.add([to_tensor(np.ones((64, 64), np.float32))])
        update.step(1e-4)
    moved = 1 - to_array(weight).astype(np.float64)
    assert moved.mean() == pytest.approx(40e-4, rel=0.05)
    assert len(np.unique(moved)) > 2
    state = [p for kind in update.state().values() for p in kind]
    assert {p.dtype for p in state} == {ms.bfloat16}
    before = [to_array(p).tobytes() for p in state]
    update.add([to_tensor(np.full((64, 64), np.nan, np.float32))])
    update.step(1e-4)
    assert before == [to_array(p).tobytes() for p in state]


def test_nothing_to_train_is_said():
    with pytest.raises(FactoryError, match=r"lora\.target_modules"):
        Update([], **SETTINGS)
