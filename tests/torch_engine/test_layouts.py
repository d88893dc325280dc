"""Whole runs on several processes: the curve of one process, checkpoints that go on in another layout, one writer."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch

from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import checkpoint, prepare, train, vae_blocks, watch
from cogvideox_factory.torch_engine.encode import Encoder
from tests.clips import draw_clips
from tests.torch_engine.processes import run_in
from tests.torch_engine.runs import losses, weights_of

SHAPES = {"wide": (17, 64, 96), "square": (9, 64, 64)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """Return a folder with models, clips of two shapes and caches of both tasks, and of what a bucket file sorts."""
    root = tmp_path_factory.mktemp("layouts")
    draw_clips(root / "clips", [*SHAPES.values()] * 5)
    for task, variant in (("t2v", "cogvideox1.5-5b"), ("i2v", "cogvideox1.5-5b-i2v")):
        shutil.copytree(tiny_model(variant), root / task)
        file = root / task / "transformer" / "config.json"  # positions for both shapes
        file.write_text(json.dumps(json.loads(file.read_text()) | {"sample_height": 40, "sample_width": 40}))
        prepare.run(settings(root, task=task))
    draw_clips(root / "listed", [(9, 144, 256), (9, 192, 192), (9, 192, 192), (9, 256, 144)])
    (root / "bucket.yaml").write_text("bucket_config: {144p: {9: [1.0, 2]}}")
    prepare.run(settings(root, listed=True))
    return root


def settings(root, *, task="t2v", method="full", parallel=None, validation=None, raw=None, listed=False, **training):
    shape = {"num_frames": 17, "height": 64, "width": 96, "buckets": "auto"}
    if listed:
        shape = {"num_frames": 9, "buckets": str(root / "bucket.yaml")}
    image = {"image_noise": False} if task == "i2v" else {}
    return check(
        {
            "task": task,
            "model": {"path": str(root / task)},
            "data": {"root": str(root / ("listed" if listed else "clips")), "fps": 8.0, **shape, **(raw or {})},
            "run": {"device": "cpu", "dtype": "float32"},
            "cache": {"dir": str(root / f"cache-{'listed' if listed else task}")} if raw is None else {},
            "lora": {"rank": 4, "alpha": 8.0} if method == "lora" else {},
            "train": {
                "method": method, "steps": 20, "log_every": 1, "save_every": 10, "learning_rate": 1e-3,
                "checkpointing": "none", "ema_decay": 0.9,
            } | ({} if listed else {"batch_size": 4}) | image | training,
            "parallel": parallel or {},
            "validation": validation or {},
        },
        source="test",
    )  # fmt: skip


def train_each(configs):
    for config in configs:
        train.run(config)


def curve(run):
    """Return the losses of all twenty steps."""
    assert len(losses(run)) == 20
    return np.array(losses(run))


def assert_close(one, other):
    """Compare final weights; Adam divides by the size of a gradient, so rounding in a small one counts in full."""
    ours, theirs = weights_of(one), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        if "norm_k.bias" not in name:  # softmax does not see it: its gradient is rounding, which Adam makes steps of
            assert np.linalg.norm(ours[name] - weight) <= 1e-4 * np.linalg.norm(weight), name


LAYOUTS = {
    2: [
        {"parallel": {}},
        {"task": "i2v", "method": "lora", "parallel": {"zero": 3}, "optimizer": "prodigy", "learning_rate": 1.0},
        {"parallel": {"sequence": 2, "zero": 2}, "gradient_accumulation": 2, "batch_size": 2, "optimizer": "adamw8bit"},
        {"task": "i2v", "parallel": {"sequence": 2}},
        {"method": "lora", "parallel": {"sequence": 2}},
    ],
    4: [
        {"parallel": {"zero": 3, "sequence": 2}},
        {
            "task": "i2v", "method": "lora", "parallel": {"zero": 1, "replicas": 2}, "optimizer": "came",
            "checkpointing": "save_attention",
        },
        {"parallel": {"sequence": 4}},
        {"listed": True, "parallel": {"sequence": 2}},
    ],
}  # fmt: skip


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_twenty_steps_go_the_way_of_one_process(folder, size, tmp_path):
    configs = [settings(folder, dir=str(tmp_path / f"many-{n}"), **case) for n, case in enumerate(LAYOUTS[size])]
    run_in(size, train_each, configs, folder=tmp_path)
    for number, case in enumerate(LAYOUTS[size]):
        alone = {key: value for key, value in case.items() if key != "parallel"}
        train.run(settings(folder, dir=str(tmp_path / f"one-{number}"), **alone))
        np.testing.assert_allclose(curve(tmp_path / f"many-{number}"), curve(tmp_path / f"one-{number}"), rtol=1e-5)
        assert_close(tmp_path / f"many-{number}", tmp_path / f"one-{number}")


RAW = [
    {"parallel": {"sequence": 4}, "raw": {}},
    {"task": "i2v", "method": "lora", "parallel": {"sequence": 2, "zero": 3}, "raw": {"vae_tiling": True}},
]


@pytest.mark.slow
def test_a_sequence_encodes_each_raw_clip_once_and_goes_the_way_of_one_process(folder, tmp_path):
    watched = {"steps": 3, "batch_size": 2, "validation": {"every": 3, "num_clips": 1}}
    cases = [case | watched | ({"image_noise": True} if "task" in case else {}) for case in RAW]
    configs = [settings(folder, dir=str(tmp_path / f"many-{n}"), **case) for n, case in enumerate(cases)]
    shared = run_in(4, train_each_and_see_latents, configs, folder=tmp_path)
    for number, case in enumerate(cases):
        config = settings(folder, dir=str(tmp_path / f"one-{number}"), **{**case, "parallel": {}})
        (alone,) = train_each_and_see_latents([config])
        np.testing.assert_allclose(losses(tmp_path / f"many-{number}"), losses(tmp_path / f"one-{number}"), rtol=1e-5)
        ours, size = [results[number] for results in shared], case["parallel"]["sequence"]
        for first in range(0, 4, size):
            assert all(other["latents"] == ours[first]["latents"] for other in ours[first : first + size])
        groups = [ours[first : first + size] for first in range(0, 4, size)]
        assert sum(sum(part["trained"] for part in group) for group in groups) == alone["trained"]
        assert sum(part["held_out"] for group in groups for part in group) == alone["held_out"]


def train_each_and_see_latents(configs):
    """Train; return for each run a digest of all latents and how much this process coded, to train on and held out."""
    seen = []
    for config in configs:
        record = {"latents": "", "trained": 0, "held_out": 0}
        with pytest.MonkeyPatch.context() as patch:
            watch_latents(patch, record)
            train.run(config)
        seen.append(record)
    return seen


def watch_latents(patch, record):
    batch, code, held_out_loss, now = Encoder.batch, vae_blocks.Encoder.forward, watch.held_out_loss, ["trained"]

    def seen_batch(self, raw):
        done = batch(self, raw)
        parts = [done[key] for key in ("mean", "logvar", "image_mean", "image_logvar") if key in done]
        content = b"".join(part.numpy().tobytes() for part in parts)
        record["latents"] = hashlib.sha256(record["latents"].encode() + content).hexdigest()
        return done

    def counted_code(self, x, chunk):
        record[now[0]] += x.numel()
        return code(self, x, chunk)

    def held_out(*arguments, **options):
        now[0] = "held_out"
        try:
            return held_out_loss(*arguments, **options)
        finally:
            now[0] = "trained"

    patch.setattr(Encoder, "batch", seen_batch)
    patch.setattr(vae_blocks.Encoder, "forward", counted_code)
    patch.setattr(watch, "held_out_loss", held_out)


def test_a_run_goes_on_with_other_processes(folder, tmp_path):
    """4 processes at ZeRO 3, then 2 at ZeRO 0, then 1, and back to 4: as if it had been one all along."""
    train.run(settings(folder, dir=str(tmp_path / "one"), save_every=5))
    where = {"dir": str(tmp_path / "moved"), "save_every": 5}
    stages = [(4, {"zero": 3, "sequence": 2}, 5), (2, {}, 10), (1, {}, 15), (4, {"zero": 2}, 20)]
    for size, parallel, steps in stages:
        config = settings(folder, parallel=parallel, steps=steps, **where)
        if size == 1:
            train.run(config)
        else:
            run_in(size, train_each, [config], folder=tmp_path)
    np.testing.assert_allclose(curve(tmp_path / "moved"), curve(tmp_path / "one"), rtol=1e-6)
    assert_close(tmp_path / "moved", tmp_path / "one")


@pytest.mark.slow
def test_a_stopped_run_of_many_goes_on_exactly(folder, tmp_path):
    parallel = {"zero": 3, "sequence": 2}
    parts = {"dir": str(tmp_path / "parts"), "parallel": parallel}
    configs = [settings(folder, dir=str(tmp_path / "whole"), parallel=parallel), settings(folder, steps=10, **parts)]
    run_in(4, train_each, [*configs, settings(folder, **parts)], folder=tmp_path)
    whole, resumed = weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts")
    assert all(np.array_equal(value, resumed[name]) for name, value in whole.items())
    assert np.array_equal(curve(tmp_path / "whole"), curve(tmp_path / "parts"))


def test_a_batch_that_processes_cannot_share_is_refused(folder, tmp_path):
    config = settings(folder, dir=str(tmp_path / "run"), batch_size=3)
    with pytest.raises(AssertionError, match=r"a global batch of 3.* does not divide over 2 ranks"):
        run_in(2, train_each, [config], folder=tmp_path)
    assert not (tmp_path / "run").exists()


def test_videos_are_made_and_a_full_disk_survived_by_all_alike(folder, tmp_path):
    """Sample videos come from divided weights; a checkpoint that does not fit on the disk is missed by all together."""
    config = settings(
        folder, dir=str(tmp_path / "run"), parallel={"zero": 3, "sequence": 2}, steps=4, save_every=2,
        async_checkpoint=True, validation={"every": 4, "num_clips": 2, "prompts": ["a red circle"]},
    )  # fmt: skip
    run_in(2, train_with_a_full_disk, config, folder=tmp_path)
    assert len(list((tmp_path / "run" / "samples").glob("*.mp4"))) == 2
    assert [path.name for path in sorted((tmp_path / "run").glob("checkpoint-*"))] == ["checkpoint-000004"]


def train_with_a_full_disk(config):
    """Train, with no room for the first checkpoint."""
    real, calls = checkpoint.require_room, []

    def no_room(folder, num_bytes, *, what):
        calls.append(what)
        if len(calls) == 1:
            raise StorageError("no room")
        real(folder, num_bytes, what=what)

    checkpoint.require_room = no_room
    train.run(config)


def test_processes_that_are_not_of_one_run_are_told_apart(folder, tmp_path):
    shutil.copytree(folder / "t2v", tmp_path / "other")
    file = tmp_path / "other" / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    alike = {"dir": str(tmp_path / "run")}
    own = settings(folder, **alike)

    def with_model(**changes):
        return own.model_copy(update={"model": own.model.model_copy(update=changes)})

    described = {"transformer_config": str(folder / "t2v" / "transformer" / "config.json")}
    pairs = [
        (own, settings(folder, **alike, learning_rate=2e-3)),
        (own, settings(folder, **alike, parallel={"zero": 2})),
        (own, with_model(path=str(tmp_path / "other"))),
        (
            with_model(transformer=str(folder / "t2v"), **described),
            with_model(transformer=str(tmp_path / "other"), **described),
        ),
    ]
    results = run_in(2, refused_of_each, pairs, folder=tmp_path)
    for number, says in enumerate(
        (
            "train.learning_rate is 0.002 there and 0.001 here",
            "parallel.zero is 2 there and 0 here",
            "the transformer is ",
            "the transformer is ",
        )
    ):
        for rank in range(2):
            message, echoed = results[rank][number]
            assert message.startswith("process 1 is not of the same run as process 0: ")
            assert says in message
            assert echoed == (rank == 1)
    assert not (tmp_path / "run").exists()


def refused_of_each(pairs):
    """Train with this process' settings of each pair; return what is said, and whether another says it too."""
    found = []
    for pair in pairs:
        try:
            train.run(pair[torch.distributed.get_rank()])
        except FactoryError as error:
            found.append((str(error), error.echoed))
    return found
