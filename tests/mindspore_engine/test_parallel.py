"""Whole runs in several processes that msrun starts: curve and weights of one, checkpoints that go on elsewhere."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

import hashlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter
from safetensors.numpy import load_file

from cogvideox_factory.checkpoints import checkpoint_folder, list_checkpoints
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError, NonFiniteError, StorageError
from cogvideox_factory.mindspore_engine import checkpoint, train, watch
from cogvideox_factory.mindspore_engine.border import put_own, rows_of, to_array, to_tensor, whole_array
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.linear import Linear, weights_in
from cogvideox_factory.mindspore_engine.optim import FIRST_LOSS_SCALE, Update
from cogvideox_factory.mindspore_engine.ranks import ALONE, Ranks, make_ranks
from cogvideox_factory.mindspore_engine.sharding import Shards
from cogvideox_factory.ranks import Layout
from cogvideox_factory.tensors import Deferred
from tests.golden import runs
from tests.golden.cases import normal
from tests.mindspore_engine.processes import run_in

pytestmark = pytest.mark.timeout(1800)  # all that runs in many processes runs for the first test

LORA, FULL = runs.RUNS
RELATIVE = 1e-5
WEIGHTS = 1e-5
"""Of the norm of each tensor."""
ODD = 5
"""Rows, of which neither two nor four processes hold equally many."""
FINAL = Path("final/transformer/diffusion_pytorch_model.safetensors")
BATCH = {2: 2, 4: 4}
"""Clips of a forward pass, by the number of processes."""
GRAPH = {"mindspore": {"mode": 0}}
AGAIN = {"train": {"checkpointing": "full"}}
HALF = {"run": {"device": "cpu", "dtype": "float16"}, "mindspore": {"amp_level": "O3"}}
STOCHASTIC = {"train": {"master_weights": "stochastic_bf16"}}
SHOWN = {
    "validation": {"every": 2, "num_clips": 1, "prompts": ["a", "b", "c"]}, "sampling": {"steps": 1, "tiling": False},
}  # fmt: skip
"""With one prompt more than two processes have at a time."""
SETTINGS = ("lora", "validation", "sampling", "run")
"""Sections that the run of one process has too."""
CASES: dict[int, dict[str, tuple[str, dict[str, Any]]]] = {
    2: {
        "data, lora": (LORA, {}),
        "data, full": (FULL, {"validation": {"every": 2, "num_clips": 1}, "train": {"batch_size": 2}}),
        "zero 1, lora": (LORA, {"parallel": {"zero": 1}}),
        "zero 1, full": (FULL, {"parallel": {"zero": 1}}),
        "zero 2, lora": (LORA, {"parallel": {"zero": 2}}),
        "zero 2, full, graph": (FULL, {"parallel": {"zero": 2}, **GRAPH}),
        "zero 3, lora, dora": (LORA, {"parallel": {"zero": 3}, "lora": {"use_dora": True}, **SHOWN}),
        "zero 3, full, again": (FULL, {"parallel": {"zero": 3}, **AGAIN}),
        "zero 3, lora, graph, again": (LORA, {"parallel": {"zero": 3}, **GRAPH, **AGAIN}),
        "sequence, zero 3, full": (FULL, {"parallel": {"zero": 3, "sequence": 2}}),
        "sequence, lora": (LORA, {"parallel": {"sequence": 2}, **SHOWN}),
    },
    4: {
        "zero 3, full": (FULL, {"parallel": {"zero": 3}}),
        "data and sequence, zero 2, full": (FULL, {"parallel": {"sequence": 2, "zero": 2}}),
        "data and sequence, zero 3, lora": (LORA, {"parallel": {"sequence": 2, "zero": 3}}),
    },
}  # fmt: skip
ROUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    "data, lora, float16": (LORA, HALF),
    "zero 1, full, float16": (FULL, {"parallel": {"zero": 1}, **HALF}),
    "sequence, zero 3, full, float16": (FULL, {"parallel": {"zero": 3, "sequence": 2}, **HALF}),
    "data, full, bfloat16": (FULL, STOCHASTIC),
}
"""Runs of two processes whose rounding is not that of one."""


def recipe(root: Path, name: str, case: str, size: int, **more: dict[str, Any]) -> Config:
    settings = {"schedule": "constant", "warmup_steps": 0, "steps": 2, "ema_decay": 0.5, "batch_size": BATCH[size]}
    more["train"] = settings | {"dir": str(folder_of(root, name))} | more.get("train", {})
    return runs.recipe(case, root / case.replace(" ", "-"), engine="mindspore", **more)


def folder_of(root: Path, name: str) -> Path:
    return root / name.replace(" ", "-").replace(",", "")


def parts(root: Path) -> dict[str, Config]:
    """Return runs that go on from others' checkpoints: of one process, and of two in another stage."""
    every = {"save_every": 1, "keep_checkpoints": 9}

    def part(name: str, after: str, step: int, zero: int, steps: int) -> Config:
        training = every | {"resume": str(checkpoint_folder(folder_of(root, after), step)), "steps": steps}
        return recipe(root, name, FULL, 2, train=training, parallel={"zero": zero})

    return {
        "from one": part("from one", "alone", 1, 2, 2),
        "in another stage": part("in another stage", "from one", 2, 3, 3),
        "whole": recipe(root, "whole", FULL, 2, train=every | {"steps": 3}, parallel={"zero": 3}),
        "in the same": part("in the same", "whole", 2, 3, 3),
    }


