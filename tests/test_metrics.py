import errno
import io
import json

from rich.console import Console
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

from cogvideox_factory import metrics
from cogvideox_factory.metrics import MetricsLog, StepRows, duration, progress_bar, say


def rows(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_rows_and_tensorboard_hold_the_same_numbers(tmp_path):
    log = MetricsLog(tmp_path)
    log.write(1, {"loss": 0.5, "clips": ["a"]})
    log.write(2, {"loss": float("nan")})
    log.close()
    assert rows(tmp_path) == [{"step": 1, "loss": 0.5, "clips": ["a"]}, {"step": 2, "loss": "nan"}]
    events = [e for f in (tmp_path / "tensorboard").iterdir() for e in EventFileLoader(str(f)).Load()]
    scalars = [(e.step, v.tag) for e in events for v in e.summary.value]
    assert scalars == [(1, "loss"), (2, "loss")]


def test_resume_drops_the_rows_of_the_run_that_died(tmp_path):
    log = MetricsLog(tmp_path)
    for step in range(1, 6):
        log.write(step, {"loss": float(step)})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    log = MetricsLog(tmp_path, resume_step=3)
    log.write(4, {"loss": 40.0})
    log.close()
    assert [(r["step"], r["loss"]) for r in rows(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]


def test_rows_of_steps_are_made_with_the_first_and_dropped_after_a_resume(tmp_path):
    file = tmp_path / "rows.jsonl"
    found = StepRows(file)
    found.write([])
    assert not file.exists()
    found.write([{"step": step, "loss": float("nan")} for step in (1, 2, 2, 3)])
    found.close()
    again = StepRows(file, resume_step=2)
    assert again.steps() == [1, 2]
    assert len(file.read_text().splitlines()) == 3


def test_a_disk_that_is_full_is_told_once(tmp_path, capsys):
    found = StepRows(tmp_path / "no-folder" / "rows.jsonl")
    for step in (1, 2):
        found.write([{"step": step}])
    found.close()
    assert capsys.readouterr().out.count("cannot be written") == 1


def test_rows_that_cannot_be_dropped_end_no_run_and_none_is_added_behind_them(tmp_path, monkeypatch, capsys):
    file = tmp_path / "rows.jsonl"
    StepRows(file).write([{"step": step} for step in (1, 2, 3)])

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        again = StepRows(file, resume_step=1)
        again.write([{"step": 2}])
    assert capsys.readouterr().out.count("training goes on without it") == 1
    assert again.steps() == [1, 2, 3]
    again.write([{"step": 4}])
    assert again.steps() == [1, 4]
    assert list(tmp_path.iterdir()) == [file]


def test_duration():
    assert [duration(s) for s in (0, 59.6, 3661)] == ["0:00", "1:00", "1:01:01"]


def test_a_terminal_shows_a_bar_below_the_lines(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(metrics, "console", Console(file=shown, force_terminal=True, width=100))
    with progress_bar("training", 4, done=2, lines=False) as advance:
        advance()
        say("a line of its own")
        advance()
    assert "training" in shown.getvalue()
    assert "a line of its own" in shown.getvalue()
    assert "4/4" in shown.getvalue()


def test_without_a_terminal_who_writes_lines_gets_no_others(monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr(metrics, "console", Console(file=shown, force_terminal=False))
    monkeypatch.setattr(metrics, "_QUIET_SECONDS", 0)
    with progress_bar("training", 2, lines=False) as advance:
        advance()
    assert shown.getvalue() == ""
    with progress_bar("clips", 3, done=1) as advance:
        advance()
    assert shown.getvalue().startswith("clips: 2/3, ")
