"""Where MindSpore is, the device is chosen once; a model compiles for seconds, so graphs are made of small ones."""

from importlib.util import find_spec

import pytest


@pytest.fixture(scope="session", autouse=True)
def _device():
    if find_spec("mindspore"):
        from cogvideox_factory.mindspore_engine.device import pick_device

        pick_device("auto")
