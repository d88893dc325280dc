"""What came out of runs, as JSON and as a Markdown page: one entry a family, each of the run that tried it last."""

import datetime
import json
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.faults.families import FAMILIES, Result
from tests.faults.media import HASH_ONLY
from tests.faults.trial import Trial, Verdict

_FAILED_SHOWN = 5
_RECOVER = ("F1", "F2", "F3", "F4", "F5", "F17", "F18", "F19", "F20", "F21")
"""Families in which something is killed or ends early and the same command goes on."""

Entry = dict[str, Any]
"""What is kept of a family: counts, and what figures over several families are computed from."""


def bound(found: int, tried: int) -> str:
    """Return a count, with the 95 % upper bound on the true rate beside a zero (the rule of three, from four on)."""
    return f"0 (< {300 / tried:.2g} %)" if not found and tried > 3 else str(found)


def to_entry(result: Result, *, tier: str, seed: int, engine: str = "torch") -> Entry:
    """Return what the report keeps of a family."""
    trials = result.trials
    return {
        "id": result.family.id, "fault": result.family.fault, "tier": tier, "seed": seed, "engine": engine,
        "day": datetime.date.today().isoformat(), "python": platform.python_version(), "system": platform.system(),
        "tried": len(trials), "passed": sum(trial.passed for trial in trials), "seconds": round(result.seconds, 1),
        "controls": sum(trial.is_control for trial in trials),
        "verdicts": dict(Counter(trial.verdict.value for trial in trials)),
        "layers": dict(Counter(trial.layer for trial in trials if trial.layer)),
        "noticed": _noticed(trials) if result.family.id in ("F8", "F9", "F11") else [],
        "steps redone": sorted(trial.steps_redone for trial in trials if trial.steps_redone is not None),
        "recovery seconds": sorted(round(t.recovery_seconds, 2) for t in trials if t.recovery_seconds is not None),
        "failed": [
            {"name": trial.name, "verdict": trial.verdict.value, "detail": trial.detail[-2000:]}
            for trial in trials if not trial.passed
        ],
    }  # fmt: skip


def _noticed(trials: Sequence[Trial]) -> list[list[str]]:
    """Return rows of (file, damage, which layers noticed it and how often)."""
    groups: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials:
        groups.setdefault(_group(trial), Counter())[trial.layer or "nothing: the same meaning"] += 1
    return [
        [file, damage, str(layers.total()), ", ".join(f"{layer} {count}" for layer, count in layers.most_common())]
        for (file, damage), layers in sorted(groups.items())
    ]


def _group(trial: Trial) -> tuple[str, str]:
    if trial.family == "F11":
        _, suffix, damage = trial.name.split(" ", 2)
        return suffix, damage
    kind = trial.name.rsplit(" ", 2)[0].rstrip("0123456789 ")  # what is flipped in a run's files is numbered
    return kind, "cut" if trial.family == "F8" else "one bit flipped"


def read(path: Path) -> list[Entry]:
    """Return the entries of a report that was written before; none where there is no file."""
    return json.loads(path.read_text())["families"] if path.exists() else []


def merged(before: Sequence[Entry], new: Sequence[Entry]) -> list[Entry]:
    """Return the entries of both, in the order of the families; a new one takes the place of the one before."""
    by_id = {entry["id"]: entry for entry in [*before, *new]}
    return [by_id[family.id] for family in FAMILIES if family.id in by_id]


def figures(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the figures over all families."""
    counts: Counter[str] = sum((Counter(entry["verdicts"]) for entry in entries), Counter())
    recovered = [entry for entry in entries if entry["id"] in _RECOVER]
    controls = [entry for entry in entries if entry["controls"]]
    redone = sorted(steps for entry in entries for steps in entry["steps redone"])
    seconds = sorted(value for entry in entries for value in entry["recovery seconds"])
    return {
        "tried": _sum(entries, "tried"),
        "passed": _sum(entries, "passed"),
        **{verdict.value: counts[verdict.value] for verdict in Verdict},
        "false refusals": _sum(controls, "tried") - _sum(controls, "passed"),
        "controls": _sum(controls, "controls"),
        "clips": sum(entry["tried"] for entry in entries if entry["id"] == "F11"),
        "clips told only by their hash": sum(entry["layers"].get(HASH_ONLY, 0) for entry in entries),
        "bit-identical after a kill": f"{_sum(recovered, 'passed')} of {_sum(recovered, 'tried')}",
        "steps redone, median / most": f"{redone[len(redone) // 2]} / {redone[-1]}" if redone else "-",
        "recovery seconds, p50 / p95": _percentiles(seconds),
        "seconds": round(_sum(entries, "seconds"), 1),
    }


def _sum(entries: Sequence[Entry], name: str) -> Any:
    return sum(entry[name] for entry in entries)


def _percentiles(values: list[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{values[min(len(values) - 1, int(share * len(values)))]:.1f}" for share in (0.5, 0.95))


def to_json(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the whole report."""
    return {"figures": figures(entries), "families": list(entries)}


def to_markdown(entries: Sequence[Entry]) -> str:
    """Return the report as a page; a failed trial stands there with the words that replay it."""
    engine, has_catalogue = entries[0]["engine"], any(entry["id"] in ("F12", "F13") for entry in entries)
    lines = [
        *_HEADS[engine],
        f"{_where(entries)}, no accelerator.",
        "",
        "Each trial ends in one verdict: *ok-identical* (the result is that of an undisturbed run), *refused* (a clear "
        "error with the right code, and nothing else harmed), *degraded-reported* (it went on and the loss is told), "
        "or one that fails: SILENT (a wrong result, untold), CRASH, HANG, LOST (finished work gone). Beside a zero "
        "stands the 95 % bound on the true rate, 3/N.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {figure} | {value} |" for figure, value in _table_of(figures(entries), saves=_SAVES[engine])),
        "",
        "| | fault | tier, day | tried | identical | refused | reported | failed | s | a pass means |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *(_line(entry) for entry in entries),
        *_detection(entries),
        *(_differences() if has_catalogue else []),
        *_failures(entries),
    ]
    return "\n".join(lines) + "\n"


