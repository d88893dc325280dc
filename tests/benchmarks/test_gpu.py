"""The device suite with small models: it runs anywhere, and its two models are the same one."""

import pytest
import torch

from benchmarks import gpu
from benchmarks.__main__ import README, main


def test_it_runs_with_small_models_and_leaves_the_table_alone(capsys):
    before = README.read_bytes()
    assert main(["gpu", "--tiny"]) == 0
    heading, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in heading
    assert [row.split(" | ")[:2] for row in rows] == [
        [f"| `gpu.{method}.{model}.tiny`", who]
        for model in ("5b.49", "15.77")
        for method in ("lora", "sft")
        for who in ("ours", "ours, float8", "diffusers")
    ]
    assert all(float(cell) > 0 for row in rows for cell in row.strip("| ").split(" | ")[3:])
    assert README.read_bytes() == before


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, and this would use it")
def test_without_an_accelerator_it_says_so_and_measures_nothing(capsys):
    assert main(["gpu"]) == 0
    assert "skipped, there is no accelerator" in capsys.readouterr().out


def test_an_unknown_suite_is_named(capsys):
    assert main(["gpus"]) == 2
    assert "no suite ['gpus']" in capsys.readouterr().out


def test_the_work_of_a_step_is_that_of_the_published_table():
    """PFLOP of SFT steps: 0.997 for 5B at 49 x 480 x 720 and, with 2 text tokens more, 3.777 for 1.5-5B at 77."""
    flops = {case.name: case.flops / 1e15 for case in gpu.cases(tiny=False)}
    assert flops["gpu.sft.5b.49"] == pytest.approx(0.997, abs=0.001)
    assert flops["gpu.sft.15.77"] == pytest.approx(3.777, abs=0.002)
    assert flops["gpu.lora.15.77"] < flops["gpu.sft.15.77"]
