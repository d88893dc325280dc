"""The suites of ratios still fit what they measure: each pair is made, held to equal numbers and called once."""

from dataclasses import replace

import pytest
import torch

from benchmarks import train, transformer
from benchmarks.interleave import Ratio


def once(name, baseline, ours, *, target=None, **_options) -> Ratio:
    baseline()
    ours()
    return Ratio(name=name, median=1.0, low=1.0, high=1.0, target=target)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    config = replace(transformer.CONFIG, num_attention_heads=2, num_layers=2, text_embed_dim=16)
    for module in (train, transformer):
        monkeypatch.setattr(module, "interleave", once)
        monkeypatch.setattr(module, "TEXT", 6)
    monkeypatch.setattr(transformer, "CONFIG", config)
    monkeypatch.setattr(transformer, "GRID", (2, 8, 8))
    monkeypatch.setattr(train, "mid_config", lambda: config)
    for name, value in {"FRAMES": 2, "HEIGHT": 8, "WIDTH": 8}.items():
        monkeypatch.setattr(train, name, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backward", [False, True])
def test_one_block(dtype, backward):
    ratio = transformer.block_ratio("x", dtype, backward=backward, target=1.0, num_rounds=1)
    assert ratio.met


@pytest.mark.parametrize("mode", ["full", "save_attention"])
def test_blocks_under_checkpointing(mode):
    assert transformer.checkpointed_ratio("x", mode, target=None, num_rounds=1).met


def test_steps_against_the_older_loops():
    names = [ratio.name for ratio in train.run()]
    assert names == [f"cpu.train.{row}{end}" for end in ("", ".bf16") for row in ("mid_sft", "mid_lora")]
