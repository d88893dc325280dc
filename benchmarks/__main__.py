"""`make bench`: every ratio, printed and written into README.md here; `python -m benchmarks vae` runs one suite.

`python -m benchmarks gpu` fills the second table, of seconds and memory on one card; it is never part of `make bench`.
"""

import platform
import sys
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.interleave import Ratio

SUITES = ("transformer", "train", "trainer", "denoise", "lossy", "vae", "prepare", "loader")
README = Path(__file__).with_name("README.md")
START, END = "<!-- table -->", "<!-- end of table -->"
GPU_START, GPU_END = "<!-- gpu -->", "<!-- end of gpu -->"


def main(chosen: list[str]) -> int:
    """Run the suites and write each one's rows down as it ends; the exit status says whether every target was met."""
    if chosen[:1] == ["gpu"] and chosen[1:] in ([], ["--tiny"]):
        return run_gpu(tiny=len(chosen) > 1)
    if unknown := set(chosen) - set(SUITES):
        print(
            f"no suite {sorted(unknown)}: there are {', '.join(SUITES)}; gpu stands alone (gpu --tiny: a small model)"
        )
        return 2
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
    table = README.read_text(encoding="utf-8").partition(START)[2].partition(END)[0]
    rows = {line.split("`")[1]: line for line in table.splitlines() if line.startswith("| `")}
    rows |= {ratio.name: ratio.row for ratio in ratios}
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "peft", "transformers"))
    instructions = torch.backends.cpu.get_cpu_capability()
    head = [f"{platform.machine()} with {instructions}, 2 threads, {versions}", ""]
    head += ["| name | median ratio | spread | ceiling | target | |", "|---|---|---|---|---|---|"]
    _replace(START, END, [*head, *(rows[name] for name in sorted(rows))])


def run_gpu(*, tiny: bool) -> int:
    """Measure on the accelerator, if there is one, and write the rows down unless the models are `tiny`."""
    from benchmarks import gpu

    lines = []
    for line in gpu.run(tiny=tiny):
        print(line, flush=True)
        lines.append(line)
        if not tiny and len(lines) > 1:
            head = ["", "| name | model | tokens | s/step | TFLOP/s | peak GB |", "|---|---|---|---|---|---|"]
            _replace(GPU_START, GPU_END, [lines[0], *head, *lines[1:]])
    return 0


def _replace(start: str, end: str, lines: list[str]) -> None:
    """Put `lines` between two marks of the README."""
    before, _, rest = README.read_text(encoding="utf-8").partition(start)
    _, _, after = rest.partition(end)
    text = "\n".join(lines)
    README.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
