"""`cpu.train.tiny*`: whole training loops of 50 steps, ours against one on diffusers, accelerate and peft.

Two layers of width 128, 128 video + 32 text tokens, batch 1, float32, no checkpointing: what is measured is mostly what
is not arithmetic. Ours is `train` itself, from a cache that `prepare` made, with its loader, its draws and its log at
the first and the last step; only the checkpoint at the end is left out, on both sides. The baseline is written as the
older trainers are: `Accelerator`, a `DataLoader` over `.pt` files of moments and embeddings, the scheduler's
`add_noise` and `get_velocity`, rotary tables and the weighted loss made at each step, clipping, a learning rate
scheduler, `.item()` at each step. Progress bar and trackers are left out, in its favour. The family's older trainers
also fetch the norm of each gradient, before and after clipping; rows named `lean` leave that out as well. Both read
with no thread or process of their own.
"""

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import CogVideoXDPMScheduler, CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.optimization import get_scheduler
from peft import LoraConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.clips import draw_clips
from benchmarks.interleave import Ratio, interleave
from benchmarks.pt_files import PtFiles
from cogvideox_factory.config import Config
from cogvideox_factory.learning_rate import learning_rate
from cogvideox_factory.metrics import console
from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import prepare, train
from cogvideox_factory.torch_engine.loop import Loop
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.watch import to_device
from cogvideox_factory.weights import resolve_model

NUM_CLIPS, NUM_STEPS, NUM_COMPARED = 8, 50, 4
FRAMES, SIZE, TEXT = 5, 128, 32
CPU = torch.device("cpu")
Draw = dict[str, Tensor]


def make_model(folder: Path) -> None:
    """Put a transformer of random weights into a copy of the package's model folder."""
    embedded = resolve_model("tiny-t2v")
    shutil.copytree(embedded, folder)
    text_width = json.loads((embedded / "transformer" / "config.json").read_text())["text_embed_dim"]
    config = replace(
        PUBLISHED["cogvideox-5b"].transformer, num_attention_heads=2, num_layers=2, time_embed_dim=128,
        text_embed_dim=text_width, max_text_seq_length=TEXT, sample_height=SIZE // 8, sample_width=SIZE // 8,
        sample_frames=FRAMES,
    )  # fmt: skip
    shutil.rmtree(folder / "transformer")
    CogVideoXTransformer(config).save(folder / "transformer")


def recipe(folder: Path, method: str) -> Config:
    """Return the settings of a run that does what the baseline does."""
    values = {
        "model": {"path": str(folder / "model")},
        "data": {"root": str(folder / "clips"), "num_frames": FRAMES, "height": SIZE, "width": SIZE, "fps": 8.0},
        "cache": {"dir": str(folder / "cache")},
        "run": {"device": "cpu", "dtype": "float32", "deterministic": False},
        "train": {
            "dir": str(folder / f"run-{method}"), "method": method, "steps": NUM_STEPS, "log_every": NUM_STEPS,
            "checkpointing": "none", "caption_dropout": 0.0, "num_workers": 0,
        },
    }  # fmt: skip
    return check(values, source="benchmark")


def our_loop(config: Config) -> Loop:
    """Return the loop `train` sets up, before its first step."""
    taken: list[Loop] = []
    whole = Loop.run
    try:
        Loop.run = lambda self, start: taken.append(self)
        train.run(config)
    finally:
        Loop.run = whole
    return taken[0]


def their_files(folder: Path, loop: Loop) -> PtFiles:
    """Return the loop's samples as the originals store them."""

    def samples() -> Iterator[tuple[str, Tensor, Tensor]]:
        for batch in loop.loader.batches(0, NUM_CLIPS):  # an epoch: every clip once
            tensors = to_device(batch, CPU)
            moments = torch.cat([tensors[key].float().transpose(1, 2) for key in ("mean", "logvar")], dim=1)
            yield batch["clip_ids"][0], moments[0], tensors["prompt_embeds"][0]

    return PtFiles(folder, samples())


