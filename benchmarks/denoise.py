"""`cpu.denoise.*`: making a video against the diffusers pipeline.

4 layers of width 768, 1350 video + 226 text tokens, batch 2 for guidance, 10 DDIM steps, float32. `loop` is denoising
alone, scheduler included; `mid` is a whole call: a T5 encoder of 4 layers of width 512 for both prompts, denoising, and
decoding to 24 frames of 240x240 with a VAE of (32, 64, 64, 128) channels.
"""

from collections.abc import Callable
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline
from transformers import T5Config, T5EncoderModel

from benchmarks import vae
from benchmarks.interleave import Ratio, interleave
from benchmarks.train import CPU, FRAMES, HEIGHT, TEXT, WIDTH, mid_config, models
from cogvideox_factory import draws
from cogvideox_factory.diffusion.samplers import ddim_table
from cogvideox_factory.models import SchedulerConfig
from cogvideox_factory.tiny.build import build_tiny_model
from cogvideox_factory.torch_engine import pipeline
from cogvideox_factory.torch_engine.sampling import denoise
from cogvideox_factory.torch_engine.text_encoder import TextEncoder, load_tokenizer

STEPS, SEED = 10, 3
PROMPT, NEGATIVE = "a large red circle moves right on a white background", "a small blue square"
SIZE: dict[str, Any] = {"height": 8 * HEIGHT, "width": 8 * WIDTH, "num_frames": 4 * FRAMES - 3}


def pipelines() -> tuple[CogVideoXPipeline, pipeline.CogVideoXPipeline]:
    """Return diffusers' pipeline and ours with the same weights; the text encoder is one for both."""
    their_transformer, our_transformer = models()
    their_vae, our_vae = vae.models()
    with TemporaryDirectory() as folder:
        tokenizer = load_tokenizer(build_tiny_model(f"{folder}/tiny", "cogvideox-5b", 0, "float32"))
    width = mid_config().text_embed_dim
    torch.manual_seed(0)
    t5 = T5EncoderModel(
        T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=64, d_ff=2 * width, num_layers=4, num_heads=width // 64)
    ).eval()
    theirs = CogVideoXPipeline(
        tokenizer=tokenizer, text_encoder=t5, vae=their_vae, transformer=their_transformer,
        scheduler=CogVideoXDDIMScheduler.from_config(SchedulerConfig().to_dict()),
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    ours = pipeline.CogVideoXPipeline(
        transformer=our_transformer.eval().requires_grad_(False), vae=our_vae, text_encoder=TextEncoder(t5, tokenizer),
        scheduler=SchedulerConfig(), device=CPU, dtype=torch.float32,
    )  # fmt: skip
    return theirs, ours


def loops(theirs: CogVideoXPipeline, ours: pipeline.CogVideoXPipeline) -> tuple[Callable[[], torch.Tensor], ...]:
    """Return the two ways to denoise the same noise."""
    g = torch.Generator().manual_seed(2)
    latents = torch.randn(1, FRAMES, 16, HEIGHT, WIDTH, generator=g)
    positive, negative = torch.randn(2, 1, TEXT, mid_config().text_embed_dim, generator=g)
    table = ddim_table(SchedulerConfig(), STEPS)

    def baseline() -> torch.Tensor:
        return theirs(
            prompt_embeds=positive, negative_prompt_embeds=negative, latents=latents, num_inference_steps=STEPS,
            guidance_scale=6.0, max_sequence_length=TEXT, output_type="latent", return_dict=False, **SIZE,
        )[0]  # fmt: skip

    def candidate() -> torch.Tensor:
        return denoise(
            ours.transformer, latents, positive, table=table, guidance=[6.0] * STEPS, negative_embeds=negative
        )

    return baseline, candidate


def calls(theirs: CogVideoXPipeline, ours: pipeline.CogVideoXPipeline) -> tuple[Callable[[], np.ndarray], ...]:
    """Return the two ways from the same prompts and noise to frames."""
    shape = (1, FRAMES, 16, HEIGHT, WIDTH)
    noise = torch.from_numpy(draws.normal(SEED, "initial noise", shape=shape))

    def baseline() -> np.ndarray:
        video = theirs(
            prompt=PROMPT, negative_prompt=NEGATIVE, latents=noise, num_inference_steps=STEPS, guidance_scale=6.0,
            max_sequence_length=TEXT, output_type="np", return_dict=False, **SIZE,
        )[0]  # fmt: skip
        return np.rint(255 * video[0])

    def candidate() -> np.ndarray:
        return ours(
            PROMPT, negative_prompt=NEGATIVE, num_inference_steps=STEPS, guidance_scale=6.0, sampler="ddim", seed=SEED,
            **SIZE,
        )[0][0]  # fmt: skip

    return baseline, candidate


def run() -> list[Ratio]:
    """Return both ratios; latents and frames are compared first."""
    both = pipelines()
    loop, call = loops(*both), calls(*both)
    error = (loop[0]() - loop[1]()).abs().max().item()
    assert error < 2e-3, f"latents differ by {error:.1e}"
    far = np.abs(call[0]() - call[1]()).max()
    assert far <= 1, f"frames differ by {far} grey levels"
    options: dict[str, Any] = {"num_rounds": 3, "with_ceiling": True}
    return [
        interleave("cpu.denoise.loop", *loop, target=1.15, note="f32, 10 DDIM steps", **options),
        interleave("cpu.denoise.mid", *call, target=1.3, note="f32, text, 10 DDIM steps, 24 frames", **options),
    ]
