"""F1, F2, F23: `prepare` killed at every boundary and at random times, and several at once."""

import contextlib
import shutil
import time
from collections.abc import Iterator
from functools import cache as once
from pathlib import Path

from cogvideox_factory import draws
from cogvideox_factory.config import Config
from cogvideox_factory.data.cache_check import DAMAGED, audit_cache
from cogvideox_factory.data.cache_index import open_cache
from cogvideox_factory.data.entry import read_entry
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.run_folder import locked
from cogvideox_factory.weights import resolve_model
from tests.faults.boundaries import KILL_AFTER, KILL_BEFORE, Boundaries
from tests.faults.makers import good_set
from tests.faults.trial import Child, Outcome, Trial, Verdict, files_of, folder_of_this_run, in_child, spread


def settings(root: Path, cache: Path) -> Config:
    """Return the settings that prepare `root` with the embedded model."""
    return Config.model_validate({
        "model": {"path": "tiny-t2v"}, "run": {"device": "cpu", "dtype": "float32"}, "cache": {"dir": str(cache)},
        "data": {"root": str(root), "num_frames": 9, "height": 64, "width": 64, "fps": 8},
    })  # fmt: skip


def prepare(root: Path, cache: Path, boundaries: Boundaries | None = None) -> list[str]:
    """Run the command in this process and return the boundaries it passed.

    Raises:
        FactoryError: what a user would be told.
    """
    from cogvideox_factory.torch_engine import prepare as engine

    if boundaries:
        boundaries.install()
    engine.run(settings(root, cache))
    return boundaries.seen if boundaries else []


@once
def warm() -> None:
    """Import, once and in the parent, what every child would import; no kernel runs here."""
    import torch

    from cogvideox_factory.torch_engine import prepare  # noqa: F401
    from cogvideox_factory.torch_engine.device import set_determinism
    from cogvideox_factory.torch_engine.text_encoder import TextEncoder
    from cogvideox_factory.torch_engine.vae import CogVideoXVAE

    before = torch.are_deterministic_algorithms_enabled()
    set_determinism(before)
    folder = resolve_model("tiny-t2v")
    TextEncoder.from_folder(folder, dtype=torch.float32, device=torch.device("cpu"))
    CogVideoXVAE.from_folder(folder / "vae", dtype=torch.float32, device=torch.device("cpu"))


@once
def bench() -> tuple[Path, dict[str, bytes], list[str], float]:
    """Return (a data set, the files of an undisturbed run on it, its boundaries, its seconds)."""
    warm()
    work = folder_of_this_run("prepare")
    root = good_set(work / "set")
    outcome = in_child(prepare, root, work / "cache", Boundaries(work / "cache"))
    assert outcome.exit_code == 0, outcome.output
    return root, files_of(work / "cache"), outcome.value, outcome.seconds


def _after(ended: Outcome, root: Path, cache: Path, wanted: dict[str, bytes]) -> tuple[Verdict, str]:
    """Judge a folder that a run was stopped in: what stands there is whole, and the same command finishes it."""
    if ended.broke and ended.signal != 9:
        return ended.broke, ended.output + ended.error
    committed: dict[str, tuple[int, int]] = {}
    if cache.exists():
        bad = [finding for finding in audit_cache(cache).of(DAMAGED) if finding.file.endswith(".safetensors")]
        if bad:
            return Verdict.SILENT, f"{bad[0].file} has its final name and is damaged"
        committed = {str(p): _identity(p) for p in cache.glob("*/??/*.safetensors") if not p.name.startswith(".")}
    again = in_child(prepare, root, cache)
    if again.exit_code != 0:
        return again.broke or Verdict.LOST, again.output + again.error
    if files_of(cache) != wanted:
        return Verdict.LOST, f"other files: {sorted(files_of(cache).items() ^ wanted.items())[:3]}"[:500]
    redone = [name for name, identity in committed.items() if _identity(Path(name)) != identity]
    return (Verdict.LOST, f"made again: {redone}") if redone else (Verdict.OK, "")


