"""Watching a run: loss on held-out clips at fixed noise, and sample videos.

A training loss says little, because its spread over timesteps is larger than what a run gains. The validation loss uses
the same clips, noise and timesteps every time, so its curve is smooth and two runs can be compared.

All processes take part alike: those that share weights or a video's tokens meet in every forward pass. So what fails in
one (a file, a disk, a video of NaN) is told to all before the next of these, and training goes on.
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
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.metrics import MetricsLog, say
from cogvideox_factory.mindspore_engine.border import to_array
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.mindspore_engine.ranks import Ranks
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
        ranks: Ranks,
        call: dict[str, Any],
    ) -> None:
        """Embeddings are [1, S, E]; `tiling` says whether to decode in tiles, whatever the run encodes its clips in."""
        self.pipeline = pipeline
        self.prompt_embeds = prompt_embeds
        self.negative_embeds = negative_embeds
        self.images = images
        self.shape = shape
        self.tiling = tiling
        self.ranks = ranks
        self.call = call

    def make(self, folder: Path, step: int) -> list[Path]:
        """Write one mp4 a prompt, named after the step, and return all their paths.

        Processes that take clips of their own also take prompts of their own. They make equally many videos, because
        they may share the model; where prompts run out, the last one is made again and dropped.

        Raises:
            FactoryError: a video could not be written, or the model draws NaN; in all processes.
        """
        count, side_by_side = len(self.prompt_embeds), self.ranks.layout.num_data_ranks
        paths = [folder / f"step-{step:06}-{index:02}.mp4" for index in range(count)]
        with self._decoder_set():
            for first in range(0, count, side_by_side):
                index = first + self.ranks.data_rank
                path = paths[index] if index < count and self.ranks.leads_video else None
                video = self._attempt(min(index, count - 1))
                self.ranks.together(lambda video=video, path=path: self._write(video, path))
        return paths

    def _attempt(self, index: int) -> np.ndarray | NonFiniteError:
        """Return a video, or why it cannot be seen: the others must hear of it first."""
        try:
            return self._video(index)
        except NonFiniteError as error:
            return error

    def _write(self, video: np.ndarray | NonFiniteError, path: Path | None) -> None:
        if isinstance(video, NonFiniteError):
            raise video
        if path is not None:
            export_to_video(video, path, fps=self.shape.fps)

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
    ranks: Ranks
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
                sample = self.ranks.together(lambda pick=pick: self.source.sample(pick, self.draws))
                batch = collate([sample], [pick])
                batch["timesteps"] = np.full_like(batch["timesteps"], timestep)
                sums[index] += to_array(self.learner.losses(self.ready(batch))).sum()
        losses = (sums / len(self.clip_ids)).tolist()
        by_timestep = {f"validation_loss_t{t}": loss for t, loss in zip(TIMESTEPS, losses, strict=True)}
        return {"validation_loss": float(np.mean(losses)), **by_timestep}
