"""Where MindSpore is, the device is chosen once; a model compiles for seconds, so graphs are made of small ones."""

from importlib.util import find_spec

import pytest


def pytest_report_header() -> str | None:
    if not find_spec("mindspore"):
        return None
    import mindspore

    from cogvideox_factory.mindspore_engine.device import pick_device

    return f"MindSpore {mindspore.__version__} on {pick_device('auto')}"


@pytest.fixture(scope="session", autouse=True)
def _device():
    if find_spec("mindspore"):
        from cogvideox_factory.mindspore_engine.device import pick_device

        pick_device("auto")
