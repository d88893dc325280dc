"""The denoising loop: a sampler is a table of scalars, a step a few lines.

Nothing in it waits for the device: what a step does is known beforehand, and its scalars are arguments of the kernels.
Only the first-block cache (`reuse`) must look at numbers on the way.

B batch, F latent frames, C latent channels, H W latent height and width, S text tokens, E text channels.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.diffusion.samplers import SamplerTable
from cogvideox_factory.torch_engine.block import VECTORS_PER_BLOCK
from cogvideox_factory.torch_engine.objective import make_ofs, predict_v
from cogvideox_factory.torch_engine.reuse import Reuse, Shortcut
from cogvideox_factory.torch_engine.time_embedding import Instant
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

_INSTANT_BYTES = 64 * 2**20
"""Of the modulation's vectors that are made ahead: those of 20 steps of the 5B models in 16 bits."""


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
    reuse: Reuse | None = None,
    told: Callable[[int], None] | None = None,
) -> Tensor:
    """Turn noise `latents` [B, F, C, H, W] into clean latents, float32.

    Args:
        transformer: predicts v.
        latents: noise, or what is noised to where the table begins.
        prompt_embeds: [B, S, E], as `negative_embeds`; they set the model's dtype.
        table: the sampler's.
        guidance: one scale a step; a step with 1 predicts once, without the negative prompt.
        negative_embeds: needed unless all scales are 1.
        image_latents: [B, F, C, H, W], concatenated on channels.
        step_noise: returns the noise of step i for a stochastic sampler.
        progress: told how many steps are done.
        halves: two processes that divide guidance: the first predicts with the negative prompt, the second with the
            other, and once a step they exchange that.
        reuse: lossy shortcuts.
        told: told in the end how many steps took one.
    """
    dtype = prompt_embeds.dtype
    guided = [scale != 1 for scale in guidance]
    assert negative_embeds is not None or not any(guided)
    if image_latents is not None:
        image_latents = image_latents.to(dtype)
    times = _embed_times(transformer, table, latents.device, dtype)
    shortcut = reuse.begin(times, [a != b for a, b in zip(guided, [None, *guided])]) if reuse else None
    sample, previous = latents.float(), None
    for i, instant in enumerate(_instants(transformer, times)):
        model_input = sample.to(dtype)
        if image_latents is not None:
            model_input = torch.cat([model_input, image_latents], dim=2)
        if guided[i]:
            assert negative_embeds is not None
            negative, positive = _both(
                transformer, model_input, (negative_embeds, prompt_embeds), instant, halves, shortcut
            )
            v = negative + guidance[i] * (positive - negative)
        else:
            v = predict_v(transformer, model_input, prompt_embeds, instant, shortcut=shortcut).float()
        noise = step_noise(i) if step_noise is not None and table.uses_noise(i) else None
        sample, previous = table.step(i, sample, v, previous_x0=previous, noise=noise)
        if progress is not None:
            progress(i + 1)
    if told is not None:
        told(shortcut.num_reused if shortcut else 0)
    return sample


def _embed_times(
    transformer: CogVideoXTransformer, table: SamplerTable, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return the time embeddings of all steps [T, E']."""
    timesteps = torch.from_numpy(table.timesteps).to(device)
    return transformer.embed_time(timesteps, make_ofs(transformer, device, dtype), dtype)


def _instants(transformer: CogVideoXTransformer, times: Tensor) -> Iterator[Instant]:
    """Yield what the transformer needs to know of each step, made for as many steps at once as bounded memory holds."""
    config = transformer.config
    size = VECTORS_PER_BLOCK * config.num_layers * config.width * times.element_size()
    for part in times.split(max(1, _INSTANT_BYTES // size)):
        yield from transformer.instants(part)


def _both(
    transformer: CogVideoXTransformer,
    model_input: Tensor,
    embeds: tuple[Tensor, Tensor],
    instant: Instant,
    halves: dist.ProcessGroup | None,
    shortcut: Shortcut | None,
) -> Sequence[Tensor]:
    """Return the predictions with the negative prompt and with the other of `embeds`, float32."""
    if halves is None:
        twice = torch.cat([model_input, model_input])
        return predict_v(transformer, twice, torch.cat(embeds), instant, shortcut=shortcut).float().chunk(2)
    v = predict_v(transformer, model_input, embeds[halves.rank()], instant, shortcut=shortcut)
    return _exchanged(v, halves)


def _exchanged(v: Tensor, halves: dist.ProcessGroup) -> list[Tensor]:
    """Return the predictions of both processes, float32."""
    both = [torch.empty_like(v) for _ in range(2)]
    dist.all_gather(both, v.contiguous(), group=halves)
    return [part.float() for part in both]
