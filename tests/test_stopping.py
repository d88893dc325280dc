"""Signals that ask a run to stop, once and again, and a terminal that goes away."""

import os
import signal

import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.stopping import LeftAtOnceError, stop_requests

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
