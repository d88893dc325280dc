"""Samplers as tables of scalars: an engine's denoising loop is two linear combinations a step.

    table = dpm_table(config, 50)
    x0 = None
    for i, t in enumerate(table.timesteps):
        v = network(sample, t)
        sample, x0 = table.step(i, sample, v, previous_x0=x0, noise=draw(i))

Both samplers are linear in (sample, prediction, previous x0, noise), so everything a method and a schedule
decide fits in six float64 numbers a step. The end of a step is `t - 1000 // steps`, as in the samplers the
checkpoints are published with, also where that is not the next timestep of the list (1000 / steps no
integer).

DDIM (eta 0): Song et al. (ICLR 2021), equation 12. DPM-Solver++ SDE 2M: Lu et al., "DPM-Solver++" (2022),
appendix; the last step, and the first, are first order.

Noise: a step takes *one* draw. diffusers' scheduler draws once more on every second-order step and throws
that first draw away, so to reproduce its numbers feed the second one (a step is second order where column
`previous_x0` is not 0).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvideox_factory.diffusion.schedule import Spacing, alphas_cumprod, sampling_timesteps
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.models import SchedulerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerTable:
    """What a sampler does at each of its T steps.

    x0            = x0_coefficients[i] . (sample, v)
    next sample   = coefficients[i]    . (sample, x0, previous x0, noise)
    """

    timesteps: np.ndarray
    """[T] int64, falling; what the network is told."""
    x0_coefficients: np.ndarray
    """[T, 2] float64, columns (sample, v)."""
    coefficients: np.ndarray
    """[T, 4] float64, columns (sample, x0, previous x0, noise)."""

    def __len__(self) -> int:
        return len(self.timesteps)

    def uses_noise(self, index: int) -> bool:
        """Tell whether step `index` adds noise; if not, none need be drawn."""
        return bool(self.coefficients[index, 3] != 0)

    def uses_previous(self, index: int) -> bool:
        """Tell whether step `index` looks at the x0 of the step before (second order)."""
        return bool(self.coefficients[index, 2] != 0)

    def tail(self, start: int) -> "SamplerTable":
        """Return the steps from `start` on, for a sample that is noised to there; the first is of first order."""
        assert 0 <= start < len(self), start
        coefficients = self.coefficients[start:].copy()
        coefficients[0, 1] += coefficients[0, 2]  # without an x0 before it, nothing is extrapolated
        coefficients[0, 2] = 0
        return SamplerTable(
            timesteps=self.timesteps[start:], x0_coefficients=self.x0_coefficients[start:], coefficients=coefficients
        )

    def noised(self, x0: Any, noise: Any) -> Any:
        """Return `x0` with as much noise as the first step expects."""
        on_sample, on_v = self.x0_coefficients[0].tolist()
        return on_sample * x0 - on_v * noise

    def step(self, index: int, sample: Any, v: Any, *, previous_x0: Any = None, noise: Any = None) -> tuple[Any, Any]:
        """Return (next sample, x0 prediction), of the arguments' type and shape.

        `previous_x0` and `noise` may be None where `uses_previous` and `uses_noise` say so. Run it in
        float32: a half-precision sample loses more between steps than the sampler's own error.
        """
        on_sample, on_v = self.x0_coefficients[index].tolist()
        x0 = on_sample * sample + on_v * v
        on_sample, on_x0, on_previous, on_noise = self.coefficients[index].tolist()
        result = on_sample * sample + on_x0 * x0
        if on_previous != 0:
            assert previous_x0 is not None, f"step {index} needs the x0 of the step before"
            result = result + on_previous * previous_x0
        if on_noise != 0:
            assert noise is not None, f"step {index} needs noise"
            result = result + on_noise * noise
        return result, x0


def ddim_table(config: SchedulerConfig, num_inference_steps: int, *, spacing: Spacing | None = None) -> SamplerTable:
    """Return deterministic DDIM. `spacing` None takes the config's.

    Raises:
        FactoryError: as `sampling_timesteps`.
    """
    timesteps, alpha, alpha_next, _ = _levels(config, num_inference_steps, spacing)
    on_sample = np.sqrt((1 - alpha_next) / (1 - alpha))
    on_x0 = np.sqrt(alpha_next) - np.sqrt(alpha) * on_sample
    zero = np.zeros_like(alpha)
    return _table(timesteps, alpha, on_sample, on_x0, zero, zero)


def dpm_table(config: SchedulerConfig, num_inference_steps: int, *, spacing: Spacing | None = None) -> SamplerTable:
    """Return CogVideoX's DPM-Solver++ SDE 2M. `spacing` None takes the config's.

    Raises:
        FactoryError: as `sampling_timesteps`.
    """
    timesteps, alpha, alpha_next, ends = _levels(config, num_inference_steps, spacing)
    # At zero SNR log_snr is -inf, at the final alpha of 1 it is +inf; h is then inf, exp(-h) 0, and every
    # factor below reaches its limit without NaN.
    h = _half_log_snr(alpha_next) - _half_log_snr(alpha)
    decay = np.exp(-h)
    on_sample = np.sqrt((1 - alpha_next) / (1 - alpha)) * decay
    on_x0 = -np.expm1(-2 * h) * np.sqrt(alpha_next)
    on_noise = np.sqrt(1 - alpha_next) * np.sqrt(-np.expm1(-2 * h))

    # Second order extrapolates x0 to (1 + k) x0 - k previous, k = 1 / (2r) = h / (2 h_last).
    extrapolation = np.zeros_like(alpha)
    inner = np.flatnonzero(~ends[1:]) + 1
    h_last = _half_log_snr(alpha[inner]) - _half_log_snr(alpha[inner - 1])
    extrapolation[inner] = h[inner] / (2 * h_last)
    return _table(timesteps, alpha, on_sample, on_x0 * (1 + extrapolation), -on_x0 * extrapolation, on_noise)


SAMPLERS: dict[str, Callable[..., SamplerTable]] = {"ddim": ddim_table, "dpm": dpm_table}


def sampler_table(
    name: str, config: SchedulerConfig, num_inference_steps: int, *, spacing: Spacing | None = None
) -> SamplerTable:
    """Return the table of the sampler called `name` ("ddim" or "dpm").

    Raises:
        FactoryError: no such sampler, or as `sampling_timesteps`.
    """
    if name not in SAMPLERS:
        raise FactoryError(
            f"sampler={name!r} is unknown{nearest(name, list(SAMPLERS))}. Use ddim (CogVideoX-2B's own) or "
            "dpm (that of the 5B and 1.5 models)."
        )
    return SAMPLERS[name](config, num_inference_steps, spacing=spacing)


def dynamic_guidance(guidance_scale: float, num_steps: int, *, raw_timesteps: np.ndarray | None = None) -> np.ndarray:
    """Return the guidance scale of every step, float64 `[num_steps]`, from 1 up towards 1 + `guidance_scale`.

    The formula is DynamicCFG of the models' original code base (exponent 5), over the index of the step.
    diffusers puts raw timesteps (0 to 999) where the index belongs, which makes the scale jump about; to
    reproduce its numbers pass the sampler's timesteps as `raw_timesteps`.
    """
    index = np.arange(num_steps) if raw_timesteps is None else num_steps - np.asarray(raw_timesteps)
    return 1 + guidance_scale * (1 - np.cos(np.pi * (index / num_steps) ** 5.0)) / 2


def guidance_scales(
    guidance_scale: float, num_steps: int, *, dynamic: bool = False, interval: Sequence[float] = (0.0, 1.0)
) -> list[float]:
    """Return the guidance scale of every step; 1, which is none, outside of `interval`, two shares of the steps.

    Early steps guided strongly narrow what is drawn, late ones change little (Kynkaanniemi et al., "Applying Guidance
    in a Limited Interval", 2024, arXiv 2404.07724).

    Raises:
        FactoryError: a scale below 1; no step; an interval that is none, or that no step falls into.
    """
    if not guidance_scale >= 1:
        raise FactoryError(f"guidance_scale={guidance_scale:g} must be 1 (no guidance) or more; usual: 6.")
    if num_steps < 1:
        raise FactoryError(f"num_inference_steps={num_steps} must be 1 or more; usual: 50.")
    start, stop = interval
    first, end = round(start * num_steps), round(stop * num_steps)
    if not 0 <= start < stop <= 1 or first == end:
        raise FactoryError(
            f"guidance_interval={start:g} {stop:g} holds none of {num_steps} steps; give two shares of them, the "
            "smaller first, such as 0.1 0.8."
        )
    scales = dynamic_guidance(guidance_scale, num_steps) if dynamic else np.full(num_steps, guidance_scale)
    return [float(scale) if first <= step < end else 1.0 for step, scale in enumerate(scales)]


def _levels(
    config: SchedulerConfig, num_inference_steps: int, spacing: Spacing | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return (timesteps, alpha-bar there, alpha-bar where the step ends, whether that is beyond 0)."""
    alphas = alphas_cumprod(config)
    timesteps = sampling_timesteps(
        num_inference_steps,
        spacing or config.timestep_spacing,
        config.num_train_timesteps,
        steps_offset=config.steps_offset,
    )
    ends_at = timesteps - config.num_train_timesteps // num_inference_steps
    final = 1.0 if config.set_alpha_to_one else alphas[0]
    return timesteps, alphas[timesteps], np.where(ends_at >= 0, alphas[ends_at], final), ends_at < 0


def _half_log_snr(alpha: np.ndarray) -> np.ndarray:
    """Return lambda = log(sqrt(alpha) / sqrt(1 - alpha)); -inf at 0 and inf at 1 are meant."""
    with np.errstate(divide="ignore"):
        return 0.5 * (np.log(alpha) - np.log1p(-alpha))


def _table(timesteps: np.ndarray, alpha: np.ndarray, *columns: np.ndarray) -> SamplerTable:
    coefficients = np.stack(columns, axis=1)
    assert np.isfinite(coefficients).all()
    return SamplerTable(
        timesteps=timesteps,
        x0_coefficients=np.stack([np.sqrt(alpha), -np.sqrt(1 - alpha)], axis=1),
        coefficients=coefficients,
    )
