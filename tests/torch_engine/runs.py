"""What a training run left in its folder, for tests that compare two."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file


def losses(run: Path) -> list[float]:
    """Return every loss that was logged."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights_of(run: Path) -> dict[str, np.ndarray]:
    """Return what was exported, by file and name."""
    files = sorted((run / "final").rglob("*.safetensors"))
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def assert_same(one: Path, other: Path) -> None:
    """Hold two runs' exports to every bit."""
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert np.array_equal(value, theirs[name]), name
