"""Steps that go wrong: named to clip and module, kept, skipped or answered by stopping; alike in all processes."""

import json

import numpy as np
import pytest
import torch

from cogvideox_factory.cli import main
from cogvideox_factory.data.loader import CacheSource
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.publish import remove_folder
from cogvideox_factory.recipe import check, read_recipe, write_recipe
from cogvideox_factory.step_records import Sample, Step, bad_among, too_many
from cogvideox_factory.torch_engine import loop, prepare, spikes, train
from cogvideox_factory.torch_engine.feed_forward import FeedForward
from tests.clips import draw_clips
from tests.torch_engine.processes import run_in
from tests.torch_engine.runs import assert_same, losses, weights_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    """Return a folder with six clips and their cache."""
    root = tmp_path_factory.mktemp("bad-steps")
    draw_clips(root / "clips", [(9, 64, 96)] * 6)
    prepare.run(settings(tiny_model, root, root))
    return root


def settings(tiny_model, folder, run, *, cached=True, parallel=None, **training):
    return check(
        {
            "model": {"path": str(tiny_model("cogvideox1.5-5b"))},
            "data": {"root": str(folder / "clips"), "fps": 8.0},
            "cache": {"dir": str(folder / "cache")} if cached else {},
            "run": {"device": "cpu", "dtype": "float32"},
            "train": {
                "method": "full", "dir": str(run), "steps": 6, "log_every": 3, "save_every": 3, "learning_rate": 1e-3,
                "batch_size": 2, "checkpointing": "save_attention",
            } | training,
            "parallel": parallel or {},
        },
        source="test",
    )  # fmt: skip


def rows(run, name):
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def spoil(monkeypatch, clip_id, value):
    """Let the latents of one clip hold a number like no other."""
    original = CacheSource.sample

    def sample(self, pick, draws):
        made = original(self, pick, draws)
        if pick.clip_id == clip_id:
            made["mean"] = made["mean"].copy()
            made["mean"][0, 0, 0, 0] = value
        return made

    monkeypatch.setattr(CacheSource, "sample", sample)


def clip_ids(folder):
    return sorted(row["id"] for row in rows(folder / "cache", "clips.jsonl"))


def test_a_clip_of_bad_latents_is_named_skipped_and_can_be_left_out(tiny_model, folder, tmp_path, monkeypatch, capsys):
    bad = clip_ids(folder)[2]
    spoil(monkeypatch, bad, float("inf"))
    run = train.run(settings(tiny_model, folder, tmp_path / "run"))
    quarantine = rows(run, "quarantine.jsonl")
    assert [row["clip"] for row in quarantine] == [bad, bad], "once an epoch, and none of the clips beside it"
    assert {row["reason"] for row in quarantine} == {"loss.nonfinite"}
    first = quarantine[0]["step"]
    said = capsys.readouterr().out
    assert f"SKIPPED step {first}: the loss is nan with " in said
    assert f"first not finite: mean of clip {bad}, before the model sees it; kept in" in said
    known = json.loads((run / "replay" / f"step-{first:06}.json").read_text())
    assert known["suspects"][0]["timestep"] == quarantine[0]["timestep"]
    assert rows(run, "metrics.jsonl")[-1]["skipped"] == 2
    assert all(np.isfinite(value).all() for value in weights_of(run).values())

    exclude = {"exclude": str(run / "quarantine.jsonl")}
    clean = train.run(settings(tiny_model, folder, tmp_path / "clean", **exclude))
    assert not (clean / "quarantine.jsonl").exists()
    assert bad not in {row["clip"] for row in rows(clean, "losses.jsonl")}
    train.run(settings(tiny_model, folder, tmp_path / "clean", steps=7, **exclude))
    with pytest.raises(FactoryError, match="data"):
        train.run(settings(tiny_model, folder, tmp_path / "clean", steps=7))


