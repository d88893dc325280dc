"""What the supervisor makes of ended processes: with stand-ins, and once with torchrun, as on two machines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from cogvideox_factory import supervise
from cogvideox_factory.attempt import FOLDER, STARTED, Processes, read_ends, record, run_started
from cogvideox_factory.cli import main
from cogvideox_factory.errors import StorageError
from cogvideox_factory.supervise import Launch, Supervisor
from tests.ending import ask_to_end
from tests.torch_engine.runs import losses

SUMMARY = (
    "Failures:\n[{rank}]:\n  time      : now\n  rank      : {rank} (local_rank: 0)\n  exitcode  : {code} (pid: 7)\n"
)


class Ended:
    """A torchrun that has ended already."""

    def poll(self) -> int:
        return 1

    def send_signal(self, number: int, /) -> None: ...


class Attempts:
    """Stands for torchrun: each start leaves behind what the next of `ends` says, and perhaps a checkpoint."""

    def __init__(self, *ends: dict[int, int | None], saves: tuple[int, ...] = ()) -> None:
        self.ends, self.saves = list(ends), list(saves)
        self.started: list[tuple[Path, int]] = []

    def __call__(self, launch: Launch, folder: Path, port: int) -> Ended:
        number = len(self.started)
        self.started.append((folder, port))
        for rank, code in self.ends[number].items():
            (folder / f"rank-{rank}.log").write_text(f"words of rank {rank}\n")
            told = {"pid": _gone(), "code": code} if code is None or code >= 0 else {"pid": _gone()}
            (folder / f"rank-{rank}.json").write_text(json.dumps(told))
            if code is not None and code < 0:
                (folder / "node-0.log").write_text(SUMMARY.format(rank=rank, code=code))
        if number < len(self.saves) and self.saves[number]:
            checkpoint = launch.run_folder / f"checkpoint-{self.saves[number]:06}"
            checkpoint.mkdir()
            (checkpoint / "MANIFEST.json").touch()
        return Ended()


def _gone() -> int:
    """Return the number of a process that has ended."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid


def supervised(run: Path, attempts: Attempts, **options) -> int:
    launch = Launch(**{"words": ("train",), "run_folder": run, "num_processes": 2, "restarts": 5} | options)
    return Supervisor(launch=launch, start=attempts, pause_seconds=0.0).run()


@pytest.mark.parametrize(
    ("ends", "code", "says"),
    [
        ({0: 0, 1: 0}, 0, ""),
        ({0: 2, 1: 2}, 2, "rank 0 ended with exit code 2"),
        ({0: 8, 1: 3}, 3, "rank 1 ended with exit code 3"),
        ({0: 8, 1: 5}, 5, "words of rank 1"),
        ({0: 7, 1: 8}, 7, "rank 0 ended with exit code 7"),
        ({0: 75, 1: 75}, 75, ""),
        ({0: 8, 1: 75}, 75, ""),
        ({0: -signal.SIGTERM, 1: 75}, 75, ""),
    ],
)
def test_what_would_happen_again_is_not_tried_again(tmp_path, capsys, ends, code, says):
    attempts = Attempts(ends)
    assert supervised(tmp_path, attempts) == code
    assert len(attempts.started) == 1
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    ("ends", "says"),
    [
        ({0: 8, 1: -signal.SIGKILL}, "rank 1 was ended by SIGKILL"),
        ({0: 8, 1: -signal.SIGSEGV}, "rank 1 was ended by SIGSEGV"),
        ({0: 8, 1: 1}, "rank 1 ended with exit code 1"),
        ({0: 8, 1: None}, "rank 1 ended without a word"),
        ({0: 8, 1: 0}, "rank 1 ended before the run was done"),
        ({0: 0, 1: None}, "rank 1 ended without a word"),
        ({0: 8, 1: 8}, "rank 0 ended with exit code 8"),
    ],
)
def test_a_crash_is_told_and_tried_again_on_another_port(tmp_path, capsys, ends, says):
    attempts = Attempts(ends, {0: 0, 1: 0})
    assert supervised(tmp_path, attempts) == 0
    told = capsys.readouterr().out
    assert says in told
    assert "restart 1 of 5, from the start" in told
    (first, one), (second, other) = attempts.started
    assert [first.name, second.name] == ["attempt-1", "attempt-2"]
    assert one != other


def test_a_process_that_was_put_down_is_no_cause(tmp_path):
    Attempts({0: 8, 1: -signal.SIGKILL})(Launch(words=(), run_folder=tmp_path, num_processes=2), tmp_path, 1)
    assert read_ends(tmp_path, put_down={1}).causes == [0]
    assert read_ends(tmp_path, put_down=set()).causes == [1]


