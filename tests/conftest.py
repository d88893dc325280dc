"""Fixtures for every room: tiny model folders, built once a session."""

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

# Tiny shapes gain nothing from threads and lose much when processes share the cores. Set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"

from cogvideox_factory.tiny.build import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return `tiny_model(variant, seed=0, dtype="float32")`: a complete model folder. Do not write to it."""
    root = tmp_path_factory.mktemp("tiny-models")

    @cache
    def build(variant: str, seed: int, dtype: str) -> Path:
        return build_tiny_model(root / f"{variant}-{seed}-{dtype}", variant, seed, dtype)

    return lambda variant, seed=0, dtype="float32": build(variant, seed, dtype)
