"""The training loop: forward, backward, update; now and then log, look, save.

Between log points nothing waits for the device: losses and norms stay there until a line is due.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cogvideox_factory.data.loader import Draws, Loader, Source
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.errors import NonFiniteError, StorageError
from cogvideox_factory.learning_rate import learning_rate
from cogvideox_factory.metrics import MetricsLog, duration, say
from cogvideox_factory.run_folder import StoppedError, StopRequest, stop_requests
from cogvideox_factory.torch_engine import checkpoint
from cogvideox_factory.torch_engine.device import peak_memory
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.objective import Objective
from cogvideox_factory.torch_engine.optim import Ema, Update
from cogvideox_factory.torch_engine.parallel import Ranks, local, reduce_gradients
from cogvideox_factory.torch_engine.watch import SampleVideos, held_out_loss, to_device
from cogvideox_factory.watchdog import Watchdog


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """What is looked at every so many steps (0: never)."""

    every: int
    source: Source
    clip_ids: list[str]
    draws: Draws
    samples: SampleVideos | None


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
    keep_checkpoints: int
    identity: dict[str, Any]
    """What a later resume must agree with."""
    tokens: Mapping[str, int]
    """Tokens of a sample of each shape."""
    watch: Watch
    ranks: Ranks
    hang_seconds: float = 0.0
    """Without a step after which the run ends (0: never)."""
    _pending: list[tuple[int, Tensor, Tensor]] = field(default_factory=list)
    _clock: float = 0.0
    _clock_step: int = 0

    def run(self, start: Path | None) -> None:
        """Train until `num_steps`, from checkpoint `start` or from scratch."""
        first = self._restore(start) if start else 0
        log = MetricsLog(self.run_folder, resume_step=first if start else None, writes=self.ranks.leads)
        batches = self.loader.batches(first, self.num_steps)
        self._clock, self._clock_step = time.monotonic(), first
        try:
            with stop_requests() as stop, Watchdog(self.hang_seconds) as watchdog:
                if not start and self.watch.every:
                    self._look(0, log)
                for step in range(first + 1, self.num_steps + 1):
                    self._step(step, batches)
                    watchdog.beat()
                    last = step == self.num_steps
                    stop.name = self.ranks.agree(stop.name)
                    saves = step % self.save_every == 0 or last or stop.name is not None
                    if step % self.log_every == 0 or saves or step == 1:
                        self._log(step, log)
                    if saves:
                        with watchdog.pause():
                            self._save(step, must=last or stop.name is not None)
                    if stop.name and not last:
                        self._leave(step, stop)
                    if self.watch.every and (step % self.watch.every == 0 or last):
                        with watchdog.pause():
                            self._look(step, log)
        finally:
            log.close()

    def state_bytes(self) -> int:
        """Return the size of one checkpoint."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def _step(self, step: int, batches: Iterator[dict[str, Any]]) -> None:
        losses = []
        for micro in range(self.num_micros):
            reduce_gradients(self.objective.transformer, self.ranks.layout, last=micro == self.num_micros - 1)
            batch = to_device(next(batches), self.device)
            loss = self.objective(self.encoder.batch(batch) if self.encoder else batch).mean()
            (loss * (self.update.loss_scale.scale / self.num_micros)).backward()
            losses.append(loss.detach())
        norm = self.update.step(learning_rate(step, **self.rate))
        if self.ema:
            self.ema.update(step=step)
        self._pending.append((step, torch.stack(losses).mean(), norm))

    def _log(self, step: int, log: MetricsLog) -> None:
        """Fetch what happened since the last line, in one transfer, and write it down.

        Raises:
            NonFiniteError: a loss or norm is NaN or Inf (fp16 overflows, which the loss scale handles, aside).
        """
        steps = [number for number, _, _ in self._pending]
        table = torch.stack([torch.stack([loss, norm]) for _, loss, norm in self._pending])  # [steps, 2]
        table = self.ranks.mean(table).cpu()
        self._pending.clear()
        self._check_finite(steps, table, step)
        now = time.monotonic()
        seconds = (now - self._clock) / max(step - self._clock_step, 1)
        self._clock, self._clock_step = now, step
        loss, norm = (_finite_mean(table[:, column]) for column in range(2))
        values = {
            "loss": loss, "grad_norm": norm, "learning_rate": learning_rate(step, **self.rate),
            "seconds_per_step": seconds,
            "tokens_per_second": self._mean_tokens(steps) / seconds,
            "epoch": self.sampler.epochs(step), "memory_gib": peak_memory(self.device) / 2**30,
        }  # fmt: skip
        if self.update.loss_scale.enabled:
            values |= {"loss_scale": float(self.update.loss_scale.scale), "skipped": float(self.update.num_skipped)}
        log.write(step, values)
        left = duration(seconds * (self.num_steps - step))
        say(
            f"step {step}/{self.num_steps}  loss {loss:.4f}  grad {norm:.3g}  lr {values['learning_rate']:.3g}  "
            f"{seconds:.3g} s/step  {values['tokens_per_second']:.3g} tokens/s  {values['memory_gib']:.2f} GiB  "
            f"left {left}"
        )

    def _mean_tokens(self, steps: Sequence[int]) -> float:
        sampler = self.sampler
        shapes = [sampler.bucket(step - 1) for step in steps]
        return sum(self.tokens[key] * sampler.batch_sizes[key] for key in shapes) / len(shapes)

    def _check_finite(self, steps: list[int], table: Tensor, step: int) -> None:
        scale = self.update.loss_scale
        if scale.enabled:  # an overflowing step is skipped and the scale halved, until that no longer helps
            lost = [number for number, row in zip(steps, table, strict=True) if not row[0].isfinite()]
            lost = lost or (steps if float(scale.scale) < 1 else [])
        else:
            lost = [number for number, row in zip(steps, table, strict=True) if not row.isfinite().all()]
        if lost:
            newest, _ = checkpoint.newest_checkpoint(self.run_folder)
            raise NonFiniteError(
                f"loss or gradient is not finite at step {lost[0]} (and {len(lost) - 1} more up to {step}). Such a "
                f"step updates no weight; the newest checkpoint is {newest or 'none'}. Start a new run with "
                "--run.dtype bfloat16 (or float32) or a lower --train.learning-rate."
            )

    def _look(self, step: int, log: MetricsLog) -> None:
        with self.averaged_weights():
            self._look_at(step, log)
        self._clock, self._clock_step = time.monotonic(), step

    def _look_at(self, step: int, log: MetricsLog) -> None:
        values = {}
        if self.watch.clip_ids:
            values = held_out_loss(
                self.objective, self.watch.source, self.watch.clip_ids, self.watch.draws,
                encoder=self.encoder, device=self.device,
            )  # fmt: skip
            log.write(step, values)
            say(f"step {step}: validation loss {values['validation_loss']:.4f}")
        if self.watch.samples:
            for path in self.watch.samples.make(self.run_folder / "samples", step, writes=self.ranks.leads):
                say(f"step {step}: {path}")

    def _save(self, step: int, *, must: bool) -> None:
        """Write a checkpoint; a full disk is survived until one is needed, because the older ones are still there."""
        if checkpoint.checkpoint_folder(self.run_folder, step).exists():
            return  # a resumed run that had nothing left to do
        state = {
            "identity": self.identity,
            "scalars": self.update.scalars(),
            "versions": checkpoint.versions(),
        }
        try:
            checkpoint.save_checkpoint(
                self.run_folder, step, self._tensors(), state, keep=self.keep_checkpoints, ranks=self.ranks
            )
        except StorageError as error:
            if must:
                raise
            say(f"NOT SAVED at step {step}, trying again at the next: {error}")
        self._clock, self._clock_step = time.monotonic(), step

    def _restore(self, folder: Path) -> int:
        state = checkpoint.load_checkpoint(folder, self._tensors(), ranks=self.ranks)
        self.update.restore(state["scalars"])
        return state["step"]

    def _tensors(self) -> dict[str, Tensor]:
        return self.update.tensors() | (self.ema.tensors() if self.ema else {})

    def _leave(self, step: int, stop: StopRequest) -> None:
        folder = checkpoint.checkpoint_folder(self.run_folder, step)
        raise StoppedError(f"stopped by {stop.name} after step {step}; {folder} is saved. The same command goes on.")

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


def _finite_mean(column: Tensor) -> float:
    finite = column[column.isfinite()].double()
    return finite.mean().item() if len(finite) else float("nan")