def test_the_first_bad_module_is_found_and_found_again_by_replay(tiny_model, folder, tmp_path, monkeypatch, capsys):
    original_step, original_forward, spoiled = loop.Loop._step, FeedForward.forward, []

    def step(self, number, batches):
        spoiled[:] = [self.objective.transformer.transformer_blocks[1].ff] if number == 4 else []
        original_step(self, number, batches)

    def forward(self, x, vectors, text_length):
        out = original_forward(self, x, vectors, text_length)
        return out * float("nan") if self in spoiled else out

    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", step)
        patch.setattr(FeedForward, "forward", forward)
        run = train.run(settings(tiny_model, folder, tmp_path / "run", log_every=1))
    known = json.loads((run / "replay" / "step-000004.json").read_text())
    assert known["first_not_finite"] == "the output of transformer_blocks.1.ff"
    assert (known["checkpoint"], known["reason"]) == ("checkpoint-000003", "loss.nonfinite")
    assert len(known["suspects"]) == 2
    assert len(losses(run)) == 6

    file = str(run / "replay" / "step-000004.json")
    assert main(["replay", file]) == 0
    assert "all is finite" in capsys.readouterr().out
    config = read_recipe(run / "config.yaml")  # as a run on a card that spares its memory leaves it
    for spared in ({"activation_offload": True, "optimizer_offload": True}, {"master_weights": "stochastic_bf16"}):
        write_recipe(run / "config.yaml", config.model_copy(update={"train": config.train.model_copy(update=spared)}))
        assert main(["replay", file, "--device", "cpu"]) == 0
        assert "all is finite" in capsys.readouterr().out
    remove_folder(run / "checkpoint-000003")
    assert main(["replay", file]) == 5
    assert f"--checkpoint with one of {run / 'checkpoint-000006'}." in capsys.readouterr().err
    assert main(["replay", file, "--checkpoint", str(run / "checkpoint-000006")]) == 0
    assert f"with the weights of {run / 'checkpoint-000006'}" in capsys.readouterr().out
    monkeypatch.setattr(FeedForward, "forward", lambda *args: original_forward(*args) * float("inf"))
    assert main(["replay", file, "--dtype", "float32", "--checkpoint", str(run / "checkpoint-000006")]) == 7
    assert "first not finite: the output of transformer_blocks.0.ff" in capsys.readouterr().out
    assert main(["replay", str(run / "config.yaml")]) == 5


def test_a_replayed_batch_is_the_batch_of_its_step(tiny_model, folder, tmp_path, monkeypatch, capsys):
    """A gradient that overflows in the backward pass alone; the loss of the replay is the loss of the step."""
    original = loop.Objective.__call__

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("inf")

    monkeypatch.setattr(loop.Objective, "__call__", lambda self, batch: Overflow.apply(original(self, batch)))
    with pytest.raises(NonFiniteError, match=r"the gradient norm is nan.*3 in a row") as stopped:
        train.run(settings(tiny_model, folder, tmp_path / "run", cached=False, log_every=1))
    assert stopped.value.exit_code == 7
    run = tmp_path / "run"
    assert not list(run.glob("checkpoint-*")), "nothing was learned and nothing is saved"
    known = json.loads((run / "replay" / "step-000001.json").read_text())
    assert known["first_not_finite"].startswith("the gradient that comes to the output of ")
    capsys.readouterr()
    assert main(["replay", str(run / "replay" / "step-000001.json")]) == 7
    said = capsys.readouterr().out
    for row in [row for row in rows(run, "losses.jsonl") if row["step"] == 1]:
        assert f"{row['clip']} at timestep {row['timestep']}: loss {row['loss']:.6g}" in said