# --- what runs in each of the processes -------------------------------------------------------------------------------


def in_each(
    configs: dict[str, Config], stopped: Config | None, out_of_room: Config | None, unseen: Config | None
) -> dict[str, Any]:
    """Train; return how many numbers this process held in each run, how it ended, and how others ended."""
    found: dict[str, Any] = {"held": {}, "ends": {}}
    for name, config in configs.items():
        update = train_here(config)
        found["held"][name], found["ends"][name] = numbers_in(update), (digest_of(update), update.scalars())
    found["odd"] = odd_rows()
    found["overflow"] = {zero: overflow_in_one(zero) for zero in (0, 1, 2)}
    if stopped and out_of_room and unseen:
        found["stopped"] = error_of(stopped, asked_in_one())
        found["out of room"] = error_of(out_of_room, full_disk())
        with nan_in_one():
            train.run(unseen)
    return found


def odd_rows() -> dict[str, np.ndarray]:
    """Return the weight of a Linear whose rows do not divide, what this process holds of it, and its gradient."""
    size, rank = int(os.environ["MS_WORKER_NUM"]), int(os.environ["RANK_ID"])
    group = make_ranks(Layout(size=size, zero=3)).shards
    assert group is not None
    with weights_in(ms.float32, Shards(group=group, dtype=ms.float32)):
        layer = Linear(3, ODD)
    rows = rows_of(layer.weight)
    put_own(layer.weight, normal("weight", shape=(ODD, 3)), rows)
    x = to_tensor(normal("x", rank, shape=(2, 3)))
    (grad,) = ms.grad(lambda x: layer(x).square().sum(), None, ms.ParameterTuple([layer.weight]))(x)
    return {
        "whole": whole_array(layer.weight, rows), "held": to_array(layer.weight), "grad": whole_array(grad, rows)
    }  # fmt: skip


def overflow_in_one(zero: int) -> dict[str, Any]:
    """Take three steps, of which the second has an infinite gradient in the last process alone; return what is left."""
    size, rank = int(os.environ["MS_WORKER_NUM"]), int(os.environ["RANK_ID"])
    bad = (2, size - 1)
    update = scaled_update(make_ranks(Layout(size=size, zero=zero)))
    return three_steps(update, lambda step: gradient(step, rank, np.inf if (step, rank) == bad else 1))


def scaled_update(ranks: Ranks) -> Update:
    weight = Parameter(to_tensor(normal("weight", shape=(ODD, 3))), name="weight")
    return Update(
        [weight], betas=(0.9, 0.99), eps=1e-6, weight_decay=0.1, max_grad_norm=1.0, scales_loss=True, ranks=ranks
    )


def gradient(step: int, rank: int, factor: float = 1) -> np.ndarray:
    return normal("gradient", step, rank, shape=(ODD, 3)) * np.float32(FIRST_LOSS_SCALE * factor)


