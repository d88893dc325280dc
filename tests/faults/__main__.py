"""`python -m tests.faults --tier quick|full [--engine mindspore] [--only F1 F9] [--json FILE] [--markdown FILE]`.

Ends in 0 when every trial passed, else 1. The last line is one a program can read. `--replay F9:NAME` runs the family
with the same seed and tier and prints that trial alone, with all that its child said. The MindSpore engine has some of
the families, and is run where it is installed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads and forks do not go together

from tests.faults import engine
from tests.faults.families import FAMILIES, SEED, Result, run_family
from tests.faults.report import figures, to_json, to_markdown


def main() -> int:
    """Run the families and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--tier", choices=("quick", "full"), default="quick")
    parser.add_argument("--engine", choices=("torch", "mindspore"), default="torch", help="whose runs are disturbed")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY", choices=[f.id for f in FAMILIES])
    parser.add_argument("--seed", type=int, default=SEED, help="of all that is drawn")
    parser.add_argument("--replay", metavar="FAMILY:NAME", help="a failed trial, as the report names it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--most", type=int, metavar="TRIALS", help="a family in place of what its tier has")
    asked = parser.parse_args()
    engine.choose(asked.engine)
    replayed, _, name = (asked.replay or "").partition(":")
    is_torch = asked.engine == "torch"
    able = {f.id: f for f in FAMILIES if is_torch or f.in_mindspore}
    wanted = [replayed] if replayed else asked.only or list(able)
    if lacking := [name for name in wanted if name not in able]:
        parser.error(f"--engine {asked.engine} has {', '.join(able)}, not {', '.join(lacking)}")
    results: list[Result] = []
    for family in map(able.__getitem__, wanted):
        count = min(getattr(family, asked.tier), asked.most or 10**9, 10**9 if is_torch else family.in_mindspore)
        results.append(run_family(family, count, seed=asked.seed))
        _say(results[-1], name)
        _write(results, asked)
    told = figures(results)
    print("faults " + json.dumps(told))
    return 0 if told["tried"] == told["passed"] else 1


def _write(results: list[Result], asked: argparse.Namespace) -> None:
    """Write the report of what is done: one that is interrupted is there."""
    run = {"tier": asked.tier, "seed": asked.seed, "engine": asked.engine}
    if asked.json:
        asked.json.write_text(json.dumps(to_json(results, **run), indent=1) + "\n")
    if asked.markdown:
        asked.markdown.write_text(to_markdown(results, **run))


def _say(result: Result, name: str) -> None:
    passed = sum(trial.passed for trial in result.trials)
    print(f"{result.family.id:<4} {passed} of {len(result.trials)} passed, {result.seconds:.1f} s", flush=True)
    for trial in result.trials:
        if trial.name == name or (not name and not trial.passed):
            print(f"  {trial.family}:{trial.name}: {trial.verdict.value} {trial.layer}\n    {trial.detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