def test_spikes_are_skipped_and_a_resumed_run_skips_the_same(tiny_model, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(spikes, "LEAST", 3)
    monkeypatch.setattr("cogvideox_factory.step_records.IN_A_ROW", 99)
    bad = clip_ids(folder)[4]
    original, original_step = loop.Objective.__call__, loop.Loop._step

    def spiking(self, batch):
        return original(self, batch) * (1e4 if bad in batch["clip_ids"] else 1.0)

    def dying(self, step, batches):
        if step == 8:
            raise RuntimeError("power cut")
        original_step(self, step, batches)

    monkeypatch.setattr(loop.Objective, "__call__", spiking)
    options = {"steps": 12, "spike_factor": 20.0, "log_every": 5, "save_every": 6}
    whole = train.run(settings(tiny_model, folder, tmp_path / "whole", **options))
    with monkeypatch.context() as patch:
        patch.setattr(loop.Loop, "_step", dying)
        with pytest.raises(RuntimeError, match="power cut"):
            train.run(settings(tiny_model, folder, tmp_path / "cut", **options))
    # Lines at other steps must not matter.
    cut = train.run(settings(tiny_model, folder, tmp_path / "cut", **options | {"log_every": 2}))
    assert_same(whole, cut)
    found = rows(whole, "quarantine.jsonl")
    assert {row["reason"] for row in found} == {"gradient.spike"}
    assert len({row["step"] for row in found}) >= 2
    assert found == rows(cut, "quarantine.jsonl")
    loose = train.run(settings(tiny_model, folder, tmp_path / "loose", **options | {"spike_factor": 1e9}))
    assert not (loose / "quarantine.jsonl").exists()


def train_spoiled(config, clip_id):
    """Train in a process of several, with one clip's latents spoilt."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, clip_id, float("nan"))
        train.run(config)


def test_all_processes_skip_what_one_of_them_met(tiny_model, folder, tmp_path):
    """ZeRO 3 over two, each with a clip of its own: the verdicts, rows and weights of one process."""
    bad = clip_ids(folder)[1]
    options = {"gradient_accumulation": 2, "steps": 3, "spike_factor": 1e6}
    train_spoiled(settings(tiny_model, folder, tmp_path / "one", **options), bad)
    many = settings(tiny_model, folder, tmp_path / "many", parallel={"zero": 3}, **options)
    run_in(2, train_spoiled, many, bad, folder=tmp_path)
    one, two = (rows(tmp_path / name, "losses.jsonl") for name in ("one", "many"))
    assert [row | {"loss": 0} for row in one] == [row | {"loss": 0} for row in two]
    np.testing.assert_allclose([float(row["loss"]) for row in one], [float(row["loss"]) for row in two], rtol=1e-5)
    assert rows(tmp_path / "one", "quarantine.jsonl") == rows(tmp_path / "many", "quarantine.jsonl")
    kept = sorted(path.name for path in (tmp_path / "many" / "replay").iterdir())
    known = json.loads((tmp_path / "many" / "replay" / kept[-1]).read_text())
    assert kept == [*known["files"], kept[-1]]
    assert known["first_not_finite"] == f"mean of clip {bad}, before the model sees it"
    for name, value in weights_of(tmp_path / "one").items():
        np.testing.assert_allclose(weights_of(tmp_path / "many")[name], value, rtol=1e-3, atol=1e-5)


def test_weights_that_are_not_finite_are_never_saved(tiny_model, folder, tmp_path, monkeypatch):
    original = loop.Update.step

    def step(self, rate):
        norm = original(self, rate)
        next(iter(self.masters.values())).data.view(-1)[0] = float("nan")
        return norm

    monkeypatch.setattr(loop.Update, "step", step)
    with pytest.raises(NonFiniteError, match="weights are not finite after step 1"):
        train.run(settings(tiny_model, folder, tmp_path / "run", save_every=1))
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_would_learn_nothing_is_refused(tiny_model, folder, tmp_path, monkeypatch):
    original = loop.Objective.__call__
    monkeypatch.setattr(loop.Objective, "__call__", lambda self, batch: original(self, batch) * 0)
    with pytest.raises(FactoryError, match="every gradient of step 1 is exactly 0"):
        train.run(settings(tiny_model, folder, tmp_path / "run"))


@pytest.mark.parametrize(
    ("text", "says"),
    [(None, "cannot be read"), ("{}\n", "line 1"), ('{"clip": "a"}\nb\n', "line 2")],
)
def test_a_list_of_clips_to_leave_out_must_be_one(tiny_model, folder, tmp_path, text, says):
    file = tmp_path / "list.jsonl"
    if text is not None:
        file.write_text(text)
    with pytest.raises(FactoryError, match=says):
        train.run(settings(tiny_model, folder, tmp_path / "run", exclude=str(file)))


def step_of(number=1, *, losses=(1.0, 2.0), norm=1.0, limit=float("inf")):
    samples = [Sample(clip_id=str(i), timestep=i, loss=loss) for i, loss in enumerate(losses)]
    return Step(number=number, bucket="9x64x96", samples=samples, norm=norm, limit=limit)


def test_what_is_bad_and_who_is_to_blame():
    nan, inf = float("nan"), float("inf")
    steps = [
        step_of(1), step_of(2, losses=(1.0, nan), norm=nan), step_of(3, norm=inf), step_of(4, norm=9.0, limit=8.0)
    ]  # fmt: skip
    found = bad_among(steps, loss_scale=None)
    assert [(bad.step.number, bad.reason) for bad in found] == [
        (2, "loss.nonfinite"), (3, "gradient.nonfinite"), (4, "gradient.spike")
    ]  # fmt: skip
    assert [len(bad.suspects) for bad in found] == [1, 2, 2]
    # In float16 a gradient that overflows only halves the scale, as long as there is something to halve.
    assert [bad.step.number for bad in bad_among(steps, loss_scale=2.0)] == [2, 4]
    assert [bad.step.number for bad in bad_among(steps, loss_scale=0.5)] == [2, 3, 4]


@pytest.mark.parametrize(
    ("numbers", "ends"),
    [
        ([5], False), ([5, 6], False), ([5, 6, 8], False), ([1, 5, 6, 7], True),
        (list(range(2, 20, 2)), False), (list(range(2, 22, 2)), True), ([*range(2, 20, 2), 1020], False),
    ],
)  # fmt: skip
def test_three_in_a_row_or_ten_of_late_are_too_many(numbers, ends):
    assert (too_many(numbers) is not None) == ends