def three_steps(update: Update, gradient_of: Callable[[int], np.ndarray]) -> dict[str, Any]:
    norms = []
    for step in (1, 2, 3):
        update.add([to_tensor(gradient_of(step))])
        norms.append(float(update.step(1e-2)))
    return {"norms": norms, "scalars": update.scalars(), "weight": to_array(update.trained[0])}


def numbers_in(update: Update) -> int:
    """Return how many numbers this process holds of the weights that are trained, and of their state."""
    state = [*update.trained, *update.sums, *(p for kind in update.state().values() for p in kind)]
    return sum({id(p): p.size for p in state}.values())


def digest_of(update: Update) -> str:
    """Return what tells the weights apart that this process has whole."""
    whole = [to_array(weight) for weight in update.trained if rows_of(weight) is None]
    return hashlib.sha256(b"".join(array.tobytes() for array in whole)).hexdigest()


def train_here(config: Config) -> Update:
    """Train; return what updated the weights. Sample videos are written as they are."""
    made: list[Learner] = []
    make_learner = train.make_learner
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_learner", lambda *args: made.append(make_learner(*args)) or made[0])
        patch.setattr(watch, "export_to_video", runs.keep_frames)
        train.run(config)
    return made[0].update


def error_of(config: Config, disturbance: AbstractContextManager[None]) -> tuple[str, str]:
    with disturbance:
        try:
            train.run(config)
        except FactoryError as error:
            return type(error).__name__, str(error)
    raise AssertionError("it went on")


@contextmanager
def asked_in_one() -> Iterator[None]:
    """Ask the second process alone to stop, in its first step."""
    micro, calls = Learner.micro, []

    def asked(self, batch):
        calls.append(1)
        if len(calls) == 1 and os.environ["RANK_ID"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return micro(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "micro", asked)
        yield


@contextmanager
def full_disk() -> Iterator[None]:
    """Let the first process fail to write the second tensor of a checkpoint."""

    def save_tensors(path: Path, arrays: dict[str, Deferred], **options: Any) -> None:
        next(iter(arrays.values())).make()
        raise StorageError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "save_tensors", save_tensors)
        yield


@contextmanager
def nan_in_one() -> Iterator[None]:
    """Let the model draw NaN for the prompt of the second process alone."""

    def video(self: watch.SampleVideos, index: int) -> np.ndarray:
        if os.environ["RANK_ID"] == "1":
            raise NonFiniteError("the latents are not finite")
        return np.zeros((9, 64, 96, 3), np.uint8)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.SampleVideos, "_video", video)
        yield


# --- what came out ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Return a folder with the clips, the cache and the runs of one process."""
    root = tmp_path_factory.mktemp("parallel")
    train.run(recipe(root, "alone", FULL, 2, train={"save_every": 1, "keep_checkpoints": 9, "steps": 4}))
    return root


@pytest.fixture(scope="module")
def seen(root, tmp_path_factory):
    """Return what each process saw, by their number."""
    found = {}
    for size, cases in CASES.items():
        cases = cases | (ROUNDED if size == 2 else {})
        configs = {name: recipe(root, f"{size} {name}", case, size, **more) for name, (case, more) in cases.items()}
        others: tuple[Config | None, Config | None, Config | None] = None, None, None
        if size == 2:
            configs |= parts(root)
            others = (
                recipe(root, "stopped", LORA, 2), recipe(root, "out of room", FULL, 2, parallel={"zero": 2}),
                recipe(root, "unseen", LORA, 2, **SHOWN),
            )  # fmt: skip
        folder = tmp_path_factory.mktemp(f"many-{size}")
        found[size] = run_in(size, in_each, configs, *others, folder=folder, limit_seconds=1500)
    return found


