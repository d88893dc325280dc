"""Watching a run: loss on held-out clips at fixed noise.

A training loss says little, because its spread over timesteps is larger than what a run gains. The validation loss uses
the same clips, noise and timesteps every time, so its curve is smooth and two runs can be compared.

All processes take part alike: those that share weights or a video's tokens meet in every forward pass.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np

from cogvideox_factory.data.loader import Draws, Source, collate
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.metrics import MetricsLog, say
from cogvideox_factory.mindspore_engine.border import to_array
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.ranks import Ranks
from cogvideox_factory.step_records import TIMESTEPS

MAX_FAILED = 3


@dataclass(kw_only=True, slots=True)
class Watch:
    """What is looked at every so many steps (0: never)."""

    every: int
    source: Source
    clip_ids: list[str]
    draws: Draws
    learner: Learner
    ranks: Ranks
    ready: Callable[[dict[str, Any]], dict[str, Any]]
    """Turns a batch of the ground into what the learner takes."""
    _num_failed: int = 0

    def is_due(self, step: int, num_steps: int) -> bool:
        """Whether to look after this step."""
        return bool(self.every) and (step % self.every == 0 or step == num_steps)

    def look(self, step: int, log: MetricsLog, averaged: AbstractContextManager[None]) -> None:
        """Measure the loss within `averaged`. Failing is told; after three times it is left."""
        if self._num_failed == MAX_FAILED:
            return
        try:
            with averaged:
                values = self._loss()
        except (FactoryError, OSError) as error:
            self._num_failed += 1
            last = f"; after {MAX_FAILED} failures there is no more validation" * (self._num_failed == MAX_FAILED)
            say(f"VALIDATION FAILED at step {step}, training goes on{last}: {error}")
            return
        log.write(step, values)
        say(f"step {step}: validation loss {values['validation_loss']:.4f}")

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