class TheirTrainer:
    """A training loop as the older scripts have it."""

    def __init__(self, config: Config, data: Dataset, *, lean: bool) -> None:
        self.lean = lean
        settings, folder = config.train, Path(config.model.path)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=1)
        self.scheduler = CogVideoXDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        self.alphas_cumprod = self.scheduler.alphas_cumprod
        self.scale = json.loads((folder / "vae" / "config.json").read_text())["scaling_factor"]
        model = CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
        assert isinstance(model, CogVideoXTransformer3DModel)
        if settings.method == "lora":
            model.requires_grad_(False)
            model.add_adapter(
                LoraConfig(
                    r=config.lora.rank, lora_alpha=config.lora.alpha, init_lora_weights=True,
                    target_modules=config.lora.target_modules,
                )
            )  # fmt: skip
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(
            trained, lr=settings.learning_rate, betas=(settings.beta1, settings.beta2), eps=settings.epsilon,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        rates = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=NUM_STEPS)
        loader = DataLoader(data, batch_size=1, shuffle=True, num_workers=0)
        self.model, self.optimizer, self.loader, self.rates = self.accelerator.prepare(model, optimizer, loader, rates)
        self.model.train()
        self.max_grad_norm = settings.max_grad_norm

    def run(self) -> None:
        """Take `NUM_STEPS` steps."""
        step = 0
        while step < NUM_STEPS:
            for batch in self.loader:
                with self.accelerator.accumulate(self.model):
                    self.step(batch["moments"], batch["prompt_embeds"])
                step += 1
                if step >= NUM_STEPS:
                    break

    def step(self, moments: Tensor, prompt_embeds: Tensor, drawn: Draw | None = None) -> float:
        """Take one step on `moments` [B, 2C, F, h, w] and `prompt_embeds` [B, S, E]; the draws may be given."""
        mean, logvar = (part.permute(0, 2, 1, 3, 4) for part in moments.chunk(2, dim=1))  # [B, F, C, h, w]
        drawn = drawn or {
            "posterior_noise": torch.randn_like(mean), "noise": torch.randn_like(mean),
            "timesteps": torch.randint(0, self.scheduler.config["num_train_timesteps"], (len(mean),)),
        }  # fmt: skip
        latents = (mean + torch.exp(0.5 * logvar.clamp(-30, 20)) * drawn["posterior_noise"]) * self.scale
        latents = latents.contiguous()
        noise, timesteps = drawn["noise"], drawn["timesteps"]
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        output = self.model(
            hidden_states=noisy, encoder_hidden_states=prompt_embeds, timestep=timesteps,
            image_rotary_emb=self._rotary(latents), return_dict=False,
        )[0]  # fmt: skip
        prediction = self.scheduler.get_velocity(output, noisy, timesteps)
        weights = 1 / (1 - self.alphas_cumprod[timesteps])
        while weights.dim() < prediction.dim():
            weights = weights.unsqueeze(-1)
        loss = torch.mean((weights * (prediction - latents) ** 2).reshape(len(latents), -1), dim=1).mean()
        self.accelerator.backward(loss)
        if self.accelerator.sync_gradients:
            if not self.lean:
                self._gradient_norm()
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
            if not self.lean:
                self._gradient_norm()
        self.optimizer.step()
        self.rates.step()
        self.optimizer.zero_grad()
        return loss.detach().item()

    def _gradient_norm(self) -> float:
        """Return the norm of all gradients, each fetched by itself."""
        return sum(p.grad.detach().norm(2).item() ** 2 for p in self.model.parameters() if p.grad is not None) ** 0.5

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        config = self.accelerator.unwrap_model(self.model).config
        grid = (latents.shape[3] // config.patch_size, latents.shape[4] // config.patch_size)
        return get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim, crops_coords=((0, 0), grid), grid_size=grid,
            temporal_size=latents.shape[1], device=latents.device,
        )  # fmt: skip


def require_equal_losses(loop: Loop, theirs: TheirTrainer) -> None:
    """Take a few steps of both on the same clips and draws; their losses agree, so their updates do too."""
    batches = loop.loader.batches(0, NUM_COMPARED)
    for step, batch in enumerate(batches, start=1):
        tensors = to_device(batch, CPU)
        loss = loop.objective(tensors).mean()
        loss.backward()
        loop.update.step(learning_rate(step, **loop.rate))
        moments = torch.cat([tensors[key].float().transpose(1, 2) for key in ("mean", "logvar")], dim=1)
        drawn = {key: tensors[key] for key in ("posterior_noise", "noise", "timesteps")}
        other = theirs.step(moments, tensors["prompt_embeds"].float(), drawn)
        ours = loss.item()
        assert abs(ours - other) < 2e-4 * abs(other), f"step {step}: losses {ours:.6f} and {other:.6f}"


def tiny_ratio(name: str, config: Config, folder: Path, *, lean: bool = False, target: float | None = None) -> Ratio:
    """Hold the two to equal losses, then time them turn by turn."""
    loop = our_loop(config)
    theirs = TheirTrainer(config, their_files(folder / "theirs", loop), lean=lean)
    require_equal_losses(loop, theirs)
    return interleave(
        name, theirs.run, lambda: loop.run(None), target=target, num_rounds=9,
        note=f"{NUM_STEPS} steps, f32, {config.train.method}",
    )  # fmt: skip


def without_saving(run: Callable[[], Ratio]) -> Ratio:
    """Return `run()` with loops that save no checkpoint."""
    save = Loop._save
    try:
        Loop._save = lambda *_args, **_settings: None
        return run()
    finally:
        Loop._save = save


def run() -> Iterator[Ratio]:
    """Yield all ratios; `lora` trains adapters of rank 64 on attention."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model")
        draw_clips(folder / "clips", num_clips=NUM_CLIPS, num_frames=FRAMES, size=SIZE)
        console.quiet = True
        prepare.run(recipe(folder, "full"))
        for row, method, lean, target in (
            ("cpu.train.tiny", "full", False, 1.5), ("cpu.train.tiny.lean", "full", True, None),
            ("cpu.train.tiny_lora", "lora", False, None), ("cpu.train.tiny_lora.lean", "lora", True, None),
        ):  # fmt: skip
            run = partial(tiny_ratio, row, recipe(folder, method), folder, lean=lean, target=target)
            yield without_saving(run)
        console.quiet = False
