"""What came out of a run, as JSON and as a Markdown table."""

import platform
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from tests.faults.families import Result
from tests.faults.media import HASH_ONLY
from tests.faults.trial import Trial, Verdict

_FAILED_SHOWN = 5
_RECOVER = ("F1", "F2", "F3", "F4", "F5", "F17", "F18", "F19", "F20", "F21")
"""Families in which something is killed or ends early and the same command goes on."""


def bound(found: int, tried: int) -> str:
    """Return a count, with the 95 % upper bound on the true rate beside a zero (the rule of three)."""
    return f"0 (< {300 / tried:.2g} %)" if not found and tried else str(found)


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """Return the figures over all families."""
    trials = [trial for result in results for trial in result.trials]
    counts = Counter(trial.verdict for trial in trials)
    controls = [trial for trial in trials if trial.is_control]
    recovered = [t for r in results if r.family.id in _RECOVER for t in r.trials]
    same = sum(trial.passed for trial in recovered)
    redone = sorted(trial.steps_redone for trial in trials if trial.steps_redone is not None)
    seconds = sorted(trial.recovery_seconds for trial in trials if trial.recovery_seconds is not None)
    return {
        "tried": len(trials),
        "passed": sum(trial.passed for trial in trials),
        **{verdict.value: counts[verdict] for verdict in Verdict},
        "false refusals": sum(not trial.passed for trial in controls),
        "controls": len(controls),
        "clips": sum(trial.family == "F11" for trial in trials),
        "clips told only by their hash": sum(trial.layer == HASH_ONLY for trial in trials),
        "bit-identical after a kill": f"{same} of {len(recovered)}",
        "steps redone, median / most": f"{redone[len(redone) // 2]} / {redone[-1]}" if redone else "-",
        "recovery seconds, p50 / p95": _percentiles(seconds),
        "seconds": round(sum(result.seconds for result in results), 1),
    }


def _percentiles(values: list[float]) -> str:
    if not values:
        return "-"
    return " / ".join(f"{values[min(len(values) - 1, int(share * len(values)))]:.1f}" for share in (0.5, 0.95))


def to_json(results: Sequence[Result], *, tier: str, seed: int, engine: str = "torch") -> dict[str, Any]:
    """Return the whole report."""
    return {
        "tier": tier, "seed": seed, "engine": engine, "python": platform.python_version(), "system": platform.system(),
        "figures": figures(results),
        "families": [
            {
                "id": result.family.id, "fault": result.family.fault, "tried": len(result.trials),
                "passed": sum(trial.passed for trial in result.trials), "seconds": round(result.seconds, 1),
                "verdicts": dict(Counter(trial.verdict.value for trial in result.trials)),
                "layers": dict(Counter(trial.layer for trial in result.trials if trial.layer)),
                "failed": [_row(trial) for trial in result.trials if not trial.passed],
            }
            for result in results
        ],
    }  # fmt: skip


def _row(trial: Trial) -> dict[str, str]:
    return {"name": trial.name, "verdict": trial.verdict.value, "detail": trial.detail[-2000:]}


def to_markdown(results: Sequence[Result], *, tier: str, seed: int, engine: str = "torch") -> str:
    """Return the report as a page; a failed trial stands there with the words that replay it."""
    has_catalogue = any(result.family.id in ("F12", "F13") for result in results)
    lines = [
        *(_HEADS[engine]),
        f"Tier {tier}, seed {seed}, Python {platform.python_version()} on {platform.system()}, no accelerator.",
        "",
        "Each trial ends in one verdict: *ok-identical* (the result is that of an undisturbed run), *refused* (a clear "
        "error with the right code, and nothing else harmed), *degraded-reported* (it went on and the loss is told), "
        "or one that fails: SILENT (a wrong result, untold), CRASH, HANG, LOST (finished work gone). Beside a zero "
        "stands the 95 % bound on the true rate, 3/N.",
        "",
        "| figure | value |",
        "|---|---|",
        *(f"| {figure} | {value} |" for figure, value in _table_of(figures(results), saved=_SAVED[engine])),
        "",
        "| | fault | tried | identical | refused | reported | failed | s | a pass means |",
        "|---|---|---|---|---|---|---|---|---|",
        *(_line(result) for result in results),
        *_detection(results),
        *(_differences() if has_catalogue else []),
        *_failures(results),
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


_SAVED = {"torch": "every 2 or 4", "mindspore": "every step"}


def _table_of(told: dict[str, Any], *, saved: str) -> Iterator[tuple[str, object]]:
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
    yield "steps of training done again, median / most", f"{redone} (saved {saved})"
    if recovery != "-":
        yield "s from a process's death to the next step of `launch`, p50 / p95", recovery
    yield "seconds", told["seconds"]


def _line(result: Result) -> str:
    counts, tried = Counter(trial.verdict for trial in result.trials), len(result.trials)
    failed = bound(sum(not trial.passed for trial in result.trials), tried)
    told = " | ".join(str(counts[v]) for v in (Verdict.OK, Verdict.REFUSED, Verdict.DEGRADED))
    family = result.family
    return f"| {family.id} | {family.fault} | {tried} | {told} | {failed} | {result.seconds:.0f} | {family.passes} |"


def _detection(results: Sequence[Result]) -> list[str]:
    """Tell which layer noticed damaged clips (F11) and damaged entries (F8, F9)."""
    lines = ["", "## What notices damage", "", "| | file | damage | tried | noticed by |", "|---|---|---|---|---|"]
    for result in results:
        if result.family.id in ("F8", "F9", "F11"):
            groups: dict[tuple[str, str], Counter[str]] = {}
            for trial in result.trials:
                groups.setdefault(_group(trial), Counter())[trial.layer or "nothing: the same meaning"] += 1
            for (file, damage), layers in sorted(groups.items()):
                told = ", ".join(f"{layer} {count}" for layer, count in layers.most_common())
                lines.append(f"| {result.family.id} | {file} | {damage} | {layers.total()} | {told} |")
    if "F11" not in {result.family.id for result in results}:
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


def _group(trial: Trial) -> tuple[str, str]:
    if trial.family == "F11":
        _, suffix, damage = trial.name.split(" ", 2)
        return suffix, damage
    kind = re.sub(r" (at|bit) .*", "", trial.name)
    return kind, "cut" if trial.family == "F8" else "one bit flipped"


def _differences() -> list[str]:
    from tests.faults.texts import TEXTS
    from tests.faults.videos import VIDEOS

    lines = ["", "## The catalogue", "", "| | fault | ends as | note |", "|---|---|---|---|"]
    for row in [*TEXTS, *VIDEOS]:
        ends = dict.fromkeys(reason or state for name, state, reason in row.ends if name != "good.mp4")
        shown = "refused, exit 3" if row.refused else ", ".join(f"`{end}`" for end in ends)
        lines.append(f"| {row.id} | {row.fault} | {shown} | {row.differs} |")
    return lines


def _failures(results: Sequence[Result]) -> list[str]:
    lines: list[str] = []
    for result in results:
        failed = [trial for trial in result.trials if not trial.passed]
        lines += [f"- {t.family}:{t.name}: {t.verdict.value}: {t.detail[:300]}" for t in failed[:_FAILED_SHOWN]]
    return ["", "## Failed", "", *lines] if lines else []