_HEADS = {
    "torch": (
        "# Faults made on purpose",
        "",
        "Written by `make faults` (`python -m tests.faults`); the default tests run the quick tier of these families.",
    ),
    "mindspore": (
        "# Faults made on purpose, in runs of the MindSpore engine",
        "",
        "Written by `make faults-mindspore` (`python -m tests.faults --engine mindspore`) in an environment without "
        "torch; `make test-mindspore` tries some. What no engine has a part in is in [faults.md](faults.md). F3 kills "
        "before each kind of boundary of three saves; of the writes of a file's tensors before the first, the middle "
        "and the last.",
    ),
}

_SAVES = {"torch": "at 2 or 4", "mindspore": "every step"}


def _table_of(told: dict[str, Any], *, saves: str) -> Iterator[tuple[str, object]]:
    """Yield name and value of the figures that these families have."""
    yield "faults tried / passed", f"{told['tried']} / {told['passed']}"
    for verdict in list(Verdict)[3:]:
        yield verdict.value, bound(told[verdict.value], told["tried"])
    if controls := told["controls"]:
        yield "false refusals", f"{bound(told['false refusals'], controls)} of {controls} clean clips"
    if clips := told["clips"]:
        only = told["clips told only by their hash"]
        yield "damaged clips that decode to other pixels without a complaint", f"{only} of {clips}, see below"
    yield "bit-identical after a kill and the same command again", told["bit-identical after a kill"]
    redone, recovery = told["steps redone, median / most"], told["recovery seconds, p50 / p95"]
    yield "steps done again after a kill, median / most", f"{redone} (saves {saves})"
    if recovery != "-":
        yield "s from a process's death to the next step of `launch`, p50 / p95", recovery
    yield "seconds", told["seconds"]


def _where(entries: Sequence[Entry]) -> str:
    """Return seed and Python of the runs; where they differ, side by side."""

    def all_of(name: str) -> str:
        return " and ".join(dict.fromkeys(str(entry[name]) for entry in entries))

    return f"Seed {all_of('seed')}, Python {all_of('python')} on {all_of('system')}"


def _line(entry: Entry) -> str:
    tried, verdicts = entry["tried"], entry["verdicts"]
    told = " | ".join(str(verdicts.get(v.value, 0)) for v in (Verdict.OK, Verdict.REFUSED, Verdict.DEGRADED))
    failed = bound(tried - entry["passed"], tried)
    passes = next(family.passes for family in FAMILIES if family.id == entry["id"])
    return (
        f"| {entry['id']} | {entry['fault']} | {entry['tier']}, {entry['day']} | {tried} | {told} | {failed} | "
        f"{entry['seconds']:.0f} | {passes} |"
    )


def _detection(entries: Sequence[Entry]) -> list[str]:
    """Tell which layer noticed damaged clips (F11) and damaged entries (F8, F9)."""
    lines = ["", "## What notices damage", "", "| | file | damage | tried | noticed by |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join([entry['id'], *row])} |" for entry in entries for row in entry["noticed"]]
    if "F11" not in {entry["id"] for entry in entries}:
        return lines
    return [
        *lines,
        "",
        "A clip whose damage only its hash tells decodes without any complaint, to other pixels. Seen for the first "
        "time, it is taken, and nothing here can know; *reported* promises no more for it than that a cache of the "
        "undamaged clip is not used for it, because its bytes are on record. Cuts of MP4, Matroska, WebM and AVI are "
        "known from the sizes they declare; MPEG-TS declares none, so a cut at a packet's end is only a shorter clip. "
        "`survey.jsonl` only saves time: its damaged lines are not read.",
    ]


def _differences() -> list[str]:
    from tests.faults.texts import TEXTS
    from tests.faults.videos import VIDEOS

    lines = ["", "## The catalogue", "", "| | fault | ends as | note |", "|---|---|---|---|"]
    for row in [*TEXTS, *VIDEOS]:
        ends = dict.fromkeys(reason or state for name, state, reason in row.ends if name != "good.mp4")
        shown = "refused, exit 3" if row.refused else ", ".join(f"`{end}`" for end in ends)
        lines.append(f"| {row.id} | {row.fault} | {shown} | {row.differs} |")
    return lines


def _failures(entries: Sequence[Entry]) -> list[str]:
    lines = [
        f"- {entry['id']}:{trial['name']}: {trial['verdict']}: {trial['detail'][:300]}"
        for entry in entries
        for trial in entry["failed"][:_FAILED_SHOWN]
    ]
    return ["", "## Failed", "", *lines] if lines else []
