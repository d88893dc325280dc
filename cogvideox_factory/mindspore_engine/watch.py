"""Watching a run: loss on held-out clips at fixed noise, and sample videos.

A training loss says little, because its spread over timesteps is larger than what a run gains. The validation loss uses
the same clips, noise and timesteps every time, so its curve is smooth and two runs can be compared.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.loader import Draws, Source, collate
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import MetricsLog, say
from cogvideox_factory.mindspore_engine.border import to_array
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.shapes import ClipShape
from cogvideox_factory.step_records import TIMESTEPS

MAX_FAILED = 3


class SampleVideos:
    """The prompts a run is asked to show, encoded once."""

    def __init__(
        self,
        pipeline: CogVideoXPipeline,
        *,
        prompt_embeds: Sequence[Tensor],
        negative_embeds: Tensor,
        images: Sequence[np.ndarray],
        shape: ClipShape,
        tiling: bool,
        call: dict[str, Any],
    ) -> None:
        """Embeddings are [1, S, E]; `tiling` says whether to decode in tiles, whatever the run encodes its clips in."""
        self.pipeline = pipeline
        self.prompt_embeds = prompt_embeds
        self.negative_embeds = negative_embeds
        self.images = images
        self.shape = shape
        self.tiling = tiling
        self.call = call

    def make(self, folder: Path, step: int) -> list[Path]:
        """Write one mp4 a prompt, named after the step, and return their paths.

        Raises:
            StorageError: a video could not be written.
            NonFiniteError: the model draws NaN.
        """
        paths = [folder / f"step-{step:06}-{index:02}.mp4" for index in range(len(self.prompt_embeds))]
        with self._decoder_set():
            for index, path in enumerate(paths):
                export_to_video(self._video(index), path, fps=self.shape.fps)
        return paths

    def _video(self, index: int) -> np.ndarray:
        video = self.pipeline(
            self.prompt_embeds[index],
            self.negative_embeds,
            image=self.images[index] if self.images else None,
            num_frames=self.shape.num_frames,
            height=self.shape.height,
            width=self.shape.width,
            **self.call,
        )
        return video[: self.shape.num_frames]

    @contextmanager
    def _decoder_set(self) -> Iterator[None]:
        """Tile as videos ask for, and as the run's clips do afterwards."""
        vae = self.pipeline.vae
        kept = vae.tiles
        vae.enable_tiling() if self.tiling else vae.disable_tiling()
        try:
            yield
        finally:
            vae.tiles = kept


@dataclass(kw_only=True, slots=True)
class Watch:
    """What is looked at every so many steps (0: never)."""

    every: int
    source: Source
    clip_ids: list[str]
    draws: Draws
    samples: SampleVideos | None
    learner: Learner
    ready: Callable[[dict[str, Any]], dict[str, Any]]
    """Turns a batch of the ground into what the learner takes."""
    run_folder: Path
    _num_failed: int = 0

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to look after this step."""
        return bool(self.every) and (step % self.every == 0 or step == num_steps)

    def look(self, step: int, log: MetricsLog, averaged: AbstractContextManager[None]) -> None:
        """Measure the loss and make sample videos within `averaged`. Failing is told; after three times it is left."""
        if self._num_failed == MAX_FAILED:
            return
        try:
            with averaged:
                self._measure(step, log)
                self._show(step)
        except (FactoryError, OSError) as error:
            self._num_failed += 1
            last = f"; after {MAX_FAILED} failures there is no more validation" * (self._num_failed == MAX_FAILED)
            say(f"VALIDATION FAILED at step {step}, training goes on{last}: {error}")

    def _measure(self, step: int, log: MetricsLog) -> None:
        values = self._loss()
        log.write(step, values)
        say(f"step {step}: validation loss {values['validation_loss']:.4f}")

    def _show(self, step: int) -> None:
        if self.samples:
            for path in self.samples.make(self.run_folder / "samples", step):
                say(f"step {step}: {path}")

    def _loss(self) -> dict[str, float]:
        """Return the mean loss in all and at each of `TIMESTEPS`; nothing is dropped or noised."""
        sums = np.zeros(len(TIMESTEPS))
        for clip_id in self.clip_ids:
            for index, timestep in enumerate(TIMESTEPS):
                pick = Pick(clip_id, -1 - index)  # training counts epochs from 0, so a negative one has its own noise
                batch = collate([self.source.sample(pick, self.draws)], [pick])
                batch["timesteps"] = np.full_like(batch["timesteps"], timestep)
                sums[index] += to_array(self.learner.losses(self.ready(batch))).sum()
        losses = (sums / len(self.clip_ids)).tolist()
        by_timestep = {f"validation_loss_t{t}": loss for t, loss in zip(TIMESTEPS, losses, strict=True)}
        return {"validation_loss": float(np.mean(losses)), **by_timestep}
