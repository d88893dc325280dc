"""The noise schedule of the family as float64 tables, and the v-parametrisation as plain arithmetic.

The order of the three steps decides the numbers: betas -> cumulative product -> SNR shift -> zero terminal
SNR.

Zero terminal SNR and trailing spacing: Lin et al., "Common Diffusion Noise Schedules and Sample Steps Are
Flawed" (WACV 2024), algorithm 1 and table 2. v-prediction: Salimans & Ho, "Progressive Distillation" (ICLR
2022), appendix D.
"""

from typing import Any, Literal

import numpy as np

from cogvideox_factory.errors import FactoryError, UnfitError, nearest
from cogvideox_factory.models import SchedulerConfig

Spacing = Literal["trailing", "linspace", "leading"]
_SPACINGS = ("trailing", "linspace", "leading")


def alphas_cumprod(config: SchedulerConfig) -> np.ndarray:
    """Return alpha-bar for every training timestep, float64 `[num_train_timesteps]`, falling.

    With `rescale_betas_zero_snr` the last value is exactly 0: the network starts from pure noise.

    Raises:
        UnfitError: `trained_betas` of another length than `num_train_timesteps`.
    """
    if config.trained_betas is not None:
        betas = np.asarray(config.trained_betas, dtype=np.float64)
        if len(betas) != config.num_train_timesteps:
            raise UnfitError(
                f"trained_betas has {len(betas)} values, num_train_timesteps is "
                f"{config.num_train_timesteps}; they must agree. "
                "Check scheduler/scheduler_config.json of the model folder."
            )
    else:
        betas = np.linspace(config.beta_start**0.5, config.beta_end**0.5, config.num_train_timesteps) ** 2
    alphas = np.cumprod(1 - betas)
    # Multiplies the signal-to-noise ratio alpha-bar / (1 - alpha-bar) by 1 / s (Esser et al., SD3, section
    # 5.3.2).
    alphas = alphas / (config.snr_shift_scale + (1 - config.snr_shift_scale) * alphas)
    return _zero_terminal_snr(alphas) if config.rescale_betas_zero_snr else alphas


def _zero_terminal_snr(alphas: np.ndarray) -> np.ndarray:
    root = np.sqrt(alphas)
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2


def training_coefficients(alphas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (sqrt(alpha-bar), sqrt(1 - alpha-bar)), float64, shape of `alphas`."""
    return np.sqrt(alphas), np.sqrt(1 - alphas)


def sampling_timesteps(
    num_inference_steps: int,
    spacing: Spacing = "trailing",
    num_train_timesteps: int = 1000,
    *,
    steps_offset: int = 0,
) -> np.ndarray:
    """Return the timesteps a sampler visits, int64 `[num_inference_steps]`, falling.

    `trailing` and `linspace` start at the last timestep, where the SNR is zero. `leading` never visits it,
    which is wrong for this family; it is here because a checkpoint's config may name it. `steps_offset`
    acts on `leading` only.

    Raises:
        FactoryError: a step count or spacing there is no schedule for.
    """
    last = num_train_timesteps
    if not 1 <= num_inference_steps <= last:
        raise FactoryError(
            f"num_inference_steps={num_inference_steps} must be 1 to {last}, the number of timesteps the "
            "model was trained on. Usual: 50."
        )
    if spacing == "trailing":
        # The slice guards against float steps that overshoot the end; rounding is half to even, as the
        # checkpoints'.
        steps = np.round(np.arange(last, 0, -last / num_inference_steps)[:num_inference_steps]) - 1
    elif spacing == "linspace":
        steps = np.round(np.linspace(0, last - 1, num_inference_steps))[::-1]
    elif spacing == "leading":
        steps = (np.arange(num_inference_steps) * (last // num_inference_steps))[::-1] + steps_offset
        if steps[0] >= last:
            raise FactoryError(
                f"timestep_spacing='leading' with {num_inference_steps} steps and "
                f"steps_offset={steps_offset} asks for timestep {steps[0]}; the last one is {last - 1}. "
                "Use fewer steps or 'trailing'."
            )
    else:
        raise FactoryError(
            f"timestep_spacing={spacing!r} is unknown{nearest(spacing, list(_SPACINGS))}. Use {', '.join(_SPACINGS)}."
        )
    return np.ascontiguousarray(steps, dtype=np.int64)


# Each formula below takes arrays or tensors of one shape, and coefficients that broadcast against them:
# scalars, or `sqrt_alpha[timesteps]` reshaped to [B, 1, 1, 1, 1]. Results have the arguments' type.


def add_noise(x0: Any, noise: Any, sqrt_alpha: Any, sqrt_one_minus_alpha: Any) -> Any:
    """Return x_t, the sample `x0` with `noise` mixed in."""
    return sqrt_alpha * x0 + sqrt_one_minus_alpha * noise


def v_target(x0: Any, noise: Any, sqrt_alpha: Any, sqrt_one_minus_alpha: Any) -> Any:
    """Return v, what the network is trained to predict from x_t.

    Plain MSE on v equals the x0 error weighted by 1 / (1 - alpha-bar), and stays finite where that weight
    does not.
    """
    return sqrt_alpha * noise - sqrt_one_minus_alpha * x0


def x0_from_v(noisy: Any, v: Any, sqrt_alpha: Any, sqrt_one_minus_alpha: Any) -> Any:
    """Return the clean sample that x_t and v imply."""
    return sqrt_alpha * noisy - sqrt_one_minus_alpha * v


def noise_from_v(noisy: Any, v: Any, sqrt_alpha: Any, sqrt_one_minus_alpha: Any) -> Any:
    """Return the noise that x_t and v imply."""
    return sqrt_alpha * v + sqrt_one_minus_alpha * noisy
