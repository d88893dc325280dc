"""`train-vae`: clips to a VAE in the diffusers layout, from random weights or from one that exists.

The published VAEs are excellent and fixed; the rest of the factory never changes them. This is for a VAE of another
size (the embedded tiny model's was trained here), or for clips far from anything a VAE has seen. A transformer belongs
to its VAE: after this, it has to be trained as well.

B batch, F frames, H W pixels.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cogvideox_factory import draws, intake, weights
from cogvideox_factory.config import Config
from cogvideox_factory.data.manifest import Clip
from cogvideox_factory.data.ordered import ordered_map
from cogvideox_factory.data.sampler import hold_out
from cogvideox_factory.data.timing import ClipSpec
from cogvideox_factory.data.video import read_clip
from cogvideox_factory.diffusion.frames import check_size
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.learning_rate import learning_rate
from cogvideox_factory.metrics import MetricsLog, duration, say
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.recipe import write_recipe
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.device import pick_device, set_determinism, set_tf32
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.vae import CogVideoXVAE, pixels_from_uint8, sample_posterior, uint8_from_pixels
from cogvideox_factory.torch_engine.vae_balance import balance_latents

_SCALE_CLIPS = 64
_MEMO_BYTES = 2 * 2**30
"""Decoded clips kept in memory; small clips are read once, then."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """How much each term counts beside the mean squared error."""

    l1: float
    kl: float


def run(config: Config) -> Path:
    """Train as `config.vae` says and return the folder of the VAE.

    Raises:
        FactoryError: settings, data or start unfit, before the first step.
        NonFiniteError: the loss became NaN or Inf.
    """
    if config.data.sets:
        raise FactoryError("data.sets: a VAE is trained on one data set; give --data.root FOLDER")
    if not config.data.root:
        raise FactoryError("train on what? give --data.root FOLDER")
    if config.data.buckets:
        raise FactoryError("data.buckets has no effect here: a VAE is trained on cuts of one size; remove it")
    spec = _clip_spec(config)
    out = Path(config.vae.dir)
    if (out / "metrics.jsonl").exists():
        raise FactoryError(f"{out} holds a run already; choose another --vae.dir (and --vae.start {out / 'vae'})")
    device = pick_device(config.run.device)
    set_determinism(config.run.deterministic)
    set_tf32(config.run.tf32, device)
    vae = _load(config, device)
    clips = _Clips(intake.checked_manifest(config, spec).usable, spec)
    train_ids, held_ids = hold_out(clips.ids, config.vae.num_held_out)
    out.mkdir(parents=True, exist_ok=True)
    write_recipe(out / "config.yaml", config)
    say(
        f"{sum(p.numel() for p in vae.parameters()):,} weights on {device}; {len(train_ids)} clips, "
        f"{len(held_ids)} held out; {config.vae.steps} steps of {config.vae.batch_size}"
    )
    if config.vae.steps:
        _loop(config, vae, lambda step: _batch(config, clips, train_ids, step), clips.read(held_ids), device)
    if config.vae.parts == "both":  # a new encoder, so new latents
        order = draws.generator(config.run.seed, "vae scale").permutation(len(train_ids))[:_SCALE_CLIPS]
        _rescale(vae, clips.read([train_ids[int(index)] for index in order]), balance=config.vae.balance)
    return _save(vae, out)


def reconstruction_loss(
    vae: CogVideoXVAE, pixels: Tensor, noise: Tensor, *, weighting: Weights
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss and its parts, all scalars, of `pixels` [B, 3, F, H, W] in [-1, 1].

    The negative evidence lower bound of Kingma & Welling (arXiv 1312.6114) with a squared (and absolute) error.
    `noise` is standard normal, of the latents' shape [B, F', C, h, w].
    """
    mean, logvar = vae.encode(pixels)
    error = vae.decode(sample_posterior(mean, logvar, noise)) - pixels
    parts = {
        "mse": error.square().mean(),
        "l1": error.abs().mean(),
        "kl": 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(),
    }
    return parts["mse"] + weighting.l1 * parts["l1"] + weighting.kl * parts["kl"], parts


