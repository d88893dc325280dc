"""The training loop: forward, backward, update; now and then log and save.

Between log points nothing waits for the device: losses and norms stay there until a line is due.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from cogvideox_factory.checkpoints import checkpoint_folder, list_checkpoints
from cogvideox_factory.data.loader import Draws, Loader
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.errors import FactoryError, NonFiniteError, StorageError, UnfitError
from cogvideox_factory.host_memory import resident_memory
from cogvideox_factory.learning_rate import learning_rate
from cogvideox_factory.metrics import MetricsLog, StepRows, duration, progress_bar, say
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor, to_tensors
from cogvideox_factory.mindspore_engine.checkpoint import load_checkpoint, save_checkpoint
from cogvideox_factory.mindspore_engine.device import peak_memory
from cogvideox_factory.mindspore_engine.encode import Encoder
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.optim import Ema, Update
from cogvideox_factory.mindspore_engine.ranks import Ranks
from cogvideox_factory.mindspore_engine.sharding import State
from cogvideox_factory.mindspore_engine.watch import Watch
from cogvideox_factory.run_folder import differences
from cogvideox_factory.step_records import BadStep, Sample, Step, Work, averages, bad_among, sample_rows, too_many
from cogvideox_factory.stopping import StoppedError, stop_requests
from cogvideox_factory.time_limit import TimeLimit
from cogvideox_factory.tracker import Tracker
from cogvideox_factory.watchdog import Watchdog

_GROUND_ONLY = ("caption_keep", "flipped")  # already acted upon


@dataclass(kw_only=True, slots=True)
class Loop:
    """One run from its first (or next) step to its last."""

    learner: Learner
    ema: Ema | None
    sampler: Sampler
    draws: Draws
    loader: Loader
    encoder: Encoder | None
    """Encodes raw clips; None when latents come from a cache."""
    run_folder: Path
    num_steps: int
    num_micros: int
    rate: dict[str, Any]
    """Arguments of `learning_rate`."""
    log_every: int
    save_every: int
    keep: int
    """Checkpoints that stay."""
    limit: TimeLimit
    record: dict[str, Any]
    """What a checkpoint says of the run beside its position: identity, settings, versions, layout."""
    on_bad_step: str
    work: Work
    log_samples: int
    """Samples whose loss is written down with a line, at most."""
    tracker: Tracker | None
    watch: Watch
    hang_seconds: float
    """Without a step after which the run ends (0: never)."""
    ranks: Ranks
    compiled: bool
    """A shape that is new is compiled first, which takes its time."""
    _pending: list[tuple[int, list[Tensor], Tensor]] = field(default_factory=list)
    _bad: list[int] = field(default_factory=list)
    _shapes: set[str] = field(default_factory=set)
    _clock: float = 0.0
    _clock_step: int = 0

    def run(self, start: Path | None) -> None:
        """Train until `num_steps`, from checkpoint `start` or from scratch."""
        first = self._restore(start) if start else 0
        begins = first if start else None
        log = MetricsLog(self.run_folder, resume_step=begins, writes=self.ranks.leads, tracker=self.tracker)
        samples, quarantine = (self._rows(name, begins) for name in ("losses", "quarantine"))
        self._bad = self.ranks.from_lead(lambda: quarantine.steps() if quarantine else [])
        batches = self.loader.batches(first, self.num_steps)
        try:
            bar = progress_bar("training", self.num_steps, done=first, lines=False)
            with stop_requests() as stop, Watchdog(self.hang_seconds) as watchdog, bar as advance:
                if not start and self.watch.every:
                    self._look(0, log)
                self._restart_clocks(first)
                for step in range(first + 1, self.num_steps + 1):
                    compiles = self._compiles(step)
                    with watchdog.pause() if compiles else nullcontext():
                        self._step(step, batches)
                    watchdog.beat(typical=not compiles)
                    advance()
                    last = step == self.num_steps
                    saves = step % self.save_every == 0 or last
                    # From here on what is agreed counts: a signal may come at any line, to this process alone.
                    is_up = self.limit.is_up(step, saves=saves + 1, looks=self.watch.is_due(step, self.num_steps))
                    asked = self._hear(stop.name or ("train.time_limit_minutes" if is_up else None))
                    saves = saves or asked is not None
                    if step % self.log_every == 0 or saves or step == 1:
                        self._log(step, log, samples, quarantine)
                        self.limit.reached(step)
                    if saves:
                        with watchdog.pause():
                            self._save(step, must=last or asked is not None)
                    if asked and not last:
                        folder = checkpoint_folder(self.run_folder, step)
                        raise StoppedError(
                            f"stopped by {asked} after step {step}; {folder} is saved. The same command goes on."
                        )
                    if self.watch.is_due(step, self.num_steps):
                        with watchdog.pause():
                            self._look(step, log)
        finally:
            for file in (log, samples, quarantine):
                if file:
                    file.close()

    def _rows(self, name: str, begins: int | None) -> StepRows | None:
        return StepRows(self.run_folder / f"{name}.jsonl", resume_step=begins) if self.ranks.leads else None

    def _hear(self, asked: str | None) -> str | None:
        """Return what asks any process to stop; one small message, which mostly says that nothing does."""
        votes = self.ranks.mean(to_tensor(np.array([asked is not None], np.float32)))
        return self.ranks.agree(asked) if to_array(votes).any() else None

    def _compiles(self, step: int) -> bool:
        """Whether a graph is compiled in this step: its shape is new here."""
        new = self.compiled and self.sampler.bucket(step - 1) not in self._shapes
        self._shapes.add(self.sampler.bucket(step - 1))
        return new

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        losses = []
        for _ in range(self.num_micros):
            losses.append(self.learner.micro(make_ready(next(batches), self.encoder)))
        norm = self.learner.step(learning_rate(step, **self.rate))
        if self.ema:
            self.ema.update(step=step)
        self._pending.append((step, losses, norm))

    def _fetch(self) -> list[Step]:
        """Return the steps since the last line, of all processes, which call this alike.

        What they were made of follows from the seed and the step.
        """
        rows = [self._place(np.stack([to_array(micro) for micro in losses])) for _, losses, _ in self._pending]
        means, steps, start = to_array(self.ranks.mean(to_tensor(np.concatenate(rows)))), [], 0
        for (number, _, norm), row in zip(self._pending, rows, strict=True):
            values = [float(mean) * self.ranks.layout.num_data_ranks for mean in means[start : start + len(row)]]
            start += len(row)
            samples = [
                Sample(clip_id=pick.clip_id, timestep=self.draws.timestep(pick), loss=loss)
                for pick, loss in zip(self.sampler.batch(number - 1), values, strict=True)
            ]
            bucket = self.sampler.bucket(number - 1)
            steps.append(Step(number=number, bucket=bucket, samples=samples, norm=float(norm), limit=math.inf))
        self._pending.clear()
        return steps

    def _place(self, losses: np.ndarray) -> np.ndarray:
        """Put this process' `losses` [M, B] where they are in the global batch, [M * ranks * B], zeros around them."""
        row = np.zeros((len(losses), self.ranks.layout.num_data_ranks, losses.shape[1]), np.float32)
        row[:, self.ranks.data_rank] = losses
        return row.reshape(-1)

    def _log(self, step: int, log: MetricsLog, samples: StepRows | None, quarantine: StepRows | None) -> None:
        """Fetch what happened since the last line, write it down and see that all is well.

        Raises:
            NonFiniteError: a loss or norm is NaN or Inf, and the policy does not go on; or weights are NaN.
            FactoryError: nothing is learned.
        """
        steps, update = self._fetch(), self.learner.update
        weight_norm, now = update.weight_norm(), time.monotonic()
        seconds = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock, self._clock_step = now, step
        values = averages(steps, by_bucket=len(self.sampler.counts) > 1)
        values |= {"learning_rate": learning_rate(step, **self.rate), "seconds_per_step": seconds}
        values |= self.work.rates(steps, seconds)
        values |= {
            "epoch": self.sampler.epochs(step), "weight_norm": weight_norm, "memory_gib": peak_memory() / 2**30,
            "host_memory_gib": resident_memory() / 2**30, "skipped": float(update.num_skipped),
        }  # fmt: skip
        if update.scales_loss:
            values["loss_scale"] = float(update.loss_scale)
        log.write(step, values)
        if samples:
            samples.write(sample_rows(steps, self.log_samples))
        say(
            f"step {step}/{self.num_steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3g}  "
            f"lr {values['learning_rate']:.3g}  {seconds:.3g} s/step  {values['tokens_per_second']:.3g} tokens/s  "
            f"{values['memory_gib']:.2f} GiB  left {duration(seconds * (self.num_steps - step))}"
        )
        self._answer(bad_among(steps, loss_scale=values.get("loss_scale")), quarantine)
        _require_sound(steps, weight_norm)

    def _answer(self, found: Sequence[BadStep], quarantine: StepRows | None) -> None:
        """Name the steps that updated nothing and their clips.

        Raises:
            NonFiniteError: the policy is to stop, or they are too many.
        """
        if not found:
            return
        if quarantine:
            quarantine.write(
                {
                    "step": bad.step.number, "clip": sample.clip_id, "name": self.loader.name(sample.clip_id),
                    "bucket": bad.step.bucket, "timestep": sample.timestep, "loss": sample.loss, "reason": bad.reason,
                    "suspects": len(bad.suspects),
                }
                for bad in found
                for sample in bad.suspects
            )  # fmt: skip
        for bad in found:
            names = ", ".join(f"{self.loader.name(s.clip_id)} ({s.clip_id})" for s in bad.suspects[:8])
            say(f"SKIPPED step {bad.step.number}: {bad.reason}, with {names}")
        self._bad += [bad.step.number for bad in found]
        if why := "train.on_bad_step=stop" if self.on_bad_step == "stop" else too_many(self._bad):
            steps = list_checkpoints(self.run_folder)
            newest = checkpoint_folder(self.run_folder, steps[-1]).name if steps else "none"
            raise NonFiniteError(
                f"step {found[0].step.number}: {found[0].reason}. Stopped: {why}. Such a step updates no weight; the "
                f"newest checkpoint is {newest}. Start a new run with a lower --train.learning-rate, or without the "
                f"clips to blame (--train.exclude {self.run_folder / 'quarantine.jsonl'})."
            )

    def _save(self, step: int, *, must: bool) -> None:
        """Write a checkpoint, which says what it holds, and the clips that come next.

        A full disk is survived, because the older checkpoints are still there, unless this one `must` be.
        """
        began = time.monotonic()
        position = {"epoch": self.sampler.epochs(step), "next_clips": self._next_clips(step)}
        state = {**self.record, "scalars": self.learner.update.scalars(), "position": position}
        try:
            folder = save_checkpoint(
                self.run_folder, step, state_tensors(self.learner.update, self.ema), state, keep=self.keep,
                ranks=self.ranks,
            )  # fmt: skip
        except StorageError as error:
            if must:
                raise
            say(f"NOT SAVED at step {step}, trying again at the next: {error}")
        else:
            say(f"step {step}: {folder} saved in {time.monotonic() - began:.3g} s")
            self.limit.spent("save", time.monotonic() - began)
        self._restart_clocks(step)

    def _look(self, step: int, log: MetricsLog) -> None:
        began = time.monotonic()
        self.watch.look(step, log, self.ema.in_model() if self.ema else nullcontext())
        self.limit.spent("look", time.monotonic() - began)
        self._restart_clocks(step)

    def _restore(self, folder: Path) -> int:
        state = load_checkpoint(folder, state_tensors(self.learner.update, self.ema))
        self.learner.update.restore(state["scalars"])
        step, wanted = state["step"], state["position"]["next_clips"]
        if wanted != self._next_clips(step) and not differences(state["identity"], self.record["identity"]):
            raise UnfitError(
                f"{folder}: step {step + 1} is of the clips {', '.join(wanted[:3])}, but this version would take "
                f"{', '.join(self._next_clips(step)[:3])}. Go on with the version it was saved by: {state['versions']}."
            )
        return step

    def _next_clips(self, step: int) -> list[str]:
        return [pick.clip_id for pick in self.sampler.batch(step)]

    def _restart_clocks(self, step: int) -> None:
        """Measure steps from here on: what was before is none's."""
        self._clock, self._clock_step = time.monotonic(), step
        self.limit.go_on(step)


def _require_sound(steps: Sequence[Step], weight_norm: float) -> None:
    """Refuse to go on with weights that are not finite, or without a gradient."""
    if not math.isfinite(weight_norm):
        raise NonFiniteError(
            f"weights are not finite after step {steps[-1].number}, though every gradient that was used is. They are "
            "not saved; the same command goes on from the newest checkpoint."
        )
    if steps[0].number == 1 and steps[0].norm == 0:
        raise FactoryError(
            "every gradient of step 1 is exactly 0, so nothing would be learned. Are the model's weights all zero, or "
            "the clips empty? Otherwise give other --lora.target-modules."
        )


def state_tensors(update: Update, ema: Ema | None) -> State:
    """Return the tensors of a checkpoint."""
    return State(update.division, update.state() | (ema.state() if ema else {}))


def make_ready(batch: dict[str, Any], encoder: Encoder | None) -> dict[str, Any]:
    """Return a batch of the ground as tensors, raw clips encoded."""
    tensors = to_tensors({key: value for key, value in batch.items() if key not in _GROUND_ONLY})
    return encoder.batch(tensors) if encoder else tensors
