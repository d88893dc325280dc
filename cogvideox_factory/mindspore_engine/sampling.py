"""The denoising loop: a sampler is a table of scalars, a step a few lines.

B batch, F latent frames, C latent channels, H W latent height and width, S text tokens, E text channels.
"""

from collections.abc import Callable, Sequence

import mindspore as ms
import numpy as np
from mindspore import Tensor, ops

from cogvideox_factory.diffusion.samplers import SamplerTable
from cogvideox_factory.mindspore_engine.border import to_tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]
"""v [B, F, C, H, W] of (latents [B, F, C', H, W], prompt_embeds [B, S, E], timesteps [B])."""


def denoise(
    predict: Predict,
    latents: Tensor,
    prompt_embeds: Tensor,
    *,
    table: SamplerTable,
    guidance: Sequence[float],
    negative_embeds: Tensor | None = None,
    image_latents: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Tensor:
    """Turn noise `latents` [B, F, C, H, W] into clean latents, float32.

    `prompt_embeds` and `negative_embeds` [B, S, E] set the model's dtype; `guidance` has one scale a step: a
    step with 1 predicts once, the others need `negative_embeds`. `image_latents` [B, F, C, H, W] are concatenated on
    channels. `step_noise(i)` returns the noise of step i for a stochastic sampler.
    """
    dtype = prompt_embeds.dtype
    both = None if negative_embeds is None else ops.concat((negative_embeds, prompt_embeds))  # [2B, S, E]
    sample, previous = latents.astype(ms.float32), None
    for i in range(len(table)):
        model_input = sample.astype(dtype)
        if image_latents is not None:
            model_input = ops.concat((model_input, image_latents.astype(dtype)), axis=2)
        embeds, guided = prompt_embeds, guidance[i] != 1
        if guided:
            assert both is not None, "guidance needs negative_embeds"
            embeds, model_input = both, ops.concat((model_input, model_input))
        timesteps = to_tensor(np.full(model_input.shape[0], table.timesteps[i], np.int64))
        v = predict(model_input, embeds, timesteps).astype(ms.float32)
        if guided:
            negative, positive = ops.chunk(v, 2)
            v = negative + float(guidance[i]) * (positive - negative)
        noise = step_noise(i) if step_noise is not None and table.uses_noise(i) else None
        sample, previous = table.step(i, sample, v, previous_x0=previous, noise=noise)
        if progress is not None:
            progress(i + 1)
    return sample