@pytest.fixture(scope="module")
def alone(root):
    """Return what trains in one process what a case trains in many, and returns its folder."""

    @cache
    def trained(case: str, size: int, more: str) -> Path:
        name = f"one {size} {case} {hashlib.sha256(more.encode()).hexdigest()[:8]}"
        config = recipe(root, name, case, size, **json.loads(more))
        train_here(config)
        return folder_of(root, name)

    def run(name: str, size: int) -> Path:
        case, more = (CASES[size] | ROUNDED)[name]
        kept = {key: more[key] for key in SETTINGS if key in more}
        if more.get("train", {}).keys() & STOCHASTIC["train"].keys():
            kept |= STOCHASTIC
        return trained(case, size, json.dumps(kept))

    return run


def logged(run: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"{name}.jsonl").read_text().splitlines()]


def assert_near(one: Path, other: Path) -> None:
    """Compare what runs wrote: the same files, numbers near."""
    ours, theirs = logged(one), logged(other)
    for name in ("loss", "grad_norm", "weight_norm", "validation_loss"):
        found, expected = ([row[name] for row in rows if name in row] for rows in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=RELATIVE, err_msg=name)
    of_clips = [
        {(row["step"], row["clip"], row["timestep"]): row["loss"] for row in logged(run, "losses")}
        for run in (one, other)
    ]
    assert of_clips[0] == pytest.approx(of_clips[1], rel=RELATIVE)
    files = [sorted(path.relative_to(run) for path in (run / "final").rglob("*")) for run in (one, other)]
    assert files[0] == files[1]
    for file in (path for path in files[0] if path.suffix == ".safetensors"):
        found, expected = load_file(one / file), load_file(other / file)
        assert found.keys() == expected.keys()
        for name, array in expected.items():
            if (
                "norm_k.bias" not in name
            ):  # softmax does not see it: its gradient is rounding, which Adam makes steps of
                assert np.linalg.norm(found[name] - array) <= WEIGHTS * np.linalg.norm(array), name


@pytest.mark.parametrize(("size", "name"), [(size, name) for size, cases in CASES.items() for name in cases])
def test_steps_are_those_of_one_process(size, name, root, seen, alone):
    assert len(seen[size]) == size
    assert_near(folder_of(root, f"{size} {name}"), alone(name, size))


@pytest.mark.parametrize("name", [name for name, (_, more) in CASES[2].items() if "sampling" in more])
def test_sample_videos_are_those_of_one_process(name, root, seen, alone):
    """Each of its own prompts, or all of one; where they run out, the last is made along and not written."""
    assert seen[2]
    folders = [run / "samples" for run in (folder_of(root, f"2 {name}"), alone(name, 2))]
    ours, theirs = ({path.name: np.load(path).astype(int) for path in folder.iterdir()} for folder in folders)
    assert sorted(ours) == [f"step-{step:06}-{index:02}.npy" for step in (0, 2) for index in range(3)]
    for file, frames in theirs.items():
        assert frames.std() > 10
        assert np.abs(ours[file] - frames).max() <= 1, file
    assert not np.array_equal(ours["step-000002-00.npy"], ours["step-000002-01.npy"])


@pytest.mark.parametrize("name", ROUNDED)
def test_runs_of_other_rounding_learn_nearly_what_one_process_learns(name, root, seen, alone):
    ours, theirs = logged(folder_of(root, f"2 {name}")), logged(alone(name, 2))
    assert seen[2]
    for key, apart in (("loss", 2e-3), ("grad_norm", 2e-2), ("weight_norm", 1e-4)):
        found, expected = ([row[key] for row in rows] for rows in (ours, theirs))
        np.testing.assert_allclose(found, expected, rtol=apart, err_msg=key)
    assert [row.get("loss_scale") for row in ours] == [2.0**16 if "float16" in name.split(", ") else None] * 2


@pytest.mark.parametrize("size", CASES)
def test_whole_weights_and_counters_are_the_same_bits_in_all_processes(size, seen):
    first, *others = (process["ends"] for process in seen[size])
    assert all(scalars["num_updates"] for _, scalars in first.values())
    for other in others:
        assert other == first


