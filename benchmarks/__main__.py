"""`make bench`: every ratio and count, printed as a table and written into benchmarks/README.md.

`python -m benchmarks train vae` runs those suites only and writes nothing.
"""

import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from benchmarks.interleave import Ratio

SUITES = ("transformer", "train", "denoise", "vae")
README = Path(__file__).with_name("README.md")
START, END = "<!-- table -->", "<!-- end of table -->"


def main(chosen: list[str]) -> int:
    """Run the suites; the exit status says whether every target was met."""
    ratios: list[Ratio] = []
    for suite in chosen or SUITES:
        for ratio in import_module(f"benchmarks.{suite}").run():
            print(ratio.row, flush=True)
            ratios.append(ratio)
    if not chosen:
        write(ratios)
    missed = [ratio.name for ratio in ratios if not ratio.met]
    print(f"{len(ratios) - len(missed)} of {len(ratios)} targets met" + (f"; missed: {missed}" if missed else ""))
    return 1 if missed else 0


def write(ratios: list[Ratio]) -> None:
    """Put the table between the marks of the README."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    head = [f"{platform.machine()}, 2 threads, {versions}", "", "| name | median ratio | spread | target | |"]
    table = "\n".join([*head, "|---|---|---|---|---|", *(ratio.row for ratio in ratios)])
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    README.write_text(f"{before}{START}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
