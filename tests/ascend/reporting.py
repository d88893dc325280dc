"""The report: one line a result, written as it comes; and a part in a process of its own, however that ends."""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SHOWN = 40
"""Last lines of what a process said that failed."""


class Report:
    """A text file, complete at any moment."""

    def __init__(self, path: Path) -> None:
        self.path, self.counts = path, Counter[str]()
        path.write_text("", encoding="utf-8")

    def write(self, *lines: str) -> None:
        """Print and write lines."""
        text = "\n".join(lines)
        print(text, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(f"{text}\n")

    def result(self, kind: str, text: str) -> None:
        """Write a result: held, apart, told, skipped or FAILED."""
        self.counts[kind] += 1
        self.write(f"  {kind}: {text}")

    def finish(self) -> None:
        """Write how many of each there are."""
        told = ", ".join(f"{count} {kind}" for kind, count in sorted(self.counts.items()))
        self.write("", f"done: {told}.")
        print(f"Please send {self.path.resolve()}", flush=True)


def carry_out(words: Sequence[str], lines: Path, *, limit_seconds: float) -> Iterator[tuple[str, str]]:
    """Run a process that writes results (a kind, a tab, a text) into `lines`; yield them, and how it failed if it did.

    What it had found before it crashed or hung is found.
    """
    with lines.with_suffix(".log").open("w+", encoding="utf-8", errors="replace") as log:
        child = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)
        try:
            code = child.wait(limit_seconds)
            failure = _how(code) if code else None
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)  # compilers that it started as well
            child.wait()
            failure = f"not done after {limit_seconds:g} s"
        log.seek(0)
        said = log.read().splitlines()
    for line in lines.read_text(encoding="utf-8").splitlines() if lines.exists() else []:
        kind, _, text = line.partition("\t")
        yield kind, text
    if failure:
        yield "FAILED", "\n           ".join([failure, *said[-_SHOWN:]])


def _how(code: int) -> str:
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit {code}"
