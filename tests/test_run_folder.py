import os
import signal

import pytest

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError
from cogvideox_factory.run_folder import locked, require_same, stop_requests


def test_lock_keeps_others_out_and_leaves_no_empty_folder(tmp_path):
    run = tmp_path / "run"
    with locked(run), pytest.raises(FactoryError, match="another process"), locked(run):
        pass
    assert not run.exists()
    with locked(run):
        (run / "config.yaml").write_text("kept")
    assert (run / "config.yaml").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_first_signal_is_noted_and_the_second_stops(number):
    before = signal.getsignal(number)
    with stop_requests() as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        assert stop.name == signal.Signals(number).name
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before


def test_every_differing_setting_is_named(tmp_path):
    require_same({"a": 1}, {"a": 1}, source=tmp_path)
    with pytest.raises(UnfitError) as caught:
        require_same({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}, source=tmp_path)
    text = str(caught.value)
    assert "b: the run has 2, you ask for 4" in text
    assert "gone: the run has 3, you ask for None" in text
    assert "new: the run has None, you ask for 5" in text
    assert "  a:" not in text
