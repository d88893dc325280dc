"""The training loop: forward, backward, update; now and then log, look, save.

Between log points nothing waits for the device: losses and norms stay there until a line is due.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory.checkpoints import checkpoint_folder
from cogvideox_factory.data.loader import Loader
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.errors import FactoryError, NonFiniteError, UnfitError
from cogvideox_factory.learning_rate import learning_rate
from cogvideox_factory.metrics import MetricsLog, StepRows, duration, progress_bar, say
from cogvideox_factory.run_folder import differences
from cogvideox_factory.step_records import Step, Work, averages, bad_among, sample_rows
from cogvideox_factory.stopping import StoppedError, StopRequest, stop_requests
from cogvideox_factory.time_limit import TimeLimit
from cogvideox_factory.torch_engine.bad_steps import BadSteps
from cogvideox_factory.torch_engine.border import local
from cogvideox_factory.torch_engine.checkpoint import load_checkpoint
from cogvideox_factory.torch_engine.device import host_memory, peak_memory
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.exhausted import InHand
from cogvideox_factory.torch_engine.ledger import Ledger
from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.saving import Saver
from cogvideox_factory.torch_engine.sharding import reduce_gradients
from cogvideox_factory.torch_engine.watch import Watch, to_device
from cogvideox_factory.tracker import Tracker
from cogvideox_factory.watchdog import Watchdog


@dataclass(kw_only=True, slots=True)
class Loop:
    """One run from its first (or next) step to its last."""

    objective: Objective
    update: Update
    ema: Ema | None
    sampler: Sampler
    loader: Loader
    encoder: Encoder | None
    """Encodes raw clips; None when latents come from a cache."""
    device: torch.device
    run_folder: Path
    num_steps: int
    num_micros: int
    rate: dict[str, Any]
    """Arguments of `learning_rate`."""
    log_every: int
    save_every: int
    saver: Saver
    limit: TimeLimit
    record: dict[str, Any]
    """What a checkpoint says of the run beside its position: identity, settings, versions, layout."""
    ledger: Ledger
    bad_steps: BadSteps
    work: Work
    log_samples: int
    """Samples whose loss is written down with a line, at most."""
    tracker: Tracker | None
    watch: Watch
    ranks: Ranks
    in_hand: InHand
    hang_seconds: float = 0.0
    """Without a step after which the run ends (0: never)."""
    compiled: bool = False
    """A shape that is new is compiled first, which takes its time."""
    _clock: float = 0.0
    _clock_step: int = 0
    _shapes: set[str] = field(default_factory=set)

    def run(self, start: Path | None) -> None:
        """Train until `num_steps`, from checkpoint `start` or from scratch."""
        first = self._restore(start) if start else 0
        begins = first if start else None
        log = MetricsLog(self.run_folder, resume_step=begins, writes=self.ranks.leads, tracker=self.tracker)
        samples = StepRows(self.run_folder / "losses.jsonl", resume_step=begins) if self.ranks.leads else None
        self.bad_steps.open(begins)
        self.saver.on_saved = partial(self.limit.spent, "save")
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
                    asked = self._hear(step, stop, num_saves=saves + 1 + self.saver.is_busy)
                    saves = saves or asked is not None
                    if step % self.log_every == 0 or saves or step == 1:
                        self._log(step, log, samples)
                        self.limit.reached(step)
                    if saves:
                        with watchdog.pause():
                            self._save(step, must=last or asked is not None)
                    if asked and not last:
                        self._leave(step, asked)
                    if self._looks(step):
                        with watchdog.pause():
                            self._look(step, log)
        except Exception as error:
            # What is being saved is from before. All must be here to finish it, as they are for this one error.
            if isinstance(error, NonFiniteError) or self.ranks.mesh is None:
                self.saver.settle()
            raise
        finally:
            self.saver.close()
            log.close()
            self.bad_steps.close()
            if samples:
                samples.close()

    def _compiles(self, step: int) -> bool:
        """Whether blocks are compiled in this step: its shape is new here."""
        new = self.compiled and self.sampler.bucket(step - 1) not in self._shapes
        self._shapes.add(self.sampler.bucket(step - 1))
        return new

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        self.in_hand.what = f"at step {step}, with clips of {self.sampler.bucket(step - 1)}"
        losses = []
        for micro in range(self.num_micros):
            reduce_gradients(self.objective.transformer, self.ranks.layout, last=micro == self.num_micros - 1)
            batch = to_device(next(batches), self.device)
            loss = self.objective(self.encoder.batch(batch) if self.encoder else batch)
            (loss.mean() * (self.update.loss_scale.scale / self.num_micros)).backward()
            losses.append(loss.detach())
        norm = self.update.step(learning_rate(step, **self.rate))
        if self.ema:
            self.ema.update(step=step)
        self.ledger.note(step, losses, norm, self.update.spikes.limit)

    def _log(self, step: int, log: MetricsLog, samples: StepRows | None) -> None:
        """Fetch what happened since the last line, in one transfer, write it down and see that all is well.

        Raises:
            NonFiniteError: a loss or norm is NaN, Inf or a spike, and `bad_steps` does not go on; or weights are NaN.
            FactoryError: nothing is learned.
        """
        update = self.update
        steps, extras = self.ledger.fetch(update.weight_norm(), update.num_skipped, update.loss_scale.scale)
        weight_norm, num_skipped, loss_scale = extras
        now = time.monotonic()
        seconds = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock, self._clock_step = now, step
        values = averages(steps, by_bucket=len(self.sampler.counts) > 1)
        values |= {"learning_rate": learning_rate(step, **self.rate), "seconds_per_step": seconds}
        values |= self.work.rates(steps, seconds)
        values |= {
            "epoch": self.sampler.epochs(step), "weight_norm": weight_norm,
            "memory_gib": peak_memory(self.device) / 2**30, "host_memory_gib": host_memory() / 2**30,
            "skipped": num_skipped,
        }  # fmt: skip
        if update.loss_scale.enabled:
            values["loss_scale"] = loss_scale
        log.write(step, values)
        if samples:
            samples.write(sample_rows(steps, self.log_samples))
        say(self._line(step, values))
        self.bad_steps.answer(bad_among(steps, loss_scale=values.get("loss_scale")), now=step)
        _require_sound(steps, weight_norm)

    def _line(self, step: int, values: Mapping[str, float]) -> str:
        speed = f"{values['tokens_per_second']:.3g} tokens/s  {values['tflops_per_card']:.3g} TFLOP/s"
        if "mfu" in values:
            speed += f"  MFU {values['mfu']:.1%}"
        return (
            f"step {step}/{self.num_steps}  loss {values['loss']:.4f}  grad {values['grad_norm']:.3g}  "
            f"lr {values['learning_rate']:.3g}  {values['seconds_per_step']:.3g} s/step  {speed}  "
            f"{values['memory_gib']:.2f} GiB  left {duration(values['seconds_per_step'] * (self.num_steps - step))}"
        )

    def _hear(self, step: int, stop: StopRequest, *, num_saves: int) -> str | None:
        """Let all processes know whose part of a checkpoint is written; return what asks all of them to stop.

        Going on for another step would bring `num_saves`, with those of this step and of one to leave with.
        """
        is_up = self.limit.is_up(step, saves=num_saves, looks=self._looks(step))
        words = self.ranks.gather((stop.name or ("train.time_limit_minutes" if is_up else None), self.saver.word))
        self.saver.hear([word for _, word in words])
        return next((name for name, _ in words if name), None)

    def _looks(self, step: int) -> bool:
        return bool(self.watch.every) and (step % self.watch.every == 0 or step == self.num_steps)

    def _look(self, step: int, log: MetricsLog) -> None:
        began = time.monotonic()
        with self.averaged_weights():
            self.in_hand.what = f"while looking after step {step}"
            self.watch.look(step, log)
        self.limit.spent("look", time.monotonic() - began)
        self._restart_clocks(step)

    def _save(self, step: int, *, must: bool) -> None:
        """Write a checkpoint, which says what it holds, and the clips that come next."""
        state = {
            **self.record,
            "scalars": self.update.scalars(),
            "position": {
                "epoch": self.sampler.epochs(step),
                "next_clips": [pick.clip_id for pick in self.sampler.batch(step)],
            },
        }
        self.saver.save(step, state_tensors(self.update, self.ema), state, must=must)
        self._restart_clocks(step)

    def _restore(self, folder: Path) -> int:
        tensors = state_tensors(self.update, self.ema)
        state = load_checkpoint(folder, tensors, ranks=self.ranks, verified=True)  # by `find_start`
        self.update.restore(state["scalars"])
        self._check_position(folder, state)
        return state["step"]

    def _check_position(self, folder: Path, state: dict[str, Any]) -> None:
        """Refuse to go on with other clips than come next, which another version's sampler might draw."""
        step, wanted = state["step"], state.get("position", {}).get("next_clips")
        found = [pick.clip_id for pick in self.sampler.batch(step)]
        if wanted not in (None, found) and not differences(state["identity"], self.record["identity"]):
            raise UnfitError(
                f"{folder}: step {step + 1} is of the clips {', '.join(wanted[:3])}, but this version would take "
                f"{', '.join(found[:3])}. Go on with the version it was saved by: {state['versions']}."
            )

    def _restart_clocks(self, step: int) -> None:
        """Measure steps from here on: what was before is none's."""
        self._clock, self._clock_step = time.monotonic(), step
        self.limit.go_on(step)

    def _leave(self, step: int, asked: str) -> None:
        folder = checkpoint_folder(self.run_folder, step)
        raise StoppedError(f"stopped by {asked} after step {step}; {folder} is saved. The same command goes on.")

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averages (if they are kept) into the model for the duration."""
        if self.ema is None:
            yield
            return
        kept = {name: local(p).detach().clone() for name, p in self.update.trained.items()}
        try:
            self._put(self.ema.averages)
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.update.trained.items():
            local(parameter).copy_(values[name])


def _require_sound(steps: Sequence[Step], weight_norm: float) -> None:
    """Refuse to go on with weights that are not finite, or without a gradient."""
    last = steps[-1].number
    if not math.isfinite(weight_norm):
        raise NonFiniteError(
            f"weights are not finite after step {last}, though every gradient that was used is. They are not saved; "
            "the same command goes on from the newest checkpoint. Should it happen again, look at the card's memory."
        )
    if steps[0].number == 1 and steps[0].norm == 0:
        raise FactoryError(
            "every gradient of step 1 is exactly 0, so nothing would be learned. Are the model's weights all zero, or "
            "the clips empty? Otherwise give other --lora.target-modules."
        )


def state_tensors(update: Update, ema: Ema | None) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name."""
    return update.tensors() | (ema.tensors() if ema else {})
