"""The quick tier, family by family: no trial is SILENT, none crashes, hangs or loses what was finished."""

import pytest

from tests.faults.families import FAMILIES, Family, run_family
from tests.faults.report import bound, figures, to_json, to_markdown
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
    told = to_json([result], tier="quick", seed=1)
    assert told["figures"]["tried"] == told["figures"]["passed"] == len(result.trials)
    assert f"| {family.id} | " in to_markdown([result], tier="quick", seed=1)


def test_a_zero_has_its_bound():
    assert bound(0, 300) == "0 (< 1 %)"
    assert bound(2, 300) == "2"


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
