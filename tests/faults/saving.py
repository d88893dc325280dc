"""F3, F4, F5: training killed at every boundary of a save, at random times, and while it exports."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from itertools import groupby
from pathlib import Path
from typing import Any

from cogvideox_factory import draws
from cogvideox_factory.data.export import export_to_video
from tests.faults import engine
from tests.faults.boundaries import KILL_AFTER, KILL_BEFORE, Boundaries
from tests.faults.makers import moving
from tests.faults.training import (
    KILLED,
    LONGER,
    SAVE_EVERY,
    Together,
    codes,
    command,
    digest,
    empty,
    folder_of_this_run,
    goes_on,
    in_children,
    left_intact,
    recipe,
    redone,
    wanted,
)
from tests.faults.trial import Child, Outcome, Trial, Verdict, in_child, spread

_PEER = 8
_MOST_KILLS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class In:
    """Something to be done in one process of a run before it trains."""

    rank: int
    function: Callable[[], object]

    def __call__(self) -> None:
        if os.environ.get("RANK", "0") == str(self.rank):
            self.function()


def _count(path: Path, run: Path, among: str) -> list[str]:
    boundaries = Boundaries(run, among=among).install()
    assert command("train", path) == 0
    return boundaries.seen


@once
def boundaries_of(among: str, size: int, **settings: Any) -> list[list[str]]:
    """Return the boundaries each process of an undisturbed run passes."""
    run = folder_of_this_run("counted") / "run"
    outcomes = in_children(size, _count, recipe(run, **settings), run, among)
    assert all(outcome.exit_code == 0 for outcome in outcomes), outcomes
    return [outcome.value for outcome in outcomes]


def _killed_where_asked(outcomes: list[Outcome], rank: int) -> tuple[Verdict, str]:
    """Judge how the processes ended: one killed, the others told so (or done, if they needed it no more)."""
    found = codes(outcomes)
    others = [code for other, code in enumerate(found) if other != rank]
    if found[rank] == KILLED and set(others) <= {0, _PEER}:
        return Verdict.OK, ""
    broke = next((outcome.broke for other, outcome in enumerate(outcomes) if other != rank and outcome.broke), None)
    return broke or Verdict.CRASH, f"ended with {found}: " + "".join(o.output + o.error for o in outcomes)


_SAVES = r"^/(checkpoint-|\.tmp-.*checkpoint-)"


def killed_in_saves(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F3: killed before and after each boundary of three saves, the last of which removes a checkpoint."""
    every = [
        (way, size, rank, number, fault)
        for way, settings in engine.ways_to_save().items()
        for size in engine.sizes()
        for rank, seen in enumerate(boundaries_of(_SAVES, size, **settings))
        for number, fault in _places(seen)
    ]
    for way, size, rank, number, fault in spread(every, count):
        run, settings = empty(work / "run"), engine.ways_to_save()[way]
        breaks = In(rank=rank, function=Boundaries(run, number, fault, among=_SAVES).install)
        outcomes = in_children(size, command, "train", recipe(run, **settings), breaks)
        verdict, detail = _killed_where_asked(outcomes, rank)
        lost = 0
        if verdict == Verdict.OK:
            verdict, detail, lost = after_a_kill(run, size, **settings)
        where = boundaries_of(_SAVES, size, **settings)[rank][number]
        name = f"{way}{size} processes, rank {rank}: {fault} {number}: {where}"
        yield Trial(family="F3", name=name, verdict=verdict, detail=detail, steps_redone=lost)


def _places(seen: list[str]) -> list[tuple[int, str]]:
    """Return where to kill: before and after each boundary.

    Where a process takes seconds to start, of equal ones in a row (an entry's tensors) only before the first, the one
    in the middle and the last; and after none but a rename or removal, as that is before the next.
    """
    if engine.starts_fast():
        return [(number, fault) for number in range(len(seen)) for fault in (KILL_BEFORE, KILL_AFTER)]
    places: list[tuple[int, str]] = []
    for name, run in groupby(range(len(seen)), key=seen.__getitem__):
        numbers = list(run)
        places += [(number, KILL_BEFORE) for number in spread(numbers, 3)]
        if name.startswith(("rename", "remove")):
            places.append((numbers[-1], KILL_AFTER))
    return places


def after_a_kill(run: Path, size: int, **settings: Any) -> tuple[Verdict, str, int]:
    """Judge a folder whose run was killed, then go on; return the logged steps that were done again, too."""
    want = wanted(size, **settings)
    lost = redone(run)
    verdict, detail = left_intact(run, want)
    settings_of_train = {"save_every": SAVE_EVERY} | engine.run_settings().get("train", {}) | settings
    # One that is still written does not count yet; the next waits for it.
    intervals = 2 if settings.get("async_checkpoint") else 1
    if verdict == Verdict.OK and lost > intervals * settings_of_train["save_every"]:
        verdict, detail = Verdict.LOST, f"{lost} steps are to be done again"
    if verdict == Verdict.OK:
        verdict, detail = goes_on(run, want, size, **settings)
    return verdict, detail, lost


