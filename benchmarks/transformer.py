"""The transformer against diffusers', turn by turn: one block, and four blocks under checkpointing.

Each pair is first held to equal numbers. Time inside matrix products and the attention kernel is the same for both;
what differs is all around them, so a float32 ratio grows with the speed of those (AVX-512) and with the load of the
machine (every operation waits for the slower of two threads).
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.interleave import Ratio, interleave
from cogvideox_factory.models import PUBLISHED, TransformerConfig
from cogvideox_factory.torch_engine.block import VECTORS_PER_BLOCK, split_vectors
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

TEXT, GRID = 226, (6, 30, 30)  # latent frames, height, width: 6 * 15 * 15 = 1,350 tokens
CONFIG = replace(
    PUBLISHED["cogvideox-5b"].transformer, num_attention_heads=12, num_layers=4, text_embed_dim=768,
    sample_frames=21, sample_height=GRID[1], sample_width=GRID[2],
)  # fmt: skip
BFLOAT16_ERROR = 0.05
"""Of the largest value; both round every intermediate to 8 bits, at different places."""


def models(config: TransformerConfig, dtype: torch.dtype) -> tuple[Any, CogVideoXTransformer]:
    """Return diffusers' model and ours with the same weights."""
    from diffusers import CogVideoXTransformer3DModel

    ours = CogVideoXTransformer(config)
    values = {key: value for key, value in config.to_dict().items() if not key.startswith("_")}
    theirs = CogVideoXTransformer3DModel(**values)
    theirs.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in ours.iterate_arrays()})
    return torch.nn.Module.to(theirs, dtype), ours.to(dtype)


def block_ratio(name: str, dtype: torch.dtype, *, backward: bool, target: float, num_rounds: int) -> Ratio:
    """Time one block, d768 and 226 + 1,350 tokens, alone or with the gradients of all it depends on."""
    theirs, ours = models(replace(CONFIG, num_layers=1), dtype)
    positions = ours.positions(
        latent_frames=GRID[0], latent_height=GRID[1], latent_width=GRID[2], text_length=TEXT, device="cpu", dtype=dtype
    )
    assert positions.rotary is not None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TEXT + positions.num_video_tokens, CONFIG.width, generator=generator).to(dtype)
    time = torch.randn(1, CONFIG.time_embed_dim, generator=generator).to(dtype).requires_grad_()
    vectors = tuple(v.detach().requires_grad_() for v in split_vectors(ours.modulation(torch.nn.functional.silu(time))))
    assert len(vectors) == VECTORS_PER_BLOCK
    text, video, joint = (t.detach().clone().requires_grad_() for t in (x[:, :TEXT], x[:, TEXT:], x))
    rotary = tuple(table[TEXT:, 0].repeat_interleave(2, dim=-1) for table in positions.rotary)
    their_block, our_block = theirs.transformer_blocks[0], ours.transformer_blocks[0]

    def run_theirs() -> Tensor:
        out = their_block(video, text, time, rotary)
        return torch.cat([out[1], out[0]], dim=1)

    def run_ours() -> Tensor:
        return our_block(joint, vectors, positions.rotary, TEXT)

    _require_equal(run_theirs(), run_ours())
    if not backward:
        return interleave(
            name,
            _without_grad(run_theirs),
            _without_grad(run_ours),
            target=target,
            num_rounds=num_rounds,
            with_ceiling=True,
        )
    grad = torch.randn(x.shape, generator=generator).to(dtype)

    def step_theirs() -> None:
        out = their_block(video, text, time, rotary)
        torch.autograd.backward(out, (grad[:, TEXT:], grad[:, :TEXT]))
        _clear(theirs, video, text, time)

    def step_ours() -> None:
        run_ours().backward(grad)
        _clear(ours, joint, *vectors)

    return interleave(name, step_theirs, step_ours, target=target, num_rounds=num_rounds, with_ceiling=True)


