"""Faults made on purpose in runs of this engine: some of each family; `make faults-mindspore` tries all."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def tried(report: Path, *words: str) -> dict[str, dict]:
    """Run families of faults in a process that has computed nothing yet, which forks its trials; return their rows."""
    command = [sys.executable, "-m", "tests.faults", "--engine", "mindspore", "--json", str(report), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {row["id"]: row for row in json.loads(report.read_text())["families"]}


def test_cut_files_and_flipped_bits_are_refused_by_name(tmp_path):
    rows = tried(tmp_path / "report.json", "--only", "F8", "F9")
    for family in ("F8", "F9"):
        assert rows[family]["passed"] == rows[family]["tried"] >= 35 + 30
        assert rows[family]["verdicts"]["refused"] >= 50
        assert rows[family]["layers"]["the command"] >= 1


def test_a_run_that_is_killed_in_a_save_goes_on_to_the_same_bits(tmp_path):
    """Before the first boundary of three saves, in the middle and after the last, which removes a checkpoint."""
    rows = tried(tmp_path / "report.json", "--only", "F3", "--count", "3")
    assert rows["F3"]["verdicts"] == {"ok-identical": 3}