def test_the_same_step_is_not_tried_a_fourth_time(tmp_path, capsys):
    crash = {0: 8, 1: 1}
    attempts = Attempts(*[crash] * 9, saves=(0, 10, 20))
    assert supervised(tmp_path, attempts, restarts=9) == 8
    assert len(attempts.started) == 5  # two that saved something, the one that saved last counting, and two more
    told = capsys.readouterr().out
    assert "3 attempts in a row came to no new checkpoint" in told
    assert "from the checkpoint of step 20 the same command goes on" in told


def test_restarts_are_counted(tmp_path, capsys):
    attempts = Attempts(*[{0: 8, 1: 1}] * 9, saves=tuple(range(1, 10)))
    assert supervised(tmp_path, attempts, restarts=4) == 8
    assert len(attempts.started) == 5
    assert "all 4 restarts (--restarts) are used up" in capsys.readouterr().out


def test_a_torchrun_that_comes_to_nothing_is_no_crash_and_soon_given_up(tmp_path, capsys):
    attempts = Attempts({}, {}, {0: 0, 1: 0})
    assert supervised(tmp_path / "a", attempts, restarts=0) == 0
    assert supervised(tmp_path / "b", Attempts({}, {}, {}), restarts=0) == 8
    assert "ended before it started a process" in capsys.readouterr().out


def test_attempts_count_on_and_ports_with_them(tmp_path):
    supervised(tmp_path, Attempts({0: 0, 1: 0}))
    attempts = Attempts({0: 8, 1: 1}, {0: 0, 1: 0})
    supervised(tmp_path, attempts, master_port=29500)
    assert [(folder.name, port) for folder, port in attempts.started] == [("attempt-2", 29500), ("attempt-3", 29501)]


def test_of_two_machines_one_knows_what_the_other_refused(tmp_path):
    other = {"num_nodes": 2, "node_rank": 1, "num_processes": 1}
    assert supervised(tmp_path, Attempts({0: 5, 1: 8}), **other) == 5
    assert Launch(words=(), run_folder=tmp_path, **other).ranks == range(1, 2)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "logs").write_text("in the way")
    with pytest.raises(StorageError, match=r"logs/attempt-1 cannot be written"):
        supervised(tmp_path, Attempts({}))


def test_nothing_of_a_number_that_the_system_gave_to_another_is_killed(tmp_path):
    other = subprocess.Popen(["sleep", "60"])
    try:
        processes = Processes(folder=tmp_path, ranks=[0])
        (tmp_path / "rank-0.json").write_text(json.dumps({"pid": _gone()}))
        processes.look()
        (tmp_path / "rank-0.json").write_text(json.dumps({"pid": other.pid}))
        processes.look()
        processes.kill()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


@pytest.mark.parametrize("node_rank", [0, 1], ids=["that shows its output", "that only tells"])
def test_a_supervisor_whose_reader_is_gone_goes_on(tmp_path, node_rank):
    program = (
        "import pathlib, sys; from tests.test_supervise import Attempts, supervised\n"
        "attempts = Attempts({0: 8, 1: 1}, {0: 8, 1: 1}, {0: 0, 1: 0})\n"
        f"options = dict(num_nodes=2, num_processes=1, node_rank={node_rank})\n"
        f"sys.exit(supervised(pathlib.Path({str(tmp_path)!r}), attempts, **options))"
    )
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", program], stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("logs/attempt-*"))) == 3


