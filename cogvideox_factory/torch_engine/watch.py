"""Watching a run: loss on held-out clips at fixed noise, and sample videos.

A training loss says little, because its spread over timesteps is larger than what a run gains. The validation loss uses
the same clips, noise and timesteps every time, so its curve is smooth and two runs can be compared.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.loader import Draws, Source, collate
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.shapes import ClipShape
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.device import pin
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline

# One draw in each quarter of the schedule; the mean over them stands for the whole range.
TIMESTEPS = (125, 375, 625, 875)


_GROUND_ONLY = ("caption_keep", "flipped")  # already acted upon


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return `batch` with every array as a tensor on `device`, copied without waiting for it; lists stay."""
    return {
        key: pin(to_tensor(value)).to(device, non_blocking=True) if isinstance(value, np.ndarray) else value
        for key, value in batch.items()
        if key not in _GROUND_ONLY
    }


@torch.no_grad()
def held_out_loss(
    objective: Objective,
    source: Source,
    clip_ids: Sequence[str],
    draws: Draws,
    *,
    encoder: Encoder | None,
    device: torch.device,
) -> dict[str, float]:
    """Return the mean loss over `clip_ids` in all and at each of `TIMESTEPS`; nothing is dropped or noised."""
    sums = torch.zeros(len(TIMESTEPS), device=device)
    for clip_id in clip_ids:
        for index, timestep in enumerate(TIMESTEPS):
            # Training counts epochs from 0, so a negative one has noise of its own.
            pick = Pick(clip_id, -1 - index)
            batch = to_device(collate([source.sample(pick, draws)], [pick]), device)
            batch["timesteps"] = torch.full_like(batch["timesteps"], timestep)
            sums[index] += objective(encoder.batch(batch) if encoder else batch).sum()
    losses = (sums / len(clip_ids)).tolist()
    by_timestep = {f"validation_loss_t{t}": loss for t, loss in zip(TIMESTEPS, losses, strict=True)}
    return {"validation_loss": float(np.mean(losses)), **by_timestep}


class SampleVideos:
    """The prompts a run is asked to show, encoded once."""

    def __init__(
        self,
        pipeline: CogVideoXPipeline,
        *,
        prompt_embeds: Tensor,
        negative_embeds: Tensor,
        images: Sequence[Path],
        shape: ClipShape,
        tiling: bool,
        group: dist.ProcessGroup | None,
        call: dict[str, Any],
    ) -> None:
        """`tiling` says whether to decode in tiles, whatever the run encodes its clips in; `group` shares the work."""
        self.pipeline = pipeline
        self.prompt_embeds = prompt_embeds
        self.negative_embeds = negative_embeds
        self.images = images
        self.shape = shape
        self.tiling = tiling
        self.group = group
        self.call = call

    def make(self, folder: Path, step: int, *, writes: bool = True) -> list[Path]:
        """Write one mp4 a prompt, named after the step, and return their paths.

        Processes that share the model must all make them; one of them `writes`.
        """
        paths = []
        with self._decoder_set():
            for index in range(len(self.prompt_embeds)):
                video = self.pipeline(
                    prompt_embeds=self.prompt_embeds[index : index + 1],
                    negative_prompt_embeds=self.negative_embeds,
                    image=self.images[index] if self.images else None,
                    num_frames=self.shape.num_frames,
                    height=self.shape.height,
                    width=self.shape.width,
                    **self.call,
                )[0][0]
                path = folder / f"step-{step:06}-{index:02}.mp4"
                if writes:
                    paths.append(export_to_video(video[: self.shape.num_frames], path, fps=self.shape.fps))
        return paths

    @contextmanager
    def _decoder_set(self) -> Iterator[None]:
        """Tile and share the VAE's work as videos ask for, and as the run's clips do afterwards."""
        vae = self.pipeline.vae
        kept = vae.tiles, vae.group
        vae.enable_tiling() if self.tiling else vae.disable_tiling()
        vae.group = self.group
        try:
            yield
        finally:
            vae.tiles, vae.group = kept
