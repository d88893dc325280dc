"""Sampler tables: what they must do in the limit, then every step against diffusers' schedulers.

diffusers' DPM scheduler draws noise twice on a second-order step and uses only the second draw, so the parity
runs hand it a generator and replay that draw for ours.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.diffusion.samplers import (
    SAMPLERS,
    ddim_table,
    dpm_table,
    dynamic_guidance,
    guidance_scales,
    sampler_table,
)
from cogvideox_factory.diffusion.schedule import add_noise, alphas_cumprod, training_coefficients, v_target
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, SchedulerConfig

calm = settings(deadline=None, derandomize=True)

CONFIG_2B = PUBLISHED["cogvideox-2b"].scheduler
CONFIG_5B = PUBLISHED["cogvideox-5b"].scheduler
SPACINGS = ("trailing", "linspace", "leading")
STEPS = (1, 2, 3, 5, 15, 20, 30, 50, 51)  # 15: 1000/15 rounds up, so the last step ends at timestep 0


def exact_v(sample, x0, timestep, config):
    """Return the v of a network that knows `x0`."""
    root, rest = (column[timestep] for column in training_coefficients(alphas_cumprod(config)))
    return v_target(x0, (sample - root * x0) / rest, root, rest)


@calm
@given(st.sampled_from(sorted(SAMPLERS)), st.integers(1, 1000), st.sampled_from(SPACINGS))
def test_finite_and_in_order(name, steps, spacing):
    table = sampler_table(name, CONFIG_2B, steps, spacing=spacing)
    assert len(table) == steps
    assert table.coefficients.shape == (steps, 4)
    assert table.x0_coefficients.shape == (steps, 2)
    assert np.isfinite(table.coefficients).all()
    assert (table.coefficients[:, 3] >= 0).all()
    assert not table.uses_previous(0)


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_a_network_that_knows_the_answer_gets_it(name, steps):
    """With an exact prediction any number of steps ends on x0, whatever the noise."""
    rng = np.random.default_rng(0)
    x0, sample = rng.standard_normal((2, 6))
    table, previous = sampler_table(name, CONFIG_5B, steps), None
    for i, t in enumerate(table.timesteps):
        v = exact_v(sample, x0, t, CONFIG_5B)
        sample, previous = table.step(i, sample, v, previous_x0=previous, noise=rng.standard_normal(6))
        np.testing.assert_allclose(previous, x0, atol=1e-13)
    np.testing.assert_allclose(sample, x0, atol=1e-13)


@pytest.mark.parametrize("steps", [2, 10, 50])  # divisors of 1000: steps end where the next begins
def test_ddim_stays_on_the_line(steps):
    """With an exact prediction, each DDIM sample is x0 mixed with the same noise at the next level."""
    rng = np.random.default_rng(1)
    x0, noise = rng.standard_normal((2, 6))
    root, rest = training_coefficients(alphas_cumprod(CONFIG_2B))
    table, sample = ddim_table(CONFIG_2B, steps, spacing="trailing"), noise
    for i, t in enumerate(table.timesteps[:-1]):
        sample, _ = table.step(i, sample, v_target(x0, noise, root[t], rest[t]))
        end = t - 1000 // steps
        np.testing.assert_allclose(sample, add_noise(x0, noise, root[end], rest[end]), atol=1e-13)


@pytest.mark.parametrize("steps", [2, 10, 50, 250])
def test_dpm_noise_level_is_right(steps):
    """Signal and noise variance add up: what is left of the sample and fresh noise make the next level."""
    alphas = alphas_cumprod(CONFIG_5B)
    table = dpm_table(CONFIG_5B, steps)
    now = alphas[table.timesteps]
    ends = table.timesteps - 1000 // steps
    after = np.where(ends >= 0, alphas[ends], 1.0)
    on_sample, on_x0, on_previous, on_noise = table.coefficients.T
    np.testing.assert_allclose(on_sample * np.sqrt(now) + on_x0 + on_previous, np.sqrt(after), atol=1e-13)
    np.testing.assert_allclose(on_sample**2 * (1 - now) + on_noise**2, 1 - after, atol=1e-13)


def test_zero_snr_step_forgets_the_sample():
    for name in SAMPLERS:
        table = sampler_table(name, CONFIG_2B, 50)
        np.testing.assert_array_equal(table.x0_coefficients[0], [0, -1])
    # DDIM carries the pure noise on; DPM draws it anew.
    assert ddim_table(CONFIG_2B, 50).coefficients[0, 0] > 0
    assert dpm_table(CONFIG_2B, 50).coefficients[0, 0] == 0
    assert dpm_table(CONFIG_2B, 50).coefficients[1, 2] == 0  # h_last is infinite: nothing to extrapolate from


@pytest.mark.parametrize("name", SAMPLERS)
def test_last_step_returns_x0(name):
    np.testing.assert_array_equal(sampler_table(name, CONFIG_5B, 50).coefficients[-1], [0, 1, 0, 0])


def test_which_steps_need_what():
    ddim, dpm = ddim_table(CONFIG_5B, 10), dpm_table(CONFIG_5B, 10)
    assert not any(ddim.uses_noise(i) or ddim.uses_previous(i) for i in range(10))
    assert [dpm.uses_noise(i) for i in range(10)] == [True] * 9 + [False]
    assert [dpm.uses_previous(i) for i in range(10)] == [False] * 2 + [True] * 7 + [False]


def diffusers_run(name, config, steps, spacing, dtype):
    """Yield (ours, theirs) samples after each step, both driven by the same v and the noise that counts."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    values = config.to_dict() | {"timestep_spacing": spacing}
    values.pop("_class_name")
    kind = diffusers.CogVideoXDDIMScheduler if name == "ddim" else diffusers.CogVideoXDPMScheduler
    scheduler = kind(**values)
    scheduler.set_timesteps(steps)
    table = sampler_table(name, config, steps, spacing=spacing)
    dtype = getattr(torch, dtype)
    drawn = torch.Generator().manual_seed(steps)
    theirs = torch.randn(12, generator=drawn, dtype=torch.float64).to(dtype)
    ours, their_x0, our_x0 = theirs.clone(), None, None
    for i, t in enumerate(scheduler.timesteps[:steps]):
        # An arbitrary but bounded "network" of the sample and the time.
        their_v, our_v = (torch.sin(3 * sample + t / 100) for sample in (theirs, ours))
        noise_seed = torch.Generator().manual_seed(1000 + i)
        replay = torch.Generator().manual_seed(1000 + i)
        if name == "ddim":
            theirs = scheduler.step(their_v, t, theirs, return_dict=False)[0]
            noise = None
        else:
            second_order = i > 0 and t - 1000 // steps >= 0
            draws = [torch.randn(12, generator=replay, dtype=dtype) for _ in range(1 + second_order)]
            noise = draws[-1]
            back = scheduler.timesteps[i - 1] if i > 0 else None
            theirs, their_x0 = scheduler.step(their_v, their_x0, t, back, theirs, generator=noise_seed)
        ours, our_x0 = table.step(i, ours, our_v, previous_x0=our_x0, noise=noise)
        yield ours, theirs


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("config", [CONFIG_2B, CONFIG_5B], ids=["2b", "5b"])
@pytest.mark.parametrize("steps", STEPS)
def test_equals_diffusers_in_float64(name, spacing, config, steps):
    for i, (ours, theirs) in enumerate(diffusers_run(name, config, steps, spacing, "float64")):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12, err_msg=f"step {i}")


