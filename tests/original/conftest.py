"""Drawn clips with the two lists of old, once a session."""

from pathlib import Path

import pytest

from tests.clips import draw_lists, real_lists


@pytest.fixture(scope="session")
def readme_clips(old_clips) -> Path:
    """Real clips with the two lists of old, where COGVIDEOX_REAL_CLIPS names some; drawn ones elsewhere."""
    return real_lists() or old_clips


@pytest.fixture(scope="session")
def old_clips(tmp_path_factory) -> Path:
    return draw_lists(tmp_path_factory.mktemp("old-clips"), [(16, 48, 80)] * 4, seed=3, prompts="prompt.txt")
