"""What the demo promises: the new thing is learned and what was known stays. `make test-lessons` runs all four."""

import json
import resource

import pytest

from cogvideox_factory.cli import demo


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("task", "method"),
    [
        pytest.param("t2v", "lora", marks=pytest.mark.slow),
        pytest.param("t2v", "full", marks=pytest.mark.long),
        pytest.param("i2v", "lora", marks=pytest.mark.long),
        pytest.param("i2v", "full", marks=pytest.mark.long),
    ],
)
def test_a_lesson_is_learned_and_costs_little_of_what_was_known(tmp_path, task, method):
    demo.run(["--out", str(tmp_path / "demo"), "--task", task, "--method", method])
    scores = json.loads((tmp_path / "demo" / "scores.json").read_text())
    assert scores["before"]["concept"] <= 0.15, scores
    assert scores["after"]["concept"] >= 0.80, scores
    assert scores["before"]["known"] - scores["after"]["known"] < 0.05, scores
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    assert most <= 3 * 2**30, "of this process, whatever else it has tested"
