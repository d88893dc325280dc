import logging
import mmap
import subprocess
import sys

import pytest
import torch

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.torch_engine import device as device_module
from cogvideox_factory.torch_engine.device import (
    memory_allocated,
    peak_memory,
    pick_device,
    pick_dtype,
    reset_peak_memory,
    set_determinism,
    set_tf32,
    synchronize,
    take_card,
    total_memory,
)

CPU = torch.device("cpu")
CARD = torch.device("cuda", 0)


@pytest.fixture
def no_card(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)


@pytest.fixture
def two_cards(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)


def test_without_a_card(no_card):
    assert pick_device("auto") == pick_device("cpu") == CPU
    for name in ("cuda", "npu", "cuda:1"):
        with pytest.raises(MissingError, match="only cpu"):
            pick_device(name)


def test_with_cards(two_cards):
    assert pick_device("auto") == pick_device("cuda") == CARD
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == CPU
    for name in ("npu", "cuda:2"):
        with pytest.raises(MissingError, match="cpu and 2 x cuda"):
            pick_device(name)


def test_processes_of_a_machine_take_a_card_each_and_a_cpu_is_enough_for_all(two_cards, monkeypatch):
    taken = []
    monkeypatch.setattr(torch.accelerator, "set_device_index", taken.append)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in range(2):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        take_card("auto")
    assert taken == [0, 1]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(MissingError, match=r"process 2 of this machine finds 2 cards.*--run\.device cpu"):
        take_card("cuda")
    take_card("cpu")
    assert pick_device("cpu") == CPU
    with pytest.raises(FactoryError, match=r"'cuda:1' is one card for the 3 processes.*--run\.device cuda"):
        pick_device("cuda:1")
    assert taken == [0, 1]


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:0", "", "auto:1"])
def test_names_that_are_no_device(name):
    with pytest.raises(FactoryError, match="give auto, cpu, cuda or npu"):
        pick_device(name)


def test_dtype_follows_device_and_checkpoint(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    two, five = PUBLISHED["cogvideox-2b"].transformer, PUBLISHED["cogvideox1.5-5b"].transformer
    assert pick_dtype("auto", CPU, five) == torch.float32
    assert pick_dtype("auto", CARD, two) == torch.float16
    assert pick_dtype("auto", CARD, five) == pick_dtype("auto", CARD) == torch.bfloat16
    assert pick_dtype("bfloat16", CPU) == torch.bfloat16
    with pytest.raises(FactoryError, match="did you mean 'bfloat16'"):
        pick_dtype("bfloat6", CPU)


def test_a_dtype_that_will_not_do_is_said(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(device_module, "device_name", lambda device: "Old Card")
    with caplog.at_level(logging.WARNING):
        assert pick_dtype("auto", CARD, PUBLISHED["cogvideox-5b"].transformer) == torch.float32
        assert pick_dtype("float16", CPU, PUBLISHED["cogvideox-5b"].transformer) == torch.float16
    assert "Old Card has no bfloat16" in caplog.text
    assert "may overflow" in caplog.text


def test_memory_of_the_process_is_seen():
    reset_peak_memory(CPU)
    before = memory_allocated(CPU)
    block = mmap.mmap(-1, 64 * 2**20)  # fresh pages, which an allocator's may not be
    block.write(bytes(64 * 2**20))
    assert peak_memory(CPU) >= memory_allocated(CPU) >= before + 48 * 2**20
    assert memory_allocated(CPU) < total_memory(CPU)
    block.close()
    synchronize(CPU)


def test_tf32_elsewhere_than_on_a_card_is_said_to_change_nothing(capsys):
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    set_tf32(True, torch.device("cpu"))
    assert "run.tf32 changes nothing on cpu" in capsys.readouterr().out
    set_tf32(False, torch.device("cpu"))
    assert not capsys.readouterr().out
    assert before == (torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision)


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_on_a_card_is_one_choice_for_products_and_convolutions(enabled):
    """The switches are there without a card; inductor's tuning reads the last of them."""
    code = f"""
import torch
from cogvideox_factory.torch_engine.device import set_tf32
set_tf32({enabled}, torch.device("cuda"))
backends = torch.backends
print(backends.cuda.matmul.fp32_precision, backends.cudnn.conv.fp32_precision, torch.get_float32_matmul_precision())
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.split() == (["tf32", "tf32", "high"] if enabled else ["ieee", "ieee", "highest"])


def test_determinism_is_a_switch():
    set_determinism(True)
    try:
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        set_determinism(False)
    assert not torch.are_deterministic_algorithms_enabled()
