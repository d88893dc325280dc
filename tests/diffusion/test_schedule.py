"""The noise schedule: limits, identities and order of steps, then equality with diffusers in float64."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.diffusion.schedule import (
    add_noise,
    alphas_cumprod,
    noise_from_v,
    sampling_timesteps,
    training_coefficients,
    v_target,
    x0_from_v,
)
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.models import PUBLISHED, SchedulerConfig

calm = settings(deadline=None, derandomize=True)

CONFIGS = {
    "2b": PUBLISHED["cogvideox-2b"].scheduler,
    "5b": PUBLISHED["cogvideox-5b"].scheduler,
    "plain": SchedulerConfig(rescale_betas_zero_snr=False),
    "short": SchedulerConfig(num_train_timesteps=37, snr_shift_scale=2.0),
}
SPACINGS = ("trailing", "linspace", "leading")


def diffusers_scheduler(config: SchedulerConfig):
    diffusers = pytest.importorskip("diffusers")
    values = config.to_dict()
    values.pop("_class_name")
    return diffusers.CogVideoXDDIMScheduler(**values)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_falls_from_almost_one(config):
    alphas = alphas_cumprod(config)
    assert alphas.dtype == np.float64
    assert alphas.shape == (config.num_train_timesteps,)
    assert (np.diff(alphas) < 0).all()
    assert 0 <= alphas[-1] < alphas[0] < 1
    assert (alphas[-1] == 0) == config.rescale_betas_zero_snr


def test_published_values():
    assert alphas_cumprod(CONFIGS["2b"])[0] == pytest.approx(0.99745, abs=5e-6)
    assert alphas_cumprod(CONFIGS["5b"])[0] == pytest.approx(0.99915, abs=5e-6)
    assert np.mean(1 / (1 - alphas_cumprod(CONFIGS["2b"]))) == pytest.approx(3.16, abs=0.005)
    assert np.mean(1 / (1 - alphas_cumprod(CONFIGS["5b"]))) == pytest.approx(7.34, abs=0.005)


def test_shift_divides_the_snr():
    plain = alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=False))
    shifted = alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=False, snr_shift_scale=3.0))
    np.testing.assert_allclose(shifted / (1 - shifted) * 3, plain / (1 - plain), rtol=1e-11)


def test_rescaling_comes_last():
    """It keeps the first value of the *shifted* schedule; the other order would not."""
    shifted = alphas_cumprod(SchedulerConfig(rescale_betas_zero_snr=False, snr_shift_scale=3.0))
    final = alphas_cumprod(CONFIGS["2b"])
    assert final[0] == pytest.approx(shifted[0], rel=1e-14)
    assert final[500] != pytest.approx(shifted[500], rel=1e-4)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_equals_diffusers(config):
    theirs = diffusers_scheduler(config).alphas_cumprod.numpy()
    assert theirs.dtype == np.float64
    np.testing.assert_allclose(alphas_cumprod(config), theirs, rtol=1e-12, atol=1e-16)


def test_trained_betas():
    config = SchedulerConfig(num_train_timesteps=3, trained_betas=(0.1, 0.2, 0.3), rescale_betas_zero_snr=False)
    np.testing.assert_allclose(alphas_cumprod(config), [0.9, 0.72, 0.504], rtol=1e-14)
    with pytest.raises(UnfitError, match="trained_betas has 3 values, num_train_timesteps is 1000"):
        alphas_cumprod(replace(config, num_train_timesteps=1000))


@calm
@given(st.integers(0, 999), st.integers(0, 2**32 - 1))
def test_parametrisations_invert_each_other(timestep, seed):
    root, rest = (column[timestep] for column in training_coefficients(alphas_cumprod(CONFIGS["5b"])))
    x0, noise = np.random.default_rng(seed).standard_normal((2, 5))
    noisy, v = add_noise(x0, noise, root, rest), v_target(x0, noise, root, rest)
    np.testing.assert_allclose(x0_from_v(noisy, v, root, rest), x0, atol=1e-14)
    np.testing.assert_allclose(noise_from_v(noisy, v, root, rest), noise, atol=1e-14)


def test_limits():
    root, rest = training_coefficients(alphas_cumprod(CONFIGS["2b"]))
    assert (root[-1], rest[-1]) == (0, 1)
    np.testing.assert_allclose(root**2 + rest**2, 1, rtol=1e-14)
    assert add_noise(5.0, 7.0, root[-1], rest[-1]) == 7.0
    assert v_target(5.0, 7.0, root[-1], rest[-1]) == -5.0


@pytest.mark.parametrize("variant", ["2b", "5b"])
def test_plain_v_loss_is_the_weighted_x0_loss(variant):
    """At every timestep, the zero-SNR one included."""
    alphas = alphas_cumprod(CONFIGS[variant])[:, None]
    root, rest = training_coefficients(alphas)
    x0, noise, error = np.random.default_rng(0).standard_normal((3, 1000, 4))
    v = v_target(x0, noise, root, rest)
    predicted = x0_from_v(add_noise(x0, noise, root, rest), v + error, root, rest)
    np.testing.assert_allclose((predicted - x0) ** 2 / (1 - alphas), error**2, rtol=1e-9, atol=1e-12)
    assert np.mean((predicted - x0) ** 2 / (1 - alphas)) == pytest.approx(np.mean(error**2), abs=1e-12)


def test_torch_tensors_give_the_same():
    torch = pytest.importorskip("torch")
    config = CONFIGS["2b"]
    root, rest = training_coefficients(alphas_cumprod(config))
    x0, noise = np.random.default_rng(1).standard_normal((2, 3, 2, 4))
    timesteps = np.array([0, 500, 999])
    shaped = [column[timesteps].reshape(-1, 1, 1) for column in (root, rest)]
    tensors = [torch.from_numpy(array) for array in (x0, noise, *shaped)]
    theirs = diffusers_scheduler(config)
    at = torch.from_numpy(timesteps)
    for ours, reference in ((add_noise, theirs.add_noise), (v_target, theirs.get_velocity)):
        np.testing.assert_array_equal(ours(x0, noise, *shaped), ours(*tensors).numpy())
        np.testing.assert_allclose(ours(*tensors), reference(*tensors[:2], at), atol=1e-14)


@calm
@given(st.integers(1, 1000), st.sampled_from(SPACINGS))
def test_timesteps_fall_within_range(steps, spacing):
    timesteps = sampling_timesteps(steps, spacing)
    assert timesteps.dtype == np.int64
    assert timesteps.shape == (steps,)
    assert (np.diff(timesteps) < 0).all()
    assert timesteps.min() >= 0
    assert timesteps.max() <= 999
    if spacing == "trailing" or (spacing == "linspace" and steps > 1):
        assert timesteps[0] == 999


def test_usual_timesteps():
    np.testing.assert_array_equal(sampling_timesteps(50), np.arange(999, 0, -20))
    np.testing.assert_array_equal(sampling_timesteps(50, "leading"), np.arange(980, -1, -20))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_equal_diffusers_for_every_count(spacing):
    theirs = diffusers_scheduler(SchedulerConfig(timestep_spacing=spacing))
    longer = []
    for steps in range(1, 1001):
        theirs.set_timesteps(steps)
        reference = theirs.timesteps.numpy()
        np.testing.assert_array_equal(sampling_timesteps(steps, spacing), reference[:steps])
        if len(reference) > steps:  # float steps overshoot; that extra timestep is -1
            longer.append(steps)
            assert reference[steps:].tolist() == [-1]
    assert spacing == "trailing" or not longer


def test_steps_offset_equals_diffusers():
    theirs = diffusers_scheduler(SchedulerConfig(timestep_spacing="leading", steps_offset=1))
    theirs.set_timesteps(50)
    np.testing.assert_array_equal(sampling_timesteps(50, "leading", steps_offset=1), theirs.timesteps.numpy())


def test_errors():
    for steps in (0, -1, 1001):
        with pytest.raises(FactoryError, match=f"num_inference_steps={steps} must be 1 to 1000"):
            sampling_timesteps(steps)
    with pytest.raises(FactoryError, match=r"'trailling' is unknown \(did you mean 'trailing'\?\)"):
        sampling_timesteps(50, "trailling")  # pyright: ignore[reportArgumentType]
    with pytest.raises(FactoryError, match="asks for timestep 1000"):
        sampling_timesteps(1000, "leading", steps_offset=1)
