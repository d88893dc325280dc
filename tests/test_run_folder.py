import os
import signal

import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.errors import FactoryError, StorageError, UnfitError
from cogvideox_factory.run_folder import LeftAtOnceError, check_allowed, locked, require_same, stop_requests


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


SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
def test_first_signal_is_noted_and_a_later_one_leaves_at_once(number):
    now = [0.0]
    before = signal.getsignal(number)
    with stop_requests(lambda: now[0]) as stop:
        assert stop.name is None
        os.kill(os.getpid(), number)
        now[0] = 0.9
        os.kill(os.getpid(), number)  # the launcher passes on what the terminal sent to all
        assert stop.name == signal.Signals(number).name
        now[0] = 1.1
        with pytest.raises(LeftAtOnceError) as left:
            os.kill(os.getpid(), number)
    assert left.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def test_a_stop_that_another_process_heard_first_makes_no_second_signal_of_ones_own():
    with stop_requests() as stop:
        stop.name = "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name == "SIGUSR1"


def test_nohup_keeps_a_run_alive_when_its_terminal_goes(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.name is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_is_said_after_the_terminal_has_gone_stops_nothing():
    master, slave = os.openpty()
    before = os.dup(1)
    os.dup2(slave, 1)
    os.close(slave)
    try:
        with stop_requests() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert os.isatty(1), "one that is alive is kept"
            os.close(master)
            with pytest.raises(OSError):
                os.write(1, b"gone")
            os.kill(os.getpid(), signal.SIGHUP)
            os.write(1, b"said to nobody")
            assert stop.name == "SIGHUP"
    finally:
        os.dup2(before, 1)
        os.close(before)


def test_the_command_line_ends_with_the_code_of_the_second_signal(monkeypatch):
    def leave(argv):
        raise LeftAtOnceError(signal.SIGTERM)

    monkeypatch.setattr("cogvideox_factory.cli.train.run", leave)
    assert main(["train"]) == 143


def test_every_differing_setting_is_named(tmp_path):
    assert require_same({"a": 1}, {"a": 1}, source=tmp_path) == {}
    with pytest.raises(UnfitError) as caught:
        require_same({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}, source=tmp_path)
    text = str(caught.value)
    assert "b: the run has 2, you ask for 4" in text
    assert "gone: the run has 3, you ask for None" in text
    assert "new: the run has None, you ask for 5" in text
    assert "  a:" not in text
    assert "--train.allow-change b gone new" in text


def test_another_base_of_the_same_shape_is_refused_but_for_runs_that_did_not_record_theirs(tmp_path):
    with pytest.raises(UnfitError, match="weights: the run has 'a', you ask for 'b'"):
        require_same({"weights": "a"}, {"weights": "b"}, source=tmp_path, allow=["weights"])
    assert require_same({"model": "m"}, {"model": "m", "weights": "b"}, source=tmp_path) == {}


def test_a_change_is_allowed_by_name_but_never_another_model(tmp_path):
    recorded, wanted = {"data": "x", "model": "a", "lora.rank": 4}, {"data": "y", "model": "b", "lora.rank": 8}
    allow = ["data", "model", "lora.rank"]
    assert require_same(recorded, wanted | {"model": "a", "lora.rank": 4}, source=tmp_path, allow=["data"]) == {
        "data": ("x", "y")
    }
    with pytest.raises(UnfitError) as caught:
        require_same(recorded, wanted, source=tmp_path, allow=allow)
    assert "model: the run has" in str(caught.value)
    assert "lora.rank: the run has" in str(caught.value)
    assert "data:" not in str(caught.value)
    assert "allow-change" not in str(caught.value)
    check_allowed(["data"], wanted)
    for name in ("model", "lora.rank"):
        with pytest.raises(FactoryError, match="another state"):
            check_allowed([name], wanted)
    with pytest.raises(FactoryError, match=r"did you mean 'data'"):
        check_allowed(["dat"], wanted)
