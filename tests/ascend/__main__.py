"""`python -m tests.ascend`: try on this machine what the MindSpore engine could not be tried with, and write it down.

Give it to a machine with an Ascend card, MindSpore for it and this repository:

    pip install -r constraints-mindspore.txt && pip install --no-deps -e .
    python -m tests.ascend

and send `ascend-report.txt`, whatever is in it. Every part runs in a process of its own and none ends the others; parts
that take a card say so where there is none. `--only NAMES` tries some, `--list` names them.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from tests.ascend.machine import describe, has_card
from tests.ascend.parts import PARTS, Part
from tests.ascend.reporting import Report, carry_out


def main(words: list[str] | None = None) -> int:
    """Write the report; 0 unless a part failed or something was further apart than it may be."""
    parser = argparse.ArgumentParser(prog="python -m tests.ascend", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("ascend-report.txt"))
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args(words)
    if asked.list:
        print("\n".join(f"{name:<24} {part.what}" for name, part in PARTS.items()))
        return 0
    report, card = Report(asked.out), has_card()
    report.write("What an Ascend card makes of the MindSpore engine, by `python -m tests.ascend`.", "", *describe(), "")
    for name in asked.only:
        _try(name, PARTS[name], report, card=card)
    report.finish()
    return 1 if report.counts["FAILED"] or report.counts["apart"] else 0


def _try(name: str, part: Part, report: Report, *, card: bool) -> None:
    report.write(f"{name}: {part.what}")
    if part.needs_card and not card:
        report.result("skipped", "no card")
        return
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines"
        words = [sys.executable, "-m", "tests.ascend.parts", name, str(lines)]
        for kind, text in carry_out(words, lines, limit_seconds=part.limit_seconds):
            report.result(kind, text)


if __name__ == "__main__":
    sys.exit(main())