def test_one_machine_talks_to_itself_alone(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(supervise.subprocess, "Popen", lambda words, **options: started.update(options, words=words))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    launch = Launch(words=("train", "my recipe.yaml"), run_folder=tmp_path, num_processes=4)
    supervise.start_torchrun(launch, tmp_path, 1234)
    assert "--master-addr=127.0.0.1" in started["words"]
    assert started["words"][-2:] == ["train", "my recipe.yaml"]
    assert started["env"]["GLOO_SOCKET_IFNAME"] == "lo"
    assert started["env"][FOLDER] == str(tmp_path)


def test_the_other_engine_is_started_by_msrun_with_this_python(tmp_path, monkeypatch):
    started = {}
    monkeypatch.setattr(supervise.subprocess, "Popen", lambda words, **options: started.update(options, words=words))
    words = ("train", "my recipe.yaml", "--engine", "mindspore")
    launch = Launch(
        words=words, engine="mindspore", run_folder=tmp_path, num_processes=4, num_nodes=2, node_rank=1,
        master_addr="10.0.0.1",
    )  # fmt: skip
    supervise.start_launcher(launch, tmp_path, 1234)
    assert started["words"][:3] == [sys.executable, "-m", "mindspore.parallel.cluster.run"]
    given = {"--worker_num=8", "--local_worker_num=4", "--node_rank=1", "--master_addr=10.0.0.1", "--master_port=1234"}
    assert given <= set(started["words"])
    assert started["words"][-7:] == ["python", "-m", "cogvideox_factory", *words]
    assert started["env"]["PATH"].startswith(f"{Path(sys.executable).parent}:")
    assert started["env"][FOLDER] == str(tmp_path)


def test_msrun_is_not_waited_for_when_all_it_started_are_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(supervise, "_MSRUN_SECONDS", 0.0)

    class Waiting(Ended):
        asked: int | None = None

        def poll(self) -> int | None:
            return None if self.asked is None else 0

        def send_signal(self, number: int, /) -> None:
            self.asked = number

    agents = []

    def start(launch: Launch, folder: Path, port: int) -> Waiting:
        Attempts({0: 75, 1: 75})(launch, folder, port)
        agents.append(Waiting())
        return agents[-1]

    launch = Launch(words=("train",), engine="mindspore", run_folder=tmp_path, num_processes=2)
    assert Supervisor(launch=launch, start=start, pause_seconds=0.0).run() == 75
    assert [agent.asked for agent in agents] == [signal.SIGINT]


def test_which_signal_ended_a_process_is_known_from_msrun(tmp_path):
    for rank, told in enumerate([{"pid": 41, "code": 8}, {"pid": 42}, {"pid": 43}]):
        (tmp_path / f"rank-{rank}.json").write_text(json.dumps(told))
    (tmp_path / "node-0.log").write_text(
        "[ERROR] ME(7:1,MainProcess): Worker process 42 exit with exception. Error code: -9.\n"
        "[ERROR] ME(7:1,MainProcess): Worker process 99 exit with exception. Error code: 1.\n"
    )
    ends = read_ends(tmp_path, put_down=set())
    assert ends.codes == {0: 8, 1: -signal.SIGKILL, 2: None}
    assert ends.causes == [1]


def test_what_brings_processes_together_is_none_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    monkeypatch.setenv("MS_ROLE", "MS_SCHED")
    monkeypatch.setenv("RANK_ID", "0")
    assert record(lambda: 3) == 3
    assert not list(tmp_path.iterdir())


def test_a_time_limit_counts_from_the_first_attempt(tmp_path, monkeypatch):
    """A scheduler's does, and knows nothing of restarts."""
    environments = []
    monkeypatch.setattr(supervise.subprocess, "Popen", lambda words, env, **options: environments.append(env))
    launch = Launch(words=("train",), run_folder=tmp_path, num_processes=2)
    for number in (1, 2):
        supervise.start_torchrun(launch, tmp_path, number)
    seen = []
    for environment in environments:
        monkeypatch.setenv(STARTED, environment[STARTED])
        seen.append(run_started())
    assert seen == [launch.started, launch.started]
    monkeypatch.delenv(STARTED)
    assert run_started() > launch.started


def test_a_process_alone_is_not_recorded(monkeypatch):
    monkeypatch.delenv(FOLDER, raising=False)
    assert record(lambda: 3) == 3


@pytest.mark.parametrize(
    ("ending", "code", "told"),
    [("return 6", 6, 6), ("fill(); return 6", 6, None), ("sys.exit()", 0, 0), ("sys.exit('words')", 1, 1)],
)
def test_a_process_ends_with_its_own_exit_code_and_leaves_word_of_it_while_there_is_room(tmp_path, ending, code, told):
    program = (
        "import resource, sys; from cogvideox_factory.attempt import record\n"
        "def fill(): resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))\n"
        f"def main(): {ending}\n"
        "sys.exit(record(main))"
    )
    environment = os.environ | {FOLDER: str(tmp_path), "RANK": "3"}
    assert subprocess.run([sys.executable, "-c", program], env=environment, check=False).returncode == code
    assert json.loads((tmp_path / "rank-3.json").read_text()).get("code") == told
    assert (tmp_path / "rank-3.log").read_text() == ("words\n" if "words" in ending else "")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--nproc", "2"], "nothing follows `--`"),
        (
            ["--nproc", "2", "--", "generate"],
            "start this as `torchrun --nproc-per-node N -m cogvideox_factory generate",
        ),
        (["--nproc", "2", "--", "evaluate"], "launch is for train; start this as `cogvideox evaluate"),
        (["--nproc", "2", "--node-rank", "1", "--", "train"], "--node-rank 1 has no effect with one machine"),
        (["--nproc", "2", "--nodes", "2", "--", "train"], "needs --master-addr"),
        (
            ["--nproc", "2", "--nodes", "2", "--node-rank", "2", "--master-addr", "a", "--", "train"],
            "2 machines are numbered 0 to 1",
        ),
        (["--nproc", "2", "--", "train", "nowhere.yaml"], "nowhere.yaml"),
        (
            ["--nproc", "2", "--", "train", "--engine", "mindspore", "--parallel.replicas", "2"],
            "parallel.replicas=2: the MindSpore engine has not got this",
        ),
    ],
)
def test_words_that_cannot_be_meant_are_refused_before_anything_starts(capsys, monkeypatch, words, says):
    monkeypatch.setattr(supervise, "start_launcher", pytest.fail)
    assert main(["launch", *words]) == 2
    assert says in capsys.readouterr().err