@pytest.mark.parametrize("name", SAMPLERS)
def test_equals_diffusers_in_float32(name):
    """The chaotic test network doubles rounding errors along the way; 1e-4 after 50 steps is rounding."""
    *_, (ours, theirs) = diffusers_run(name, CONFIG_5B, 50, "trailing", "float32")
    assert ours.dtype == theirs.dtype
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_final_alpha_from_the_schedule(name):
    """`set_alpha_to_one` false ends at the first alpha instead of 1, as some uploads say."""
    config = SchedulerConfig(set_alpha_to_one=False)
    for ours, theirs in diffusers_run(name, config, 7, "trailing", "float64"):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_spacing_none_is_the_configs():
    config = SchedulerConfig(timestep_spacing="linspace")
    np.testing.assert_array_equal(ddim_table(config, 7).timesteps, ddim_table(config, 7, spacing="linspace").timesteps)
    assert ddim_table(config, 7).timesteps[-1] == 0


def test_deterministic():
    first, second = dpm_table(CONFIG_5B, 50), dpm_table(CONFIG_5B, 50)
    np.testing.assert_array_equal(first.coefficients, second.coefficients)


def test_numpy_and_torch_agree():
    torch = pytest.importorskip("torch")
    table = dpm_table(CONFIG_5B, 10)
    arrays = np.random.default_rng(0).standard_normal((4, 3))
    sample, v, previous, noise = (torch.from_numpy(array) for array in arrays)
    ours = table.step(4, arrays[0], arrays[1], previous_x0=arrays[2], noise=arrays[3])
    theirs = table.step(4, sample, v, previous_x0=previous, noise=noise)
    for a, b in zip(ours, theirs):
        np.testing.assert_array_equal(a, b.numpy())
    assert (
        table.step(4, sample.half(), v.half(), previous_x0=previous.half(), noise=noise.half())[0].dtype == torch.half
    )


