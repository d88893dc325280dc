"""Steps whose loss or gradient was not finite, or a spike: named, kept for another look, and answered by policy.

Such a step has updated no weight, which was decided on the device (`optim`, `spikes`). This is what follows when it is
noticed, at the next line of the log and so before any checkpoint. All processes have the same figures and come to the
same verdict.

```
RUN/quarantine.jsonl      a row for each clip that is to blame, or may be: step, clip, shape, timestep, loss, reason
RUN/replay/step-N.json    what is known of the first such step of a line, and the files with its batches
```
Nothing is taken out of the run's order of clips, which stays a function of the seed and the step; another run leaves
the clips of a quarantine out by `train.exclude`.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cogvideox_factory.checkpoints import checkpoint_folder, list_checkpoints
from cogvideox_factory.data.loader import Loader
from cogvideox_factory.data.replay import write_batch
from cogvideox_factory.data.sampler import Pick
from cogvideox_factory.errors import NonFiniteError
from cogvideox_factory.metrics import StepRows, finite_json, say
from cogvideox_factory.publish import publish_text
from cogvideox_factory.ranks import AgreedError
from cogvideox_factory.step_records import BadStep, Sample, too_many
from cogvideox_factory.torch_engine.ranks import Ranks

_NAMED = 8


class BadSteps:
    """Answers bad steps of one run.

    Args:
        run_folder: where to write.
        policy: "stop", or "skip" until they become too many.
        loader: what steps are made of.
        ranks: the processes of the run.
        examine: returns what is first not finite when this process' batches are computed again, or None.
    """

    def __init__(
        self, run_folder: Path, *, policy: str, loader: Loader, ranks: Ranks,
        examine: Callable[[list[dict[str, Any]]], str | None],
    ) -> None:  # fmt: skip
        self.run_folder, self.policy, self.loader, self.ranks, self.examine = run_folder, policy, loader, ranks, examine

    def open(self, resume_step: int | None) -> None:
        """Begin at a step: later rows of the quarantine, of a run that died, go."""
        self._rows = (
            StepRows(self.run_folder / "quarantine.jsonl", resume_step=resume_step) if self.ranks.leads else None
        )
        self._numbers: list[int] = self.ranks.from_lead(lambda: self._rows.steps() if self._rows else [])

    def close(self) -> None:
        """Close the quarantine."""
        if self._rows:
            self._rows.close()

    def answer(self, found: list[BadStep], *, now: int) -> None:
        """Name, keep and count the bad steps `found` of a line written after step `now`.

        Raises:
            NonFiniteError: the policy is to stop, or they are too many.
        """
        if not found:
            return
        if self._rows:
            self._rows.write(row for bad in found for row in self._quarantined(bad))
        first = self._look_again(found[0], now=now)
        self._numbers += [bad.step.number for bad in found]
        why = "train.on_bad_step=stop" if self.policy == "stop" else too_many(self._numbers)
        if why is None:
            for bad, text in zip(found, [first, *map(self._describe, found[1:])], strict=True):
                say(f"SKIPPED step {bad.step.number}: {text}")
            return
        others = f" (and {len(found) - 1} more up to {now})" if len(found) > 1 else ""
        raise NonFiniteError(
            f"step {found[0].step.number}{others}: {first}. Stopped: {why}. Such a step updates no weight; the newest "
            f"checkpoint is {self._checkpoint() or 'none'}. {_way_out(found[0].reason)}"
        )

    def _look_again(self, bad: BadStep, *, now: int) -> str:
        """Compute the step again, write it down, and return all that is to be said of it."""
        text = self._describe(bad)
        suspects = {sample.clip_id for sample in bad.suspects}
        index, file = bad.step.number - 1, self._replay(bad.step.number)
        try:
            batches = self.ranks.together(
                lambda: [self.loader.batch(index, micro) for micro in range(self.loader.num_micros)]
            )
            where = None
            if bad.reason != "gradient.spike":
                where = self.examine(batches)
                text += f"; first not finite: {where or f'nothing, with the weights after step {now}'}"
            self.ranks.together(lambda: self._keep(bad, batches, suspects, where=where, now=now))
        except AgreedError as error:
            return f"{text}; it could not be kept ({error})"
        return f"{text}; kept in {file}"

    def _keep(
        self, bad: BadStep, batches: list[dict[str, Any]], suspects: set[str], *, where: str | None, now: int
    ) -> None:
        """Write this process' batches that hold a suspect, and (one process) what is known of the step."""
        own, index = self.loader.rank, bad.step.number - 1
        for micro, batch in enumerate(batches):
            if self.ranks.leads_video and not suspects.isdisjoint(batch["clip_ids"]):
                write_batch(self._replay(bad.step.number, micro, own), batch)
        if not self.ranks.leads:
            return
        files = [
            self._replay(bad.step.number, micro, rank).name
            for micro in range(self.loader.num_micros)
            for rank in range(self.loader.num_ranks)
            if not suspects.isdisjoint(_ids(self.loader.picks(index, micro, rank=rank)))
        ]
        known = {
            "step": bad.step.number, "reason": bad.reason, "bucket": bad.step.bucket,
            "gradient_norm": bad.step.norm, "limit": bad.step.limit, "first_not_finite": where,
            "examined_after_step": now, "checkpoint": self._checkpoint(), "files": files,
            "suspects": [self._row(bad, sample) for sample in bad.suspects],
        }  # fmt: skip
        publish_text(self._replay(bad.step.number), json.dumps(finite_json(known), indent=1))

    def _quarantined(self, bad: BadStep) -> list[dict[str, Any]]:
        return [{**self._row(bad, sample), "suspects": len(bad.suspects)} for sample in bad.suspects]

    def _row(self, bad: BadStep, sample: Sample) -> dict[str, Any]:
        return {
            "step": bad.step.number, "clip": sample.clip_id, "name": self.loader.name(sample.clip_id),
            "bucket": bad.step.bucket, "timestep": sample.timestep, "loss": sample.loss, "reason": bad.reason,
        }  # fmt: skip

    def _describe(self, bad: BadStep) -> str:
        step = bad.step
        what = {
            "loss.nonfinite": f"the loss is {bad.suspects[0].loss}",
            "gradient.nonfinite": f"the gradient norm is {step.norm}",
            "gradient.spike": f"the gradient norm {step.norm:.3g} is a spike, over {step.limit:.3g}",
        }[bad.reason]
        clips = [f"{self.loader.name(s.clip_id)} ({s.clip_id}) at timestep {s.timestep}" for s in bad.suspects[:_NAMED]]
        if len(bad.suspects) > _NAMED:
            clips.append(f"{len(bad.suspects) - _NAMED} more")
        return f"{what} with {', '.join(clips)}, shape {step.bucket}"

    def _replay(self, step: int, micro: int | None = None, rank: int = 0) -> Path:
        ending = ".json" if micro is None else f"-{micro}-{rank}.safetensors"
        return self.run_folder / "replay" / f"step-{step:06}{ending}"

    def _checkpoint(self) -> str | None:
        """Return the name of the newest checkpoint; it is not hashed here, but by whoever reads it."""
        steps = list_checkpoints(self.run_folder)
        return checkpoint_folder(self.run_folder, steps[-1]).name if steps else None


def _ids(picks: Sequence[Pick]) -> list[str]:
    return [pick.clip_id for pick in picks]


def _way_out(reason: str) -> str:
    if reason == "gradient.spike":
        return "A lower --train.learning-rate or a higher --train.spike-factor goes on, in a new --train.dir."
    return (
        "Start a new run with --run.dtype bfloat16 (or float32), with a lower --train.learning-rate, or without the "
        "clips to blame (--train.exclude QUARANTINE.jsonl)."
    )
