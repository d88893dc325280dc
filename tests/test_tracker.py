"""Trackers are guests: told everything while they are well, left alone when not, and missed before a run starts."""

import sys
from types import SimpleNamespace

import pytest

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.metrics import MetricsLog
from cogvideox_factory.recipe import check
from cogvideox_factory.tracker import TRACKERS, Tracker
from tests.test_metrics import rows


class Library:
    """Looks like wandb and trackio; fails at what it is told to."""

    def __init__(self, fails=""):
        self.fails, self.calls = fails, []

    def __getattr__(self, name):
        if name not in ("init", "log", "finish"):
            raise AttributeError(name)

        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise RuntimeError("no network")

        return call


def tracked(tmp_path, monkeypatch, kind="wandb", fails=""):
    library = Library(fails)
    monkeypatch.setitem(sys.modules, kind, library)
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    tracker = Tracker(kind, project="mine", folder=run, settings={"task": "t2v"})
    tracker.start()
    log = MetricsLog(run, tracker=tracker)
    for step in (1, 2):
        log.write(step, {"loss": 0.5, "clips": ["a"]})
    log.close()
    assert [row["step"] for row in rows(run)] == [1, 2], "the file is complete whatever the tracker does"
    return library.calls


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_tracker_gets_the_numbers_of_every_line(tmp_path, monkeypatch, kind):
    init, *logs, finish = tracked(tmp_path, monkeypatch, kind)
    assert init[0] == "init"
    assert {k: init[2][k] for k in ("project", "name", "config")} == {
        "project": "mine", "name": "run", "config": {"task": "t2v"}
    }  # fmt: skip
    assert logs == [("log", ({"loss": 0.5},), {"step": step}) for step in (1, 2)]
    assert finish[0] == "finish"


def test_a_run_that_goes_on_is_the_same_run_there(tmp_path, monkeypatch):
    first, again = (tracked(tmp_path, monkeypatch)[0][2] for _ in range(2))
    assert first["id"] == again["id"]
    assert first["resume"] == "allow"


@pytest.mark.parametrize(("fails", "tried"), [("init", 1), ("log", 2), ("finish", 4)])
def test_a_tracker_that_fails_is_told_once_and_left_alone(tmp_path, monkeypatch, capsys, fails, tried):
    assert len(tracked(tmp_path, monkeypatch, fails=fails)) == tried
    assert capsys.readouterr().out.count("wandb failed (no network)") == 1


@pytest.mark.parametrize("found", [None, SimpleNamespace()])
def test_a_tracker_that_is_not_installed_is_missed_before_the_run(tmp_path, monkeypatch, found):
    """Nothing of that name, or a folder of that name, which Python takes for a package."""
    monkeypatch.setitem(sys.modules, "trackio", found)
    with pytest.raises(MissingError, match=r"cogvideox-factory\[trackio\]"):
        Tracker("trackio", project="mine", folder=tmp_path, settings={})


def test_a_project_without_a_tracker_is_refused():
    with pytest.raises(FactoryError, match=r"train\.tracker_project has no effect with train\.tracker=none"):
        check({"train": {"tracker_project": "mine"}}, source="test")
