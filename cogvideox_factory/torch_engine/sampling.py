"""The denoising loop: a sampler is a table of scalars, a step a few lines.

B batch, F latent frames, C latent channels, H W latent height and width, S text tokens, E text channels.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.diffusion.samplers import SamplerTable
from cogvideox_factory.torch_engine.objective import predict_v
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer


@torch.inference_mode()
def denoise(
    transformer: CogVideoXTransformer,
    latents: Tensor,
    prompt_embeds: Tensor,
    *,
    table: SamplerTable,
    guidance: Sequence[float],
    negative_embeds: Tensor | None = None,
    image_latents: Tensor | None = None,
    step_noise: Callable[[int], Tensor] | None = None,
    progress: Callable[[int], None] | None = None,
    halves: dist.ProcessGroup | None = None,
) -> Tensor:
    """Turn noise `latents` [B, F, C, H, W] into clean latents, float32.

    `prompt_embeds` and `negative_embeds` [B, S, E] set the model's dtype; `guidance` has one scale a step and needs
    `negative_embeds` unless all are 1. `image_latents` [B, F, C, H, W] are concatenated on channels.
    `step_noise(i)` returns the noise of step i for a stochastic sampler. Two processes, `halves`, may divide guidance:
    the first predicts with the negative prompt, the second with the other, and once a step they exchange that.
    """
    dtype = prompt_embeds.dtype
    guided = negative_embeds is not None
    assert guided or all(g == 1 for g in guidance)
    if not guided:
        embeds = prompt_embeds
    elif halves is None:
        embeds = torch.cat([negative_embeds, prompt_embeds])  # [2B, S, E]
    else:
        embeds = (negative_embeds, prompt_embeds)[halves.rank()]
    timesteps = torch.from_numpy(table.timesteps).to(latents.device)
    sample, previous = latents.float(), None
    for i in range(len(table)):
        model_input = sample.to(dtype)
        if image_latents is not None:
            model_input = torch.cat([model_input, image_latents.to(dtype)], dim=2)
        if guided and halves is None:
            model_input = torch.cat([model_input, model_input])
        timestep = timesteps[i].expand(len(model_input))
        v = predict_v(transformer, model_input, embeds, timestep)
        if guided:
            negative, positive = v.float().chunk(2) if halves is None else _exchanged(v, halves)
            v = negative + guidance[i] * (positive - negative)
        v = v.float()
        noise = step_noise(i) if step_noise is not None and table.uses_noise(i) else None
        sample, previous = table.step(i, sample, v, previous_x0=previous, noise=noise)
        if progress is not None:
            progress(i + 1)
    return sample


def _exchanged(v: Tensor, halves: dist.ProcessGroup) -> list[Tensor]:
    """Return the predictions of both processes, float32."""
    both = [torch.empty_like(v) for _ in range(2)]
    dist.all_gather(both, v.contiguous(), group=halves)
    return [part.float() for part in both]
