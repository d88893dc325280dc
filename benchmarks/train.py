"""`cpu.train.mid_sft*` and `cpu.train.mid_lora*`: one training step against a diffusers (+ peft) loop.

4 layers of width 768, 1350 video + 226 text tokens, batch 1, AdamW, gradient checkpointing on in both. The baseline
does what the originals' trainers do: scheduler arithmetic, the weighted x0 loss, clipping, AdamW; rows in bfloat16, the
dtype of real runs, have it under autocast: over float32 weights, or over a base in bfloat16 with float32 adapters.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from benchmarks.interleave import Ratio, interleave
from cogvideox_factory.diffusion.positions import rotary_table
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.models import PUBLISHED, SchedulerConfig, TransformerConfig
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH, TEXT = 6, 30, 30, 226
TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def mid_config() -> TransformerConfig:
    """4 layers of width 768 with rotary positions."""
    return replace(
        PUBLISHED["cogvideox-5b"].transformer, num_attention_heads=12, num_layers=4, text_embed_dim=512,
        time_embed_dim=256,
    )  # fmt: skip


def models() -> tuple[CogVideoXTransformer3DModel, CogVideoXTransformer]:
    """Return diffusers' model and ours with the same weights."""
    config = mid_config()
    torch.manual_seed(0)
    theirs = CogVideoXTransformer3DModel.from_config(config.to_dict())
    ours = CogVideoXTransformer(config)
    ours.load_arrays((name, value.numpy()) for name, value in theirs.state_dict().items())
    return theirs, ours


def batch() -> dict[str, torch.Tensor]:
    """Return one cached sample with its draws."""
    g = torch.Generator().manual_seed(1)
    shape = (1, FRAMES, 16, HEIGHT, WIDTH)
    draw = {name: torch.randn(shape, generator=g) for name in ("mean", "posterior_noise", "noise")}
    return draw | {
        "logvar": torch.full(shape, -6.0),
        "timesteps": torch.tensor([417]),
        "prompt_embeds": torch.randn(1, TEXT, mid_config().text_embed_dim, generator=g),
    }


def rotary() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tables as diffusers wants them: pairs repeated, full head size."""
    tables = rotary_table(mid_config(), FRAMES, HEIGHT, WIDTH)
    cos, sin = (torch.from_numpy(np.repeat(table, 2, axis=1)).float() for table in tables)
    return cos, sin


def their_step(
    model: CogVideoXTransformer3DModel, data: dict[str, torch.Tensor], dtype: torch.dtype
) -> Callable[[], float]:
    """Return one step of a diffusers loop."""
    scheduler = CogVideoXDPMScheduler.from_config(SchedulerConfig().to_dict())
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5, betas=(0.9, 0.95), weight_decay=1e-4)
    model.enable_gradient_checkpointing()
    model.train()
    tables = rotary()

    def step() -> float:
        latents = (data["mean"] + torch.exp(0.5 * data["logvar"]) * data["posterior_noise"]) * 0.7
        noisy = scheduler.add_noise(latents, data["noise"], data["timesteps"])
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            output = model(
                hidden_states=noisy.to(dtype), encoder_hidden_states=data["prompt_embeds"].to(dtype),
                timestep=data["timesteps"], image_rotary_emb=tables, return_dict=False,
            )[0].float()  # fmt: skip
        prediction = scheduler.get_velocity(output, noisy, data["timesteps"])
        weights = 1 / (1 - scheduler.alphas_cumprod[data["timesteps"]])
        loss = (weights[:, None, None, None, None] * (prediction - latents) ** 2).flatten(1).mean(1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def our_step(model: CogVideoXTransformer, data: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], float]:
    """Return one step of the factory's loop."""
    model.set_checkpointing("save_attention")
    objective = Objective(
        model.train(), alphas_cumprod=alphas_cumprod(SchedulerConfig()), scales=Scales(video=0.7, image=0.7),
        device=CPU, dtype=dtype,
    )  # fmt: skip
    update = Update(
        model.named_parameters(), dtype=dtype, device=CPU, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4,
        max_grad_norm=1.0, stochastic_bf16=False, seed=0,
    )  # fmt: skip

    def step() -> float:
        loss = objective(data).mean()
        loss.backward()
        update.step(1e-5)
        return loss.item()

    return step


def pairs(method: str, dtype: torch.dtype) -> tuple[Callable[[], float], Callable[[], float]]:
    """Return one step of theirs and of ours, on the same weights and data."""
    theirs, ours = models()
    if method == "lora":
        theirs.requires_grad_(False).to(dtype)
        theirs.add_adapter(LoraConfig(r=64, lora_alpha=64, target_modules=TARGETS, init_lora_weights=True))
        cast_training_params(theirs)
        ours.to(dtype)
        lora.add_lora(ours, rank=64, alpha=64, target_modules=TARGETS, seed=0)
    else:
        ours.to(dtype)
    data = batch()
    return their_step(theirs, data, dtype), our_step(ours, data, dtype)


def run() -> Iterator[Ratio]:
    """Yield all ratios; losses are compared first."""
    for dtype, suffix, near in ((torch.float32, "", 1e-4), (torch.bfloat16, ".bf16", 2e-2)):
        for method, row in (("full", "mid_sft"), ("lora", "mid_lora")):
            name = f"cpu.train.{row}{suffix}"
            baseline, candidate = pairs(method, dtype)
            for _ in range(2):
                a, b = baseline(), candidate()
                assert abs(a - b) < near * abs(a), (name, a, b)
            yield interleave(
                name, baseline, candidate, target=1.4, num_rounds=5,
                note=f"{'bf16' if suffix else 'f32'}, checkpointing on", with_ceiling=True,
            )  # fmt: skip
