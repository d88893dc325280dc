"""All families of faults: what they are, how many trials a tier has, what passing means."""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.faults import caches, lists, media, preparing, storage
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


FAMILIES = (
    Family(id="F1", fault="`prepare` killed (SIGKILL) before and after each boundary of writing",
           trials=preparing.killed_at_boundaries, quick=16, full=10_000,
           passes="no damaged file under a final name; the same command ends in the same bytes, makes no finished "
           "entry again, leaves no temporary"),
    Family(id="F2", fault="`prepare` killed (SIGKILL) at random times", trials=preparing.killed_at_random, quick=5,
           full=100, passes="as F1"),
    Family(id="F6", fault="disk full: cache, checkpoint, export on disks of 12 sizes", trials=storage.full_disks,
           quick=9, full=36, passes="exit 6, nothing half-written, done when there is room"),
    Family(id="F7", fault="read-only, forbidden, a file in the way, failing calls (EIO, ENOSPC) at boundaries",
           trials=storage.failing_folders, quick=14, full=60, passes="exit 6 with the folder's name, then as F1"),
    Family(id="F8", fault="each of 7 kinds of cache files cut", trials=caches.cut_files, quick=35, full=140,
           passes="told by name; mended, exactly that entry is made again, to the same bytes"),
    Family(id="F9", fault="one bit of each of 7 kinds of cache files flipped", trials=caches.flipped_bits, quick=35,
           full=700, passes="as F8"),
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
    Family(id="F16", fault="recipes with traps", trials=lists.hostile_recipes, quick=25, full=25,
           passes="exit 2 with the place, within 1 s and 200 MiB"),
    Family(id="F23", fault="two and four `prepare` at once; a reader meanwhile; two runs in one folder",
           trials=preparing.several_at_once, quick=4, full=20,
           passes="the files of one run; the second run is refused"),
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
