"""One training step of a small transformer, for tests that hold ways of running it to each other, bit for bit."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cogvideox_factory.models import tiny_facts
from cogvideox_factory.torch_engine.lora import add_lora
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

CPU = torch.device("cpu")


def small_model(*, num_layers: int = 4, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer:
    """Return a transformer with drawn weights."""
    config = replace(tiny_facts("cogvideox-5b").transformer, num_layers=num_layers)
    return CogVideoXTransformer(config).to(dtype)


def adapt(model: CogVideoXTransformer, **options) -> None:
    """Freeze `model` under a LoRA that changes something."""
    add_lora(model, rank=4, alpha=4, seed=0, **options)
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B too, which starts at zero
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(1))


def loss_of(model: CogVideoXTransformer, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the loss of `model` on one fixed clip."""
    draw = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(1, 3, 16, 8, 12, generator=draw), torch.randn(1, 16, 32, generator=draw)
    positions = model.positions(
        latent_frames=3, latent_height=8, latent_width=12, text_length=16, device=CPU, dtype=dtype
    )
    out = model(latents.to(dtype), prompt.to(dtype), torch.tensor([500]), positions=positions)
    return out.float().square().mean()


def step(
    model: CogVideoXTransformer, *, times: int = 1, before: Callable[[], None] = lambda: None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return loss and gradients of the last of so many steps; `before` is called between forward and backward."""
    dtype = model.proj_out.weight.dtype
    loss = torch.zeros(())
    for _ in range(times):
        model.zero_grad()
        loss = loss_of(model, dtype)
        before()
        loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_bits(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    """Hold two results of `step` to every bit."""
    assert torch.equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, grad in one[1].items():
        assert torch.equal(grad, other[1][name]), name
