"""`cpu.denoise.mid`: the denoising loop against the diffusers pipeline's, guidance and scheduler included.

4 layers of width 768, 1350 video + 226 text tokens, batch 2 for guidance, 10 DDIM steps, float32.
"""

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline

from benchmarks.interleave import Ratio, interleave
from benchmarks.train import FRAMES, HEIGHT, TEXT, WIDTH, mid_config, models
from cogvideox_factory.diffusion.samplers import ddim_table
from cogvideox_factory.models import SchedulerConfig, tiny_facts
from cogvideox_factory.torch_engine.sampling import denoise

STEPS = 10


def run() -> list[Ratio]:
    """Return the ratio; latents are compared first."""
    theirs, ours = models()
    ours.eval()
    vae = AutoencoderKLCogVideoX.from_config(tiny_facts("cogvideox-5b").vae.to_dict())
    scheduler = CogVideoXDDIMScheduler.from_config(SchedulerConfig().to_dict())
    pipe = CogVideoXPipeline(tokenizer=None, text_encoder=None, vae=vae, transformer=theirs, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, FRAMES, 16, HEIGHT, WIDTH, generator=g)
    positive, negative = torch.randn(2, 1, TEXT, mid_config().text_embed_dim, generator=g)
    table = ddim_table(SchedulerConfig(), STEPS)

    def baseline() -> torch.Tensor:
        return pipe(
            prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents, height=8 * HEIGHT,
            width=8 * WIDTH, num_frames=4 * FRAMES - 3, num_inference_steps=STEPS, guidance_scale=6.0,
            max_sequence_length=TEXT, output_type="latent", return_dict=False,
        )[0]  # fmt: skip

    def candidate() -> torch.Tensor:
        return denoise(ours, latents, positive, table=table, guidance=[6.0] * STEPS, negative_embeds=negative)

    error = (baseline() - candidate()).abs().max().item()
    assert error < 2e-3, f"latents differ by {error:.1e}"
    return [
        interleave(
            "cpu.denoise.mid",
            baseline,
            candidate,
            target=1.15,
            num_rounds=3,
            note="f32, 10 DDIM steps",
            with_ceiling=True,
        )
    ]
