"""F21, F22, F24, F25: numbers that are none, other numbers of processes, clocks that jump, memory that grows."""

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cogvideox_factory import draws
from tests.faults.makers import good_set
from tests.faults.preparing import prepare
from tests.faults.training import (
    STEPS,
    codes,
    command,
    digest,
    empty,
    goes_on,
    in_children,
    left_intact,
    losses,
    recipe,
    redone,
    same,
    wanted,
)
from tests.faults.trial import Trial, Verdict, in_child, spread

_NON_FINITE, _PEER = 7, 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Poison:
    """A number that is none, in one place of one process at one step."""

    rank: int
    step: int
    where: str
    value: float

    def __call__(self) -> None:
        from cogvideox_factory.torch_engine import loop, optim

        if os.environ.get("RANK", "0") != str(self.rank):
            return
        steps: list[int] = []
        trained, computed, updated = loop.Loop._step, loop.Objective.__call__, optim.Update.step
        moved = loop.to_device

        def step(this: Any, number: int, batches: Any) -> None:
            steps.append(number)
            trained(this, number, batches)

        def now(where: str) -> bool:
            return self.where == where and steps[-1:] == [self.step]

        def objective(this: Any, batch: Any) -> Any:
            found = computed(this, batch)
            return found * self.value if now("loss") else found

        def to_device(*args: Any) -> Any:
            batch = moved(*args)
            if now("latent"):
                batch["mean"].view(-1)[7] = self.value
            return batch

        def update(this: Any, rate: float) -> Any:
            if now("gradient"):
                gradient = optim.local(next(p.grad for p in this.trained.values() if p.grad is not None))
                gradient.view(-1)[:1] = self.value
            return updated(this, rate)

        loop.Loop._step, loop.Objective.__call__ = step, objective
        loop.to_device, optim.Update.step = to_device, update