def killed_at_random(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F4: killed after drawn times, again and again, until it is done."""
    for trial in range(count):
        size = max(engine.sizes()) if trial % 4 == 3 else 1
        rng, want, run = draws.generator(seed, "kill training", str(trial)), wanted(size, **LONGER), work / "run"
        empty(run)
        verdict, detail, lost, kills = Verdict.OK, "", 0, []
        while verdict == Verdict.OK and len(kills) < _MOST_KILLS:
            delay, rank = float(rng.uniform(0.2, 1.2)) * want.seconds, int(rng.integers(size))
            running = Together(size, command, "train", recipe(run, **LONGER))
            time.sleep(delay)
            running.children[rank].kill()
            outcomes = running.wait()
            if set(codes(outcomes)) == {0}:
                break
            kills.append(round(delay, 3))
            verdict, detail = _killed_where_asked(outcomes, rank)
            if verdict == Verdict.OK:
                lost = max(lost, redone(run))  # of one kill; several in a row may cost an interval each
                verdict, detail = left_intact(run, want)
            if verdict == Verdict.OK and lost > LONGER["save_every"]:
                verdict, detail = Verdict.LOST, f"{lost} steps are to be done again"
        if verdict == Verdict.OK:
            verdict, detail = goes_on(run, want, size, **LONGER)
        name = f"{trial}: {size} processes, killed after {kills} s"
        yield Trial(family="F4", name=name, verdict=verdict, detail=detail, steps_redone=lost)


_EXPORTS = r"^/(final|\.tmp-.*final)"
_METHODS: dict[str, dict[str, Any]] = {"lora": {}, "full": {"method": "full"}}


def killed_in_exports(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F5: killed at the boundaries of an export, the first of a run or a later one, and while a video is written."""
    videos = max(1, count // 3)
    every = [
        (method, again, number, fault)
        for method, settings in _METHODS.items()
        for again in (False, True)
        for number in range(len(boundaries_of(_EXPORTS, 1, **settings)[0]))
        for fault in (KILL_BEFORE, KILL_AFTER)
    ]
    for method, again, number, fault in spread(every, count - videos):
        run, settings = empty(work / "run"), _METHODS[method]
        verdict, detail = _killed_in_export(run, again, Boundaries(run, number, fault, among=_EXPORTS), settings)
        name = f"{method} {'for the second time' if again else 'once'}: {fault} {number}"
        yield Trial(family="F5", name=name, verdict=verdict, detail=detail)
    yield from _killed_in_videos(videos, seed, work)


def _killed_in_export(run: Path, again: bool, breaks: Boundaries, settings: dict[str, Any]) -> tuple[Verdict, str]:
    old = None
    if again:  # a finished run that is asked for more steps has an export to replace
        first = in_child(command, "train", recipe(run, **settings | {"steps": SAVE_EVERY}))
        assert first.value == 0, first.output
        old = digest(run / "final")
    ended = in_child(command, "train", recipe(run, **settings), breaks.install)
    want = wanted(1, **settings)
    if codes([ended]) != [KILLED]:
        return ended.broke or Verdict.CRASH, f"the kill never came: {ended}"
    if (run / "final").exists() and digest(run / "final") not in (old, want.final):
        return Verdict.SILENT, "final/ holds a part of an export"
    verdict, detail = left_intact(run, want)
    return goes_on(run, want, **settings) if verdict == Verdict.OK else (verdict, detail)


def _write_video(path: Path) -> float:
    started = time.monotonic()
    export_to_video(moving(33, 128, 128), path, fps=8)
    return time.monotonic() - started


def _killed_in_videos(count: int, seed: int, work: Path) -> Iterator[Trial]:
    path = work / "videos" / "out.mp4"
    whole = in_child(_write_video, path)
    wanted_bytes, long = path.read_bytes(), float(whole.value)
    for trial, delay in enumerate(draws.generator(seed, "kill video").uniform(0, 1.1 * long, count).tolist()):
        path.unlink(missing_ok=True)
        child = Child(_write_video, path)
        time.sleep(delay)
        child.kill()
        child.wait()
        verdict, detail = Verdict.OK, ""
        if path.exists() and path.read_bytes() != wanted_bytes:
            verdict, detail = Verdict.SILENT, "half a video has its final name"
        elif in_child(_write_video, path).exit_code != 0 or path.read_bytes() != wanted_bytes:
            verdict, detail = Verdict.LOST, "written again, it is another video"
        yield Trial(family="F5", name=f"video {trial}: after {delay:.3f} s", verdict=verdict, detail=detail)