def checkpointed_ratio(name: str, mode: str, *, target: float | None, num_rounds: int) -> Ratio:
    """Time loss and all gradients of four blocks in float32 under checkpointing, diffusers' against `mode`."""
    theirs, ours = models(CONFIG, torch.float32)
    theirs.enable_gradient_checkpointing()
    theirs.train()
    ours.set_checkpointing(mode)
    positions = ours.positions(
        latent_frames=GRID[0], latent_height=GRID[1], latent_width=GRID[2], text_length=TEXT, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    assert positions.rotary is not None
    rotary = tuple(table[TEXT:, 0].repeat_interleave(2, dim=-1) for table in positions.rotary)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, GRID[0], CONFIG.in_channels, *GRID[1:], generator=generator)
    prompt = torch.randn(1, TEXT, CONFIG.text_embed_dim, generator=generator)
    target_v, timesteps = torch.randn(latents.shape, generator=generator), torch.tensor([500])

    def run_theirs() -> Tensor:
        return theirs(latents, prompt, timesteps, image_rotary_emb=rotary, return_dict=False)[0]

    def run_ours() -> Tensor:
        return ours(latents, prompt, timesteps, positions=positions)

    _require_equal(run_theirs(), run_ours())

    def step(run: Callable[[], Tensor], model: torch.nn.Module) -> None:
        (run() - target_v).square().mean().backward()
        _clear(model)

    return interleave(
        name,
        lambda: step(run_theirs, theirs),
        lambda: step(run_ours, ours),
        target=target,
        num_rounds=num_rounds,
        with_ceiling=True,
    )


def save_attention_ratio(name: str, *, target: float, num_rounds: int) -> Ratio:
    """Time our own two modes of checkpointing, "full" against "save_attention": 2 layers, d512, 64 + 4,032 tokens."""
    text, grid = 64, (7, 48, 48)
    config = replace(
        CONFIG, num_attention_heads=8, num_layers=2, max_text_seq_length=text, sample_frames=25, sample_height=grid[1],
        sample_width=grid[2],
    )  # fmt: skip
    model = CogVideoXTransformer(config)
    positions = model.positions(
        latent_frames=grid[0], latent_height=grid[1], latent_width=grid[2], text_length=text, device="cpu",
        dtype=torch.float32,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, grid[0], config.in_channels, *grid[1:], generator=generator)
    prompt = torch.randn(1, text, config.text_embed_dim, generator=generator)
    target_v, timesteps = torch.randn(latents.shape, generator=generator), torch.tensor([500])

    def step(mode: str) -> Tensor:
        model.set_checkpointing(mode)
        loss = (model(latents, prompt, timesteps, positions=positions) - target_v).square().mean()
        loss.backward()
        _clear(model)
        return loss.detach()

    assert torch.equal(step("full"), step("save_attention"))
    return interleave(
        name, lambda: step("full"), lambda: step("save_attention"), target=target, num_rounds=num_rounds,
        note="our own full checkpointing is the baseline",
    )  # fmt: skip


def _require_equal(theirs: Tensor, ours: Tensor) -> None:
    error = (theirs - ours).abs().max() / theirs.abs().max()
    limit = 1e-5 if ours.dtype == torch.float32 else BFLOAT16_ERROR
    assert error < limit, f"relative error {error:.2g}"


def _without_grad(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.no_grad()(run)


def _clear(model: torch.nn.Module, *leaves: Tensor) -> None:
    model.zero_grad(set_to_none=True)
    for leaf in leaves:
        leaf.grad = None


def run() -> list[Ratio]:
    """Return all ratios of this suite."""
    f32, bf16 = torch.float32, torch.bfloat16
    return [
        block_ratio("cpu.block.fwd", f32, backward=False, target=1.15, num_rounds=9),
        block_ratio("cpu.block.fwdbwd", f32, backward=True, target=1.5, num_rounds=9),
        block_ratio("cpu.block.fwd.bf16", bf16, backward=False, target=1.3, num_rounds=5),
        # diffusers takes half a minute a round where the CPU has no bfloat16 instructions
        block_ratio("cpu.block.fwdbwd.bf16", bf16, backward=True, target=1.5, num_rounds=3),
        checkpointed_ratio("cpu.model.full", "full", target=None, num_rounds=5),
        checkpointed_ratio("cpu.model.save_attention", "save_attention", target=None, num_rounds=5),
        save_attention_ratio("cpu.train.sac", target=1.15, num_rounds=7),
    ]
