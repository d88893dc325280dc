import numpy as np
import pytest
import torch

from cogvideox_factory.diffusion.schedule import add_noise, alphas_cumprod, v_target, x0_from_v
from cogvideox_factory.models import PUBLISHED, SchedulerConfig, TransformerConfig, VaeConfig
from cogvideox_factory.torch_engine.objective import Objective, Scales, pad_image_latents
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer

CPU = torch.device("cpu")


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_plain_v_loss_is_the_originals_weighted_x0_loss(shift):
    """Theirs: 1/(1 - alpha) times the squared error of the implied x0; at every timestep, in float64."""
    rng = np.random.default_rng(0)
    alphas = alphas_cumprod(SchedulerConfig(snr_shift_scale=shift))
    for alpha in alphas:
        a, b = np.sqrt(alpha), np.sqrt(1 - alpha)
        x0, noise, prediction = rng.standard_normal((3, 50))
        x_t = add_noise(x0, noise, a, b)
        theirs = np.mean((x0_from_v(x_t, prediction, a, b) - x0) ** 2) / (1 - alpha)
        ours = np.mean((prediction - v_target(x0, noise, a, b)) ** 2)
        assert abs(theirs - ours) <= 1e-12 * ours


def make(tiny_model, variant: str):
    folder = tiny_model(variant)
    config = TransformerConfig.from_folder(folder / "transformer")
    vae = VaeConfig.from_folder(folder / "vae")
    alphas = alphas_cumprod(SchedulerConfig.from_folder(folder / "scheduler", filename="scheduler_config.json"))
    transformer = CogVideoXTransformer.from_folder(folder / "transformer", dtype=torch.float32, device=CPU)
    scales = Scales(video=vae.scaling_factor, image=vae.image_scale)
    objective = Objective(transformer, alphas_cumprod=alphas, scales=scales, device=CPU, dtype=torch.float32)
    return objective, config, alphas


def batch_for(config: TransformerConfig, *, frames: int = 3, padding: int = 0, size: int = 2) -> dict:
    g = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=g)

    batch = {
        "mean": randn(size, frames, 16, 8, 12), "logvar": randn(size, frames, 16, 8, 12) - 3,
        "posterior_noise": randn(size, frames, 16, 8, 12), "noise": randn(size, padding + frames, 16, 8, 12),
        "timesteps": torch.tensor([999, 17])[:size],
        "prompt_embeds": randn(size, config.max_text_seq_length, config.text_embed_dim),
    }  # fmt: skip
    if config.is_image_to_video:
        batch |= {
            "image_mean": randn(size, 1, 16, 8, 12), "image_logvar": randn(size, 1, 16, 8, 12) - 3,
            "image_posterior_noise": randn(size, 1, 16, 8, 12), "image_keep": torch.tensor([True, False])[:size],
        }  # fmt: skip
    return batch


@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_equals_the_formula_written_out(tiny_model, variant):
    objective, config, alphas = make(tiny_model, variant)
    padding = 1 if config.patch_size_t else 0
    batch = batch_for(config, padding=padding)
    seen = {}
    forward = objective.predict
    objective.predict = lambda x, e, t: seen.setdefault("out", forward(seen.setdefault("x", x), e, t))
    losses = objective(batch)
    x0 = (batch["mean"] + torch.exp(0.5 * batch["logvar"]) * batch["posterior_noise"]) * objective.scales.video
    x0 = torch.cat([x0[:, :1]] * padding + [x0], dim=1)
    alpha = torch.from_numpy(alphas)[batch["timesteps"]].float()[:, None, None, None, None]
    x_t = alpha.sqrt() * x0 + (1 - alpha).sqrt() * batch["noise"]
    torch.testing.assert_close(seen["x"][:, :, :16], x_t)
    target = alpha.sqrt() * batch["noise"] - (1 - alpha).sqrt() * x0
    expected = (seen["out"] - target)[:, padding:].square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected)
    assert losses.dtype == torch.float32


@pytest.mark.parametrize("variant", ["cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"])
def test_image_condition_is_what_sampling_feeds(tiny_model, variant):
    objective, config, _ = make(tiny_model, variant)
    batch = batch_for(config)
    condition = objective.image_condition(batch, 4)
    vae = VaeConfig.from_folder(tiny_model(variant) / "vae")
    assert vae.invert_scale_latents == (variant == "cogvideox1.5-5b-i2v")
    factor = 1 / 0.7 if vae.invert_scale_latents else 0.7
    image = batch["image_mean"] + torch.exp(0.5 * batch["image_logvar"]) * batch["image_posterior_noise"]
    torch.testing.assert_close(condition[0, 0], image[0, 0] * factor)
    assert not condition[0, 1:].any(), "all frames but the first are empty"
    assert not condition[1].any(), "a dropped image leaves nothing, for that sample alone"


def test_padding_carries_no_loss(tiny_model):
    objective, config, _ = make(tiny_model, "cogvideox1.5-5b")
    batch = batch_for(config, padding=1)
    leaf = torch.zeros(2, 4, 16, 8, 12, requires_grad=True)
    objective.predict = lambda x, e, t: leaf
    objective(batch).sum().backward()
    assert not leaf.grad[:, 0].any()
    assert leaf.grad[:, 1:].all()


def test_pad_image_latents():
    padded = pad_image_latents(torch.ones(2, 1, 3, 4, 5), 6)
    assert padded.shape == (2, 6, 3, 4, 5)
    assert padded[:, 0].all()
    assert not padded[:, 1:].any()