@torch.no_grad()
def psnr(vae: CogVideoXVAE, frames: np.ndarray) -> float:
    """Return the mean PSNR in dB of uint8 `frames` [N, F, H, W, 3] coded and decoded, clip by clip."""
    values = []
    for clip in frames:
        original = to_tensor(clip, device=vae.device)[None]  # [1, F, H, W, 3]
        mean, _ = vae.encode(pixels_from_uint8(original).to(vae.dtype))
        error = uint8_from_pixels(vae.decode(mean)).float() - original.float()
        values.append(10 * math.log10(255**2 / max(float(error.square().mean()), 1e-12)))
    return float(np.mean(values))


def _clip_spec(config: Config) -> ClipSpec:
    data = config.data
    missing = [name for name in ("num_frames", "height", "width", "fps") if getattr(data, name) is None]
    if missing:
        raise FactoryError(f"a VAE has no native size; give {', '.join(f'--data.{name}' for name in missing)}")
    num_frames, height, width, fps = data.num_frames or 0, data.height or 0, data.width or 0, data.fps or 0.0
    check_size(height, width)
    if (crop := config.vae.crop) and crop > min(height, width):
        raise FactoryError(f"vae.crop={crop} is larger than the clips ({height}x{width})")
    return ClipSpec(
        num_frames=num_frames, height=height, width=width, fps=fps, crop=data.crop, fps_policy=data.fps_policy,
        short_policy=data.short_clips, max_slowdown=data.max_slowdown,
    )  # fmt: skip


def _load(config: Config, device: torch.device) -> CogVideoXVAE:
    if config.vae.config:
        file = Path(config.vae.config)
        vae = CogVideoXVAE(VaeConfig.from_folder(file.parent, filename=file.name), seed=config.run.seed)
        return vae.to(device).requires_grad_(True).train()
    folder = Path(config.vae.start) if config.vae.start else None
    if folder is None:
        folder = weights.resolve_model(config.model.path, revision=config.model.revision) / "vae"
    vae = CogVideoXVAE.from_folder(folder, dtype=torch.float32, device=device).requires_grad_(True).train()
    if config.vae.parts == "decoder":
        vae.encoder.requires_grad_(False)
        if vae.quant_conv is not None:
            vae.quant_conv.requires_grad_(False)
    return vae


def _loop(
    config: Config,
    vae: CogVideoXVAE,
    batch: Callable[[int], np.ndarray],
    held_out: np.ndarray,
    device: torch.device,
) -> None:
    settings, out = config.vae, Path(config.vae.dir)
    update = Update(
        vae.named_parameters(), dtype=torch.float32, device=device, betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-4,
        max_grad_norm=1.0, stochastic_bf16=False, seed=config.run.seed,
    )  # fmt: skip
    weighting = Weights(l1=settings.l1_weight, kl=settings.kl_weight)
    steps = range(1, settings.steps + 1)
    batches = ordered_map(batch, steps, num_workers=1)
    log, clock = MetricsLog(out), _Clock()
    try:
        for step, pixels in zip(steps, batches, strict=True):
            video = pixels_from_uint8(to_tensor(pixels, device=device))
            noise = draws.normal(config.run.seed, "vae noise", step, shape=_latent_shape(vae, video))
            loss, parts = reconstruction_loss(vae, video, to_tensor(noise, device=device), weighting=weighting)
            loss.backward()
            rate = learning_rate(
                step, peak=settings.learning_rate, schedule="cosine", num_steps=settings.steps,
                warmup_steps=min(settings.warmup_steps, settings.steps - 1),
            )  # fmt: skip
            norm = update.step(rate)
            is_last = step == settings.steps
            if step % settings.log_every == 0 or is_last or step == 1:
                parts |= {"loss": loss, "grad_norm": norm}
                values = {name: float(part.detach()) for name, part in parts.items()} | {"learning_rate": rate}
                if not math.isfinite(values["loss"]):
                    raise NonFiniteError(f"the loss is {values['loss']} at step {step}; lower --vae.learning-rate")
                values["seconds_per_step"] = clock.seconds_per_step(step)
                log.write(step, values)
                _say(step, settings.steps, values)
            if step % settings.save_every == 0 or is_last:
                measured = psnr(vae, held_out)
                log.write(step, {"held_out_psnr": measured})
                say(f"step {step}: held-out reconstruction {measured:.2f} dB, saved in {_save(vae, out)}")
                clock.skip(step)
    finally:
        log.close()


