"""Steps of training, timed: what a step of a stated shape takes on this machine, and how much memory."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.mindspore_engine import device
from cogvideox_factory.mindspore_engine.border import to_tensors
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.linear import weights_in
from cogvideox_factory.mindspore_engine.lora import add_lora
from cogvideox_factory.mindspore_engine.objective import Objective, Scales
from cogvideox_factory.mindspore_engine.optim import Update
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.models import PUBLISHED, TransformerConfig, tiny_facts

_TIMED = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """What is trained on: one video and its text."""

    name: str
    config: TransformerConfig
    frames: int
    height: int
    width: int
    text_length: int
    rank: int
    dtype: Any

    @property
    def tokens(self) -> int:
        """Of the text and the video."""
        patch = self.config.patch_size
        return self.text_length + self.frames * (self.height // patch) * (self.width // patch)


def shape_here() -> Shape:
    """Return CogVideoX-2B at its own size with random weights on a card, a tiny one on a CPU."""
    if device.is_ascend():
        return Shape(
            name="CogVideoX-2B, 49 frames 480x720, LoRA, blocks computed again, batch 1",
            config=PUBLISHED["cogvideox-2b"].transformer, frames=13, height=60, width=90, text_length=226, rank=64,
            dtype=ms.bfloat16,
        )  # fmt: skip
    return Shape(
        name="a tiny 2B, 9 frames 64x96, LoRA, blocks computed again, batch 1",
        config=tiny_facts("cogvideox-2b").transformer, frames=3, height=8, width=12, text_length=16, rank=4,
        dtype=ms.float32,
    )  # fmt: skip


def learner_of(shape: Shape, mode: Mode) -> Learner:
    """Return a training step of this shape."""
    with weights_in(shape.dtype):
        model = CogVideoXTransformer(shape.config)
    model.initialize(seed=0)
    add_lora(model, rank=shape.rank, alpha=shape.rank, seed=0)
    for block in model.transformer_blocks:
        block.recompute()
    objective = Objective(
        model, alphas_cumprod=alphas_cumprod(PUBLISHED["cogvideox-2b"].scheduler), dtype=shape.dtype,
        scales=Scales(video=1.15258426, image=1.0),
    )  # fmt: skip
    update = Update(
        model.trainable_params(), betas=(0.9, 0.95), eps=1e-8, weight_decay=1e-2, max_grad_norm=1.0, mode=mode
    )
    return Learner(objective, update, num_micros=1, mode=mode)


def batch_of(shape: Shape, step: int) -> dict[str, np.ndarray]:
    """Return a drawn batch of one."""
    size = (1, shape.frames, shape.config.in_channels, shape.height, shape.width)
    drawn = {name: draws.normal(0, "steps", name, step, shape=size) for name in ("mean", "posterior_noise", "noise")}
    text = draws.normal(0, "steps", "text", step, shape=(1, shape.text_length, shape.config.text_embed_dim))
    return drawn | {
        "logvar": np.full(size, -4, np.float32), "prompt_embeds": text, "timesteps": np.array([100 * step + 99])
    }  # fmt: skip


def timed(mode: Mode) -> Iterator[tuple[str, str]]:
    """Yield what the first step took, the compiler's time in it, what the following took, and memory."""
    shape = shape_here()
    yield "told", f"{shape.name}: {shape.tokens} tokens, {device.dtype_name(shape.dtype)}"
    began = time.monotonic()
    learner = learner_of(shape, mode)
    yield "told", f"weights drawn in {time.monotonic() - began:.1f} s"
    seconds, norms = [], []
    for step in range(1 + _TIMED):
        batch = to_tensors(batch_of(shape, step))
        began = time.monotonic()
        learner.micro(batch)
        norms.append(float(learner.step(1e-4)))  # waits for the device
        seconds.append(time.monotonic() - began)
        if step == 0:
            yield "told", f"the first step, with what is compiled: {seconds[0]:.2f} s"
    each = float(np.median(seconds[1:]))
    told = ", ".join(f"{s:.3f}" for s in seconds[1:])
    yield "told", f"the next {_TIMED}: {told} s; {each:.3f} s a step, {shape.tokens / each:.0f} tokens/s"
    yield "told", f"memory at most {device.peak_memory() / 2**30:.2f} GiB"
    sound = all(np.isfinite(norms)) and min(norms) > 0
    yield "held" if sound else "apart", f"norms of the gradients {', '.join(f'{norm:.3g}' for norm in norms)}"
