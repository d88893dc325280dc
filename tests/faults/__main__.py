"""`python -m tests.faults --tier quick|full [--engine mindspore] [--only F1 F9] [--json FILE] [--markdown FILE]`.

Ends in 0 when every trial passed, else 1. The last line is one a program can read. Families that the JSON file already
holds stay in it, and on the page, until they run again. `--replay F9:NAME` runs the family with the same seed and tier
and prints that trial alone, with all that its child said. The MindSpore engine has some of the families, and is run
where it is installed.
"""

import argparse
import json
import os
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch: its threads and forks do not go together

from tests.faults import engine
from tests.faults.families import FAMILIES, SEED, Result, run_family
from tests.faults.report import Entry, figures, merged, read, to_entry, to_json, to_markdown


def main() -> int:
    """Run the families and write what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--tier", choices=("quick", "full"), default="quick")
    parser.add_argument("--engine", choices=("torch", "mindspore"), default="torch", help="whose runs are disturbed")
    parser.add_argument("--only", nargs="+", default=[], metavar="FAMILY", choices=[f.id for f in FAMILIES])
    parser.add_argument("--seed", type=int, default=SEED, help="of all that is drawn")
    parser.add_argument("--count", type=int, help="trials of each family, in place of the tier's number")
    parser.add_argument("--replay", metavar="FAMILY:NAME", help="a failed trial, as the report names it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    asked = parser.parse_args()
    engine.choose(asked.engine)
    replayed, _, name = (asked.replay or "").partition(":")
    is_torch = asked.engine == "torch"
    able = {f.id: f for f in FAMILIES if is_torch or f.in_mindspore}
    wanted = [replayed] if replayed else asked.only or list(able)
    if lacking := [name for name in wanted if name not in able]:
        parser.error(f"--engine {asked.engine} has {', '.join(able)}, not {', '.join(lacking)}")
    entries: list[Entry] = []
    for family in map(able.__getitem__, wanted):
        of_tier = getattr(family, asked.tier)
        count = asked.count or (of_tier if is_torch else min(of_tier, family.in_mindspore))
        result = run_family(family, count, seed=asked.seed)
        tier = "sampled" if asked.count else asked.tier
        entries.append(to_entry(result, tier=tier, seed=asked.seed, engine=asked.engine))
        _say(result, name)
        _write(entries, asked.json, asked.markdown)
    told = figures(entries)
    print("faults " + json.dumps(told))
    return 0 if told["tried"] == told["passed"] else 1


def _write(entries: list[Entry], data: Path | None, page: Path | None) -> None:
    """Write what has run so far: a run that is stopped has its finished families on the page."""
    everything = merged(read(data), entries) if data else entries
    if data:
        data.write_text(json.dumps(to_json(everything), indent=1) + "\n")
    if page:
        page.write_text(to_markdown(everything))


def _say(result: Result, name: str) -> None:
    passed = sum(trial.passed for trial in result.trials)
    print(f"{result.family.id:<4} {passed} of {len(result.trials)} passed, {result.seconds:.1f} s", flush=True)
    for trial in result.trials:
        if trial.name == name or (not name and not trial.passed):
            print(f"  {trial.family}:{trial.name}: {trial.verdict.value} {trial.layer}\n    {trial.detail}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
