"""The quick tier, family by family: no trial is SILENT, none crashes, hangs or loses what was finished."""

import json

import pytest

from tests.faults.families import FAMILIES, Family, Result, run_family
from tests.faults.report import bound, figures, merged, to_entry, to_json, to_markdown
from tests.faults.trial import Trial, Verdict, in_child

_ELSEWHERE = ("F12",)  # `test_catalogue` does every row of it
_SLOW = ("F1", "F3", "F18", "F19", "F20", "F21")


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=pytest.mark.slow if f.id in _SLOW else (), id=f.id)
        for f in FAMILIES
        if f.quick and f.id not in _ELSEWHERE
    ],
)
def test_family(family: Family):
    result = run_family(family, family.quick)
    assert [trial for trial in result.trials if not trial.passed] == []
    assert len({trial.name for trial in result.trials}) == len(result.trials) > 0
    entry = to_entry(result, tier="quick", seed=1)
    assert figures([entry])["tried"] == figures([entry])["passed"] == len(result.trials)
    assert f"| {family.id} | " in to_markdown([entry])


def _entry(family: str, *trials: Trial) -> dict:
    found = Result(family=next(f for f in FAMILIES if f.id == family), trials=trials, seconds=1.0)
    return to_entry(found, tier="full", seed=1)


def test_families_run_on_their_own_join_the_report_of_the_others():
    killed = _entry("F17", Trial(family="F17", name="x", verdict=Verdict.OK, steps_redone=2, recovery_seconds=3.25))
    lost = _entry("F4", Trial(family="F4", name="x", verdict=Verdict.LOST, steps_redone=4))
    mended = _entry("F4", Trial(family="F4", name="x", verdict=Verdict.OK, steps_redone=4))
    kept = json.loads(json.dumps(to_json([lost, killed])))["families"]
    assert [entry["id"] for entry in merged(kept, [mended])] == ["F4", "F17"]
    told = figures(merged(kept, [mended]))
    assert (told["tried"], told["passed"], told["LOST"]) == (2, 2, 0)
    assert told["bit-identical after a kill"] == "2 of 2"
    assert (told["steps redone, median / most"], told["recovery seconds, p50 / p95"]) == ("4 / 4", "3.2 / 3.2")
    assert figures(kept)["LOST"] == 1
    assert "F4:x: LOST" in to_markdown(kept)


def test_damage_to_one_kind_of_file_is_one_row_of_the_page():
    flips = [Trial(family="F9", name=f"LoRA file {n} bit {n * 7}", verdict=Verdict.REFUSED, layer="digest")
             for n in range(12)]  # fmt: skip
    entry = _entry("F9", *flips, Trial(family="F9", name="cache.json bit 9", verdict=Verdict.OK))
    assert entry["noticed"] == [
        ["LoRA file", "one bit flipped", "12", "digest 12"],
        ["cache.json", "one bit flipped", "1", "nothing: the same meaning 1"],
    ]


def test_a_zero_has_its_bound():
    assert bound(0, 300) == "0 (< 1 %)"
    assert bound(2, 300) == "2"
    assert bound(0, 2) == "0", "two trials bound nothing"


def test_a_failed_control_is_a_false_refusal():
    refused = Trial(family="F27", name="x", verdict=Verdict.REFUSED, is_control=True)
    assert not refused.passed
    assert Trial(family="F8", name="x", verdict=Verdict.REFUSED).passed
    assert figures([])["tried"] == 0


def test_a_child_that_crashes_hangs_or_is_killed_is_seen():
    def kill_itself() -> None:
        import os

        os.kill(os.getpid(), 9)

    def hang() -> None:
        import time

        time.sleep(60)

    assert in_child(kill_itself).broke == Verdict.CRASH
    assert in_child(lambda: 1 / 0).broke == Verdict.CRASH
    assert in_child(hang, limit=0.2).broke == Verdict.HANG
    assert in_child(lambda: [1, "two"]).value == [1, "two"]