class _Clock:
    """Seconds a step since the last line, time spent looking left out."""

    def __init__(self) -> None:
        self.skip(0)

    def skip(self, step: int) -> None:
        self._time, self._step = time.monotonic(), step

    def seconds_per_step(self, step: int) -> float:
        seconds = (time.monotonic() - self._time) / max(step - self._step, 1)
        self.skip(step)
        return seconds


def _say(step: int, num_steps: int, values: dict[str, float]) -> None:
    say(
        f"step {step}/{num_steps}  mse {values['mse']:.5f}  kl {values['kl']:.2f}  grad {values['grad_norm']:.3g}  "
        f"{values['seconds_per_step']:.3g} s/step  left {duration(values['seconds_per_step'] * (num_steps - step))}"
    )


def _batch(config: Config, clips: "_Clips", ids: Sequence[str], step: int) -> np.ndarray:
    """Return uint8 frames [B, F, h, w, 3] of a step, cut as asked."""
    draw = draws.generator(config.run.seed, "vae batch", step)
    frames = clips.read([ids[int(index)] for index in draw.integers(len(ids), size=config.vae.batch_size)])
    _, num_frames, height, width, _ = frames.shape
    if draw.random() < config.vae.image_share:
        index = int(draw.integers(num_frames))
        frames = frames[:, index : index + 1]
    if crop := config.vae.crop:
        row, column = draw.integers(0, height - crop + 1), draw.integers(0, width - crop + 1)
        frames = frames[:, :, row : row + crop, column : column + crop]
    return np.ascontiguousarray(frames)


class _Clips:
    """Clips by id, decoded when first asked for and remembered while they fit into memory."""

    def __init__(self, clips: list[Clip], spec: ClipSpec) -> None:
        self.ids = sorted(clip.id for clip in clips)
        self._clips = {clip.id: clip for clip in clips}
        self._spec = spec
        self._memo: dict[str, np.ndarray] = {}

    def read(self, ids: Sequence[str]) -> np.ndarray:
        """Return frames uint8 [N, F, H, W, 3]."""
        return np.stack([self._frames(name) for name in ids])

    def _frames(self, name: str) -> np.ndarray:
        if name in self._memo:
            return self._memo[name]
        clip = self._clips[name]
        assert clip.path is not None
        frames = read_clip(clip.path, clip.spec or self._spec, rng=draws.generator(0, "crop", clip.footage)).pixels
        if frames.nbytes * (len(self._memo) + 1) <= _MEMO_BYTES:
            self._memo[name] = frames
        return frames


def _latent_shape(vae: CogVideoXVAE, video: Tensor) -> tuple[int, ...]:
    batch, _, frames, height, width = video.shape
    scale = vae.spatial_scale
    return batch, vae.num_latent_frames(frames), vae.config.latent_channels, height // scale, width // scale


@torch.no_grad()
def _rescale(vae: CogVideoXVAE, frames: np.ndarray, *, balance: float) -> None:
    """Give scaled latents unit variance, measured on uint8 `frames` [N, F, H, W, 3]; mix their channels if asked."""
    means = [vae.encode(pixels_from_uint8(to_tensor(clip, device=vae.device)[None]))[0] for clip in frames]
    latents = torch.cat(means)  # [N, F', C, h, w]
    if balance:
        gains = torch.linalg.svdvals(balance_latents(vae, latents, power=balance))
        say(f"latents balanced: faint directions now count {float(gains.max() / gains.min()):.1f} times as much")
    else:
        vae.config = replace(vae.config, scaling_factor=1 / float(latents.std()))
        say(f"scaling_factor {vae.config.scaling_factor:.6f}: latents times this have unit variance")


def _save(vae: CogVideoXVAE, out: Path) -> Path:
    vae.save(out / "vae")
    return out / "vae"