def test_a_command_line_of_the_older_trainers_is_launched_as_it_was_typed(tmp_path, monkeypatch, capsys):
    launches = []
    monkeypatch.setattr(supervise.Supervisor, "run", lambda this: launches.append(this.launch) or 0)
    words = ["train", "--original", "text-to-video-sft", "--pretrained_model_name_or_path", "m", "--data_root", "clips"]
    words += ["--output_dir", str(tmp_path / "run"), "--max_train_steps", "10", "--train_batch_size", "1"]
    words += ["--enable_sequence_parallelism", "True", "--sequence_parallel_shards", "4", "--optimizer", "adamw"]
    assert main(["launch", "--nproc", "8", "--", *words]) == 0
    (launch,) = launches
    assert launch.words == tuple(words)
    assert launch.run_folder == tmp_path / "run"
    assert not capsys.readouterr().out, "the processes say what it comes to"
    assert main(["launch", "--nproc", "8", "--", *words, "--lerning_rate", "1"]) == 2
    assert "did you mean 'learning_rate'" in capsys.readouterr().err


@pytest.mark.slow
def test_two_machines_lose_a_process_and_end_as_if_they_had_not(tiny_model, tmp_path):
    """torchrun itself, started twice on this machine, as two would; a rank of the second is killed on its way."""
    from tests.faults.makers import good_set

    good_set(tmp_path / "set", 4)
    values = {
        "model": {"path": str(tiny_model("cogvideox1.5-5b"))}, "run": {"device": "cpu", "dtype": "float32"},
        "data": {"root": str(tmp_path / "set"), "num_frames": 9, "height": 64, "width": 64, "fps": 8.0},
        "cache": {"dir": str(tmp_path / "cache")}, "lora": {"rank": 2},
        "train": {"steps": 60, "save_every": 10, "log_every": 1, "batch_size": 2, "num_workers": 1},
    }  # fmt: skip
    recipes = {}
    for name in ("launched", "alone"):
        recipes[name] = tmp_path / f"{name}.yaml"
        values["train"]["dir"] = str(tmp_path / name)
        recipes[name].write_text(yaml.safe_dump(values))
    assert main(["prepare", str(recipes["alone"])]) == 0
    port, run = supervise.free_port(), tmp_path / "launched"
    words = [sys.executable, "-m", "cogvideox_factory", "launch", "--nproc", "1", "--nodes", "2"]
    words += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
    machines = [
        subprocess.Popen(
            [*words, "--node-rank", str(number), "--", "train", str(recipes["launched"])],
            env=environment, stdout=subprocess.PIPE, text=True,
        )
        for number in range(2)
    ]  # fmt: skip
    try:
        end = time.monotonic() + 240
        while not list(run.glob("checkpoint-000010")) and time.monotonic() < end:
            time.sleep(0.02)
        os.kill(json.loads((run / "logs/attempt-1/rank-1.json").read_text())["pid"], signal.SIGKILL)
        told = [machine.communicate(timeout=240)[0] for machine in machines]
    finally:
        for machine in machines:
            ask_to_end(machine)
    assert [machine.returncode for machine in machines] == [0, 0], told
    assert all("rank 1 was ended by SIGKILL" in words for words in told), told
    assert "step 60/60" in told[0]
    assert "60/60" not in told[1]
    assert len(losses(run)) == 60
    assert main(["train", str(recipes["alone"])]) == 0
    one, other = losses(run), losses(tmp_path / "alone")
    assert one == pytest.approx(other, rel=1e-5)
