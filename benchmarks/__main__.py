"""`make bench`: every ratio, printed and written into README.md here; `python -m benchmarks vae` runs one suite."""

import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.interleave import Ratio

SUITES = ("transformer", "train", "denoise", "vae", "prepare", "loader")
README = Path(__file__).with_name("README.md")
START, END = "<!-- table -->", "<!-- end of table -->"


def main(chosen: list[str]) -> int:
    """Run the suites and write each one's rows down as it ends; the exit status says whether every target was met."""
    ratios: list[Ratio] = []
    for suite in chosen or SUITES:
        for ratio in import_module(f"benchmarks.{suite}").run():
            print(ratio.row, flush=True)
            ratios.append(ratio)
        write(ratios)
    missed = [ratio.name for ratio in ratios if not ratio.met]
    print(f"{len(ratios) - len(missed)} of {len(ratios)} targets met" + (f"; missed: {missed}" if missed else ""))
    return 1 if missed else 0


def write(ratios: list[Ratio]) -> None:
    """Put the rows between the marks of the README, in place of older rows of the same names."""
    before, _, rest = README.read_text(encoding="utf-8").partition(START)
    table, _, after = rest.partition(END)
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    rows |= {ratio.name: ratio.row for ratio in ratios}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    instructions = torch.backends.cpu.get_cpu_capability()
    head = [f"{platform.machine()} with {instructions}, 2 threads, {versions}", ""]
    head += ["| name | median ratio | spread | target | |", "|---|---|---|---|---|"]
    text = "\n".join([*head, *(rows[name] for name in sorted(rows))])
    README.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