def poisoned(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F21: NaN or Inf in the loss, in one gradient, in one latent, on one process at one step."""
    kinds = list(itertools.product(("loss", "gradient", "latent"), (1, 2), (math.nan, math.inf)))
    for trial, (where, size, value) in zip(range(count), itertools.cycle(spread(kinds, count))):
        rng, run = draws.generator(seed, "poison", str(trial)), empty(work / "run")
        log_every, zero = int(rng.integers(1, 4)), int(rng.choice([0, 3])) if size > 1 else 0
        settings = {"log_every": log_every, "on_bad_step": "stop", "parallel": {"zero": zero}}
        want = wanted(size, zero)
        poison = Poison(rank=int(rng.integers(size)), step=int(rng.integers(1, STEPS + 1)), where=where, value=value)
        outcomes = in_children(size, command, "train", recipe(run, **settings), poison)
        found, lost = codes(outcomes), redone(run)
        verdict, detail = Verdict.OK, ""
        if _NON_FINITE not in found or not set(found) <= {_NON_FINITE, _PEER}:
            broke = next((outcome.broke for outcome in outcomes if outcome.broke), Verdict.SILENT)
            verdict, detail = broke, f"ended with {found}: " + "".join(o.output[-800:] for o in outcomes)
        elif (run / "final").exists():
            verdict, detail = Verdict.SILENT, "it was exported"
        if verdict == Verdict.OK:
            verdict, detail = left_intact(run, want)
        if verdict == Verdict.OK:
            verdict, detail = goes_on(run, want, size, logged=log_every == 1, **settings)
        if verdict == Verdict.OK:
            verdict = Verdict.REFUSED
        name = f"{trial}: {value} in a {where}, rank {poison.rank} of {size}, step {poison.step} (ZeRO {zero}, "
        name += f"logged every {log_every})"
        yield Trial(family="F21", name=name, verdict=verdict, detail=detail, steps_redone=lost)


def moved(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F22: saved by so many processes and taken up by so many others, at any ZeRO stage; sequences divided or not."""
    pairs = [((a, 1), (b, 1)) for a, b in itertools.permutations((1, 2, 3, 4), 2)] + [
        ((1, 1), (2, 2)),
        ((2, 2), (1, 1)),
    ]
    for trial, (old, new) in enumerate(spread(pairs, count)):
        run = empty(work / "run")
        verdict, detail = _moved(run, _layout(old, trial), _layout(new, trial + 1), old[0], new[0])
        name = f"{trial}: {_called(old)}, then {_called(new)}"
        yield Trial(family="F22", name=name, verdict=verdict, detail=detail)


def _layout(shape: tuple[int, int], number: int) -> dict[str, int]:
    size, sequence = shape
    return {"zero": number % 4 if size > 1 else 0, "sequence": sequence}


def _called(shape: tuple[int, int]) -> str:
    return f"{shape[0]} processes" + (f" with sequences of {shape[1]}" if shape[1] > 1 else "")


def _moved(run: Path, before: dict, after: dict, old: int, new: int) -> tuple[Verdict, str]:
    """Train two steps, load elsewhere without a step, then train two more there."""
    shared = {"batch_size": 12, "save_every": 4}
    exported = []
    for size, parallel, steps in ((old, before, 2), (new, after, 2), (new, after, 4)):
        path = recipe(run, parallel=parallel, steps=steps, **shared)
        outcomes = in_children(size, command, "train", path)
        if codes(outcomes) != [0] * size:
            broke = next((outcome.broke for outcome in outcomes if outcome.broke), Verdict.LOST)
            return broke, f"{size} processes: {codes(outcomes)}: " + "".join(o.output[-800:] for o in outcomes)
        exported.append(digest(run / "final"))
    if exported[0] != exported[1]:
        return Verdict.SILENT, "what was loaded is not what was saved"
    straight, here = wanted(1, steps=4, **shared).losses, losses(run)
    far = {step: (here.get(step), loss) for step, loss in straight.items() if not _near(here.get(step), loss)}
    return (Verdict.SILENT, f"losses differ: {far}") if far or len(here) != len(straight) else (Verdict.OK, "")


def _near(one: float | None, other: float) -> bool:
    return one is not None and abs(one - other) <= 1e-5 * abs(other)


_DAY = 86400.0
CLOCKS: dict[str, Callable[[float, int], float]] = {
    "a day forward": lambda now, call: now + (_DAY if call > 40 else 0),
    "a day back": lambda now, call: now - (_DAY if call > 40 else 0),
    "stands still": lambda now, call: 1_700_000_000.0,
    "runs backwards": lambda now, call: 2_000_000_000.0 - call,
    "an hour back and forth": lambda now, call: now + 3600.0 * (call // 10 % 2),
    "before 1970": lambda now, call: -1.0,
}
"""What the clock says: (true time, how often it was asked) -> seconds."""


def _set_clock(kind: str) -> None:
    true, calls = time.time, itertools.count()
    time.time = lambda: CLOCKS[kind](true(), next(calls))
    time.time_ns = lambda: int(time.time() * 1e9)


def clocks(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F24: a clock that jumps, stands or runs backwards, while a run trains, saves and goes on."""
    for kind in spread(list(CLOCKS), count):
        run = empty(work / "run")
        first = in_child(command, "train", recipe(run, steps=4), lambda kind=kind: _set_clock(kind))
        second = in_child(command, "train", recipe(run), lambda kind=kind: _set_clock(kind))
        if codes([first, second]) != [0, 0]:
            broke = first.broke or second.broke or Verdict.LOST
            yield Trial(family="F24", name=kind, verdict=broke, detail=first.output + second.output + second.error)
            continue
        verdict, detail = same(run, wanted())
        if verdict == Verdict.OK and "left -" in first.output + second.output:
            verdict, detail = Verdict.SILENT, "a negative time left"
        yield Trial(family="F24", name=kind, verdict=verdict, detail=detail)


def _resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _train_measured(path: Path, steps: tuple[int, int]) -> list[tuple[int, int]]:
    from cogvideox_factory.torch_engine import loop

    original, seen = loop.Loop._step, []

    def step(this: Any, number: int, batches: Any) -> None:
        original(this, number, batches)
        if number in steps:
            seen.append((_resident(), _descriptors()))

    loop.Loop._step = step
    assert command("train", path) == 0
    return seen


def _prepare_measured(root: Path, work: Path) -> list[tuple[int, int]]:
    """Prepare a small data set, then a larger one, in one process."""
    seen = []
    for part in ("some", "many"):
        prepare(root / part, work / f"cache-{part}")
        seen.append((_resident(), _descriptors()))
    return seen


def memory(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F25: memory and open files of 300 steps, and of many clips through `prepare`."""
    if count:
        steps = {"steps": 300, "save_every": 100, "log_every": 10}
        yield _grown("300 steps", in_child(_train_measured, recipe(work / "run", **steps), (100, 300), limit=600.0))
        for part, number in (("some", 100), ("many", 400)):
            good_set(work / "clips" / part, number)
        yield _grown("400 clips", in_child(_prepare_measured, work / "clips", work, limit=600.0))


def _grown(name: str, ended: Any) -> Trial:
    if ended.exit_code != 0:
        return Trial(family="F25", name=name, verdict=ended.broke or Verdict.CRASH, detail=ended.output + ended.error)
    (memory_before, files_before), (memory_after, files_after) = ended.value
    growth = memory_after / memory_before - 1
    verdict = Verdict.OK if growth < 0.05 and files_after <= files_before else Verdict.LOST
    detail = f"memory grew by {100 * growth:.1f} %, open files from {files_before} to {files_after}"
    return Trial(family="F25", name=name, verdict=verdict, detail=detail)