def _identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def killed_at_boundaries(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F1: killed before and after the boundaries of a run, the first to the last of them."""
    root, wanted, boundaries, _ = bench()
    every = [(number, fault) for number in range(len(boundaries)) for fault in (KILL_BEFORE, KILL_AFTER)]
    for number, fault in spread(every, count):
        cache = work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        ended = in_child(prepare, root, cache, Boundaries(cache, number, fault))
        verdict, detail = _after(ended, root, cache, wanted)
        if ended.signal != 9 and verdict == Verdict.OK:
            verdict, detail = Verdict.CRASH, f"the kill never came: {ended}"
        yield Trial(family="F1", name=f"{fault} {number}: {boundaries[number]}", verdict=verdict, detail=detail)


def killed_at_random(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F2: killed after a drawn time, up to a little longer than an undisturbed run takes."""
    root, wanted, _, seconds = bench()
    for number, delay in enumerate(draws.generator(seed, "kill").uniform(0, 1.1 * seconds, count).tolist()):
        cache = work / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        child = Child(prepare, root, cache)
        time.sleep(delay)
        child.kill()
        verdict, detail = _after(child.wait(), root, cache, wanted)
        yield Trial(family="F2", name=f"{number}: after {delay:.3f} s", verdict=verdict, detail=detail)


def several_at_once(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F23: two and four prepares at once; a reader while a larger set is prepared; a second run in one folder."""
    kinds = (_two, _four, _reader, _second_run)
    for number in range(count):
        kind = kinds[number % len(kinds)]
        shutil.rmtree(work / "shared", ignore_errors=True)
        verdict, detail = kind(work / "shared")
        yield Trial(family="F23", name=f"{number}: {kind.__name__.strip('_')}", verdict=verdict, detail=detail)


def _two(cache: Path) -> tuple[Verdict, str]:
    return _together(cache, 2)


def _four(cache: Path) -> tuple[Verdict, str]:
    return _together(cache, 4)


def _together(cache: Path, number: int) -> tuple[Verdict, str]:
    root, wanted, _, _ = bench()
    ended = [child.wait() for child in [Child(prepare, root, cache) for _ in range(number)]]
    for outcome in ended:
        if outcome.exit_code != 0:
            return outcome.broke or Verdict.LOST, outcome.output + outcome.error
    return (Verdict.OK, "") if files_of(cache) == wanted else (Verdict.SILENT, "not the files of one run")


def _read_on(cache: Path, clips: int) -> list[int]:
    """Open the cache and read everything in it, until it has this many clips; return the numbers that were seen."""
    seen: list[int] = []
    while clips not in seen:
        index = open_cache(cache)
        for clip in index.clips:
            read_entry(clip.clip_file, verify=True)
            read_entry(clip.text_file, verify=True)
        seen = list(dict.fromkeys([*seen, len(index.clips)]))
    return seen


def _reader(cache: Path) -> tuple[Verdict, str]:
    root = bench()[0]
    if (first := in_child(prepare, root, cache)).exit_code != 0:
        return Verdict.CRASH, first.output
    larger = good_set(cache.parent / "larger", 5)
    reader, writer = Child(_read_on, cache, 5), Child(prepare, larger, cache)
    written, read = writer.wait(), reader.wait()
    if written.exit_code != 0 or read.exit_code != 0:
        return written.broke or read.broke or Verdict.SILENT, written.error + read.error + read.output
    return (Verdict.OK, "") if set(read.value) <= {3, 5} else (Verdict.SILENT, f"the reader saw {read.value} clips")


def _hold(run: Path) -> None:
    with locked(run):
        (run / "held").touch()
        time.sleep(30)


def _enter(run: Path) -> None:
    with locked(run):
        pass


def _second_run(run: Path) -> tuple[Verdict, str]:
    first = Child(_hold, run)
    with contextlib.suppress(FactoryError):
        while not (run / "held").exists() and time.monotonic() - first.started < 10:
            time.sleep(0.01)
    second = in_child(_enter, run)
    first.kill()
    first.wait()
    third = in_child(_enter, run)
    if second.exit_code != 2 or "another process" not in second.error:
        return second.broke or Verdict.SILENT, f"the second run was let in: {second}"
    return (Verdict.REFUSED, "") if third.exit_code == 0 else (Verdict.LOST, f"a dead run's lock holds: {third}")