def test_unknown_sampler():
    with pytest.raises(FactoryError, match=r"sampler='dpn' is unknown \(did you mean 'dpm'\?\)"):
        sampler_table("dpn", CONFIG_5B, 50)


def test_dynamic_guidance_rises_from_one():
    scale = dynamic_guidance(6.0, 50)
    assert scale.shape == (50,)
    assert scale[0] == 1
    assert (np.diff(scale) >= 0).all()
    assert 6 < scale[-1] < 7
    np.testing.assert_array_equal(dynamic_guidance(0.0, 50), np.ones(50))


def test_dynamic_guidance_as_diffusers_has_it():
    timesteps = dpm_table(CONFIG_5B, 50).timesteps
    expected = [1 + 6.0 * ((1 - math.cos(math.pi * ((50 - t) / 50) ** 5.0)) / 2) for t in timesteps.tolist()]
    np.testing.assert_allclose(dynamic_guidance(6.0, 50, raw_timesteps=timesteps), expected, rtol=1e-12)


def test_guidance_is_left_out_before_and_behind_its_interval():
    assert guidance_scales(6.0, 4) == [6.0] * 4
    assert guidance_scales(6.0, 4, dynamic=True) == dynamic_guidance(6.0, 4).tolist()
    assert guidance_scales(6.0, 10, interval=(0.2, 0.7)) == [1.0] * 2 + [6.0] * 5 + [1.0] * 3
    assert guidance_scales(6.0, 3, interval=(0.0, 0.5), dynamic=True) == [*dynamic_guidance(6.0, 3)[:2], 1.0]
    for interval in ((0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1), (0.21, 0.24)):
        with pytest.raises(FactoryError, match="holds none of 10 steps"):
            guidance_scales(6.0, 10, interval=interval)


@given(st.integers(1, 60), st.floats(0, 1), st.floats(0, 1))
def test_intervals_that_meet_guide_every_step_once(steps, start, middle):
    start, middle = sorted((start, middle))
    parts = [
        part
        for part in ((0.0, start), (start, middle), (middle, 1.0))
        if round(part[0] * steps) < round(part[1] * steps)
    ]
    guided = sum(np.array(guidance_scales(6.0, steps, interval=part)) == 6 for part in parts)
    np.testing.assert_array_equal(guided, np.ones(steps))
