"""Watching a run: loss on held-out clips at fixed noise, and sample videos.

A training loss says little, because its spread over timesteps is larger than what a run gains. The validation loss uses
the same clips, noise and timesteps every time, so its curve is smooth and two runs can be compared.

All processes take part alike: those that share weights or a video's tokens meet in every forward pass. So what fails in
one (a file, a disk) is told to all before the next of these, and training goes on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.loader import Draws, Source, collate
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import MetricsLog, say
from cogvideox_factory.ranks import AgreedError
from cogvideox_factory.shapes import ClipShape
from cogvideox_factory.step_records import TIMESTEPS
from cogvideox_factory.torch_engine.border import to_tensor
from cogvideox_factory.torch_engine.device import pin
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.exhausted import is_out_of_memory
from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.ranks import Ranks

MAX_FAILED = 3

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
    ranks: Ranks,
) -> dict[str, float]:
    """Return the mean loss over `clip_ids` in all and at each of `TIMESTEPS`; nothing is dropped or noised.

    Processes that take clips of their own also divide these forward passes. They make equally many, because they may
    share the model; where passes run out, the last one is made again and dropped.

    Raises:
        AgreedError: a clip could not be read.
    """
    sums = torch.zeros(len(TIMESTEPS), device=device)
    passes = [(clip_id, index) for clip_id in clip_ids for index in range(len(TIMESTEPS))]
    side_by_side = ranks.layout.num_data_ranks
    for first in range(0, len(passes), side_by_side):
        number = first + ranks.data_rank
        clip_id, index = passes[min(number, len(passes) - 1)]
        # Training counts epochs from 0, so a negative one has noise of its own.
        pick = Pick(clip_id, -1 - index)
        sample = ranks.together(lambda pick=pick: source.sample(pick, draws))
        batch = to_device(collate([sample], [pick]), device)
        batch["timesteps"] = torch.full_like(batch["timesteps"], TIMESTEPS[index])
        loss = objective(encoder.batch(batch) if encoder else batch).sum()
        if number < len(passes):
            sums[index] += loss
    losses = (ranks.mean(sums) * side_by_side / len(clip_ids)).tolist()
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
        images: Sequence[np.ndarray],
        shape: ClipShape,
        tiling: bool,
        group: dist.ProcessGroup | None,
        call: dict[str, Any],
        ranks: Ranks,
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
        self.ranks = ranks

    def make(self, folder: Path, step: int) -> list[Path]:
        """Write one mp4 a prompt, named after the step, and return all their paths.

        Processes that take clips of their own also take prompts of their own. They make equally many videos, because
        they may share the model; where prompts run out, the last one is made again and dropped.

        Raises:
            AgreedError: a video could not be written.
            NonFiniteError: the model draws NaN.
        """
        count, side_by_side = len(self.prompt_embeds), self.ranks.layout.num_data_ranks
        paths = [folder / f"step-{step:06}-{index:02}.mp4" for index in range(count)]
        with self._decoder_set():
            for first in range(0, count, side_by_side):
                index = first + self.ranks.data_rank
                video = self._video(min(index, count - 1))
                path = paths[index] if index < count and self.ranks.leads_video else None
                self.ranks.together(lambda video=video, path=path: self._write(video, path))
        return paths

    def _video(self, index: int) -> np.ndarray:
        video = self.pipeline(
            prompt_embeds=self.prompt_embeds[index : index + 1],
            negative_prompt_embeds=self.negative_embeds,
            image=self.images[index] if self.images else None,
            num_frames=self.shape.num_frames,
            height=self.shape.height,
            width=self.shape.width,
            **self.call,
        )[0][0]
        return video[: self.shape.num_frames]

    def _write(self, video: np.ndarray, path: Path | None) -> None:
        if path is not None:
            export_to_video(video, path, fps=self.shape.fps)

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


@dataclass(kw_only=True, slots=True)
class Watch:
    """What is looked at every so many steps (0: never)."""

    every: int
    source: Source
    clip_ids: list[str]
    draws: Draws
    samples: SampleVideos | None
    objective: Objective
    encoder: Encoder | None
    device: torch.device
    run_folder: Path
    ranks: Ranks
    _num_failed: int = 0

    def look(self, step: int, log: MetricsLog) -> None:
        """Measure the loss on held-out clips and make sample videos. Failing is told; after three times it is left.

        Memory that runs out inside a forward pass of divided weights or tokens ends the run: the others wait in it.
        """
        if self._num_failed == MAX_FAILED:
            return
        try:
            self._measure(step, log)
            self._show(step)
        except AgreedError as error:
            problem = str(error)
        except (FactoryError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and (not is_out_of_memory(error) or self.ranks.layout.divides_forward):
                raise
            problem = self.ranks.agree(str(error))
        else:
            problem = self.ranks.agree(None)
        if problem is not None:
            self._num_failed += 1
            last = f"; after {MAX_FAILED} failures there is no more validation" * (self._num_failed == MAX_FAILED)
            say(f"VALIDATION FAILED at step {step}, training goes on{last}: {problem}")

    def _measure(self, step: int, log: MetricsLog) -> None:
        if self.clip_ids:
            values = held_out_loss(
                self.objective, self.source, self.clip_ids, self.draws, encoder=self.encoder, device=self.device,
                ranks=self.ranks,
            )  # fmt: skip
            log.write(step, values)
            say(f"step {step}: validation loss {values['validation_loss']:.4f}")

    def _show(self, step: int) -> None:
        if self.samples:
            for path in self.samples.make(self.run_folder / "samples", step):
                say(f"step {step}: {path}")