@pytest.mark.parametrize("size", CASES)
def test_an_overflow_in_one_process_is_skipped_by_all(size, seen):
    def summed(step: int) -> np.ndarray:
        return sum(gradient(step, rank) for rank in range(size)) * np.float32(np.inf if step == 2 else 1)

    alone = three_steps(scaled_update(ALONE), summed)
    assert alone["scalars"]["num_skipped"] == 1
    assert alone["scalars"]["loss_scale"] == FIRST_LOSS_SCALE / 2
    for process in seen[size]:
        for zero, found in process["overflow"].items():
            assert found["scalars"] == alone["scalars"], zero
            np.testing.assert_allclose(found["norms"], alone["norms"], rtol=1e-6)
            np.testing.assert_allclose(found["weight"], alone["weight"], rtol=1e-5)


@pytest.mark.parametrize("size", CASES)
def test_rows_that_do_not_divide_are_filled_up_with_zeros(size, seen):
    weight = normal("weight", shape=(ODD, 3))
    inputs = [normal("x", rank, shape=(2, 3)) for rank in range(size)]
    grad = sum(2 * (x @ weight.T).T @ x for x in inputs)
    share = -(-ODD // size)
    padded = np.pad(weight, ((0, size * share - ODD), (0, 0)))
    for rank, process in enumerate(seen[size]):
        assert np.array_equal(process["odd"]["whole"], weight)
        assert np.array_equal(process["odd"]["held"], padded[rank * share : (rank + 1) * share])
        np.testing.assert_allclose(process["odd"]["grad"], grad, rtol=1e-5)


def test_each_holds_its_part(seen):
    """Of weights, gradients and moments, and of masters where weights are whole; what is no Linear counts little."""
    whole = seen[2][0]["held"]["data, full"]
    for size, names in (
        (2, {"zero 1, full": 3.5, "zero 2, full, graph": 3, "zero 3, full, again": 2}),
        (4, {"zero 3, full": 1, "data and sequence, zero 2, full": 2}),
    ):
        for process in seen[size]:
            for name, copies in names.items():
                assert process["held"][name] / whole == pytest.approx(copies / 4, rel=0.03), name


def test_a_checkpoint_goes_on_in_any_number_of_processes_and_any_stage(root, seen):
    assert seen[2]
    last = recipe(
        root, "in one", FULL, 2,
        train={"resume": str(checkpoint_folder(folder_of(root, "in another stage"), 3)), "steps": 4},
    )  # fmt: skip
    train.run(last)
    expected = runs.losses(folder_of(root, "alone"))
    found = [runs.losses(folder_of(root, name)).item() for name in ("from one", "in another stage", "in one")]
    np.testing.assert_allclose(found, expected[1:], rtol=1e-6)
    ours, theirs = (load_file(folder_of(root, name) / FINAL) for name in ("in one", "alone"))
    for name, array in theirs.items():
        if "norm_k.bias" not in name:
            assert np.linalg.norm(ours[name] - array) <= WEIGHTS * np.linalg.norm(array), name


def test_in_the_same_layout_it_goes_on_to_the_bit(root, seen):
    assert seen[2]
    whole, parted = folder_of(root, "whole"), folder_of(root, "in the same")
    assert runs.losses(parted).tolist() == runs.losses(whole)[2:].tolist()
    for file in ("checkpoint-000003/shard-00001.safetensors", FINAL):
        assert (whole / file).read_bytes() == (parted / file).read_bytes(), file


def test_whoever_is_asked_to_stop_all_stop_after_the_same_step(root, seen):
    for process in seen[2]:
        assert process["stopped"][0] == "StoppedError"
        assert "stopped by SIGTERM after step 1" in process["stopped"][1]
    assert list_checkpoints(folder_of(root, "stopped")) == [1]


def test_a_disk_that_is_full_is_every_process_affair(root, seen):
    for process in seen[2]:
        assert process["out of room"] == ("StorageError", "the disk is full")
    assert not list_checkpoints(folder_of(root, "out of room"))


def test_a_sample_video_that_fails_in_one_process_ends_no_run(root, seen):
    assert seen[2]
    run = folder_of(root, "unseen")
    assert (run / "final" / "pytorch_lora_weights.safetensors").exists()
    assert [row["step"] for row in logged(run) if "validation_loss" in row] == [0, 2]
    assert sorted(path.name for path in (run / "samples").iterdir()) == [f"step-{n:06}-00.mp4" for n in (0, 2)]
