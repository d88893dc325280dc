"""All families of faults: what they are, how many trials a tier has, what passing means."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import (
    artefacts,
    caches,
    commands,
    hostile,
    launching,
    lists,
    media,
    numbers,
    preparing,
    saving,
    storage,
)
from tests.faults.trial import Trial

SEED = 20261124


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """One kind of fault."""

    id: str
    fault: str
    trials: Callable[[int, int, Path], Iterator[Trial]]
    """(how many, seed, an empty folder) -> trials."""
    quick: int
    full: int
    """At least so many trials; some kinds have a natural number of their own."""
    passes: str
    """What a passing verdict took."""
    in_mindspore: int = 0
    """Trials of a tier at most in runs of the MindSpore engine; 0: it has no part in them, or lacks what they need."""


def _each(*parts: Callable[[int, int, Path], Iterator[Trial]]) -> Callable[[int, int, Path], Iterator[Trial]]:
    """Return trials of several kinds.

    The first part's count is for its seven kinds together; whole commands, the last part, take seconds each.
    """
    files, of_runs, by_command = parts

    def trials(count: int, seed: int, work: Path) -> Iterator[Trial]:
        yield from files(count, seed, work)
        yield from of_runs(count // 7, seed, work)
        yield from by_command(count // 28, seed, work)

    return trials


FAMILIES = (
    Family(id="F1", fault="`prepare` killed (SIGKILL) before and after each boundary of writing",
           trials=preparing.killed_at_boundaries, quick=16, full=10_000,
           passes="no damaged file under a final name; the same command ends in the same bytes, makes no finished "
           "entry again, leaves no temporary"),
    Family(id="F2", fault="`prepare` killed (SIGKILL) at random times", trials=preparing.killed_at_random, quick=5,
           full=100, passes="as F1"),
    Family(id="F3", fault="training killed (SIGKILL) at each boundary of a checkpoint's save, in each process",
           trials=saving.killed_in_saves, quick=12, full=10_000, in_mindspore=10_000,
           passes="every checkpoint under its name is whole, at most one interval is lost (two, where it is written in "
           "the background), the same command ends in the same bits and losses, and leaves nothing over"),
    Family(id="F4", fault="training killed (SIGKILL) at random times, again and again", trials=saving.killed_at_random,
           quick=3, full=40, passes="as F3"),
    Family(id="F5", fault="killed in an export (LoRA, all weights; the first, a later one), and in a video's encoding",
           trials=saving.killed_in_exports, quick=8, full=100, in_mindspore=24,
           passes="the old, the new or none under the final name, then as F3"),
    Family(id="F6", fault="disk full: cache, checkpoint, export on disks of 12 sizes", trials=storage.full_disks,
           quick=9, full=36, passes="exit 6, nothing half-written, done when there is room"),
    Family(id="F7", fault="read-only, forbidden, a file in the way, failing calls (EIO, ENOSPC) at boundaries",
           trials=storage.failing_folders, quick=14, full=60, passes="exit 6 with the folder's name, then as F1"),
    Family(id="F8", fault="each of 7 kinds of cache files and of 6 of a run's cut; 7 kinds given to commands",
           trials=_each(caches.cut_files, artefacts.cut_files, commands.cut_files), quick=35, full=140,
           in_mindspore=140,
           passes="told by name; in a cache, exactly that entry is made again, to the same bytes; *reported*: a "
           "changed config.json, which a user may have meant, and a checkpoint that is passed over for the one before, "
           "which ends in the same bits"),
    Family(id="F9", fault="one bit of each of 7 kinds of cache files and of 6 of a run's flipped; as above",
           trials=_each(caches.flipped_bits, artefacts.flipped_bits, commands.flipped_bits), quick=35, full=700,
           in_mindspore=700, passes="as F8"),
    Family(id="F10", fault="entries deleted, swapped, doubled; other lists; each setting changed, one at a time",
           trials=caches.wrong_files, quick=47, full=60,
           passes="told by name; a changed setting is named, and no other"),
    Family(id="F11", fault="clips cut, with flipped bits, with blocks of zeros; MP4, MKV (H.264), WebM (VP9)",
           trials=media.mutants, quick=300, full=2700,
           passes="no crash, no hang; every cut is refused; *reported*: it decodes to other pixels, and only its hash "
           "tells, on a later run"),
    Family(id="F12", fault="the catalogue of clips, V1 to V28", trials=media.catalogue, quick=28, full=28,
           passes="the exact reason code; at most 10 s and 600 MiB"),
    Family(id="F13", fault="rows and text: T1 to T16, and drawn data sets in four layouts", trials=lists.rows_and_text,
           quick=300, full=5000, passes="the exact reason code; as many rows, in order, each with its own caption"),
    Family(id="F14", fault="hostile names, addresses, playlists, links swapped in meanwhile",
           trials=media.hostile_names, quick=44, full=44, passes="nothing outside is opened, nobody is called"),
    Family(id="F15", fault="checkpoints, LoRA files and weights made to run code or to fill the memory",
           trials=hostile.hostile_files, quick=40, full=10_000,
           passes="exit 4 or 5, nothing executed, at most twice the file in memory"),
    Family(id="F16", fault="recipes with traps", trials=lists.hostile_recipes, quick=25, full=25,
           passes="exit 2 with the place, within 1 s and 200 MiB"),
    Family(id="F17", fault="`launch`: one of 2 or 3 processes killed", trials=launching.killed_ranks, quick=1,
           full=24, passes="told by rank, signal and log; started again; the bits of an undisturbed run"),
    Family(id="F18", fault="`launch`: one of 2 processes frozen (SIGSTOP)", trials=launching.frozen_ranks, quick=1,
           full=6, passes="noticed within 60 s, with the stacks of the one that waits; then as F17"),
    Family(id="F19", fault="`launch`: a process raises, refuses, leaves, crashes; its port is taken; it never works",
           trials=launching.failing_ranks, quick=4, full=16,
           passes="exit 8 (or that of the refusal) with the cause; the same command then ends in the same bits"),
    Family(id="F20", fault="SIGTERM, SIGINT (once, twice), SIGUSR1, SIGHUP at random times, 1 and 2 processes",
           trials=launching.signalled, quick=5, full=40,
           passes="exit 75 with nothing lost (130 after two), then as F3"),
    Family(id="F21", fault="NaN or Inf in a loss, a gradient, a latent of one process", trials=numbers.poisoned,
           quick=5, full=24, passes="exit 7 in all, nothing of it saved or exported, then as F3"),
    Family(id="F22", fault="saved by 1 to 4 processes, taken up by others; sequences divided or not",
           trials=numbers.moved, quick=3, full=14, passes="the loaded bits are the saved ones; losses agree to 1e-5"),
    Family(id="F23", fault="two and four `prepare` at once; a reader meanwhile; two runs in one folder",
           trials=preparing.several_at_once, quick=4, full=20,
           passes="the files of one run; the second run is refused"),
    Family(id="F24", fault="a clock that jumps, stands still or runs backwards in training", trials=numbers.clocks,
           quick=3, full=6, passes="as F3; no negative time left"),
    Family(id="F25", fault="memory and open files: 300 steps, 400 clips", trials=numbers.memory, quick=0, full=2,
           passes="memory grows by less than 5 %, files not at all"),
    Family(id="F27", fault="clean clips of many formats, sizes, rates and captions", trials=media.controls, quick=50,
           full=200, passes="used, with its caption: no false refusal"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Result:
    """A family and its trials."""

    family: Family
    trials: tuple[Trial, ...]
    seconds: float


def run_family(family: Family, count: int, *, seed: int = SEED) -> Result:
    """Run about `count` trials in a folder of their own."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"faults-{family.id}-") as work:
        trials = tuple(family.trials(count, seed, Path(work)))
    return Result(family=family, trials=trials, seconds=time.monotonic() - started)
