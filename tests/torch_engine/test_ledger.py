"""What a line says of the steps since the last one, against sums made by hand."""

import math

import pytest
import torch

from cogvideox_factory.data.loader import Draws
from cogvideox_factory.data.sampler import Sampler
from cogvideox_factory.ranks import Layout
from cogvideox_factory.step_records import Sample, Step, Work, averages, sample_rows
from cogvideox_factory.torch_engine.ledger import Ledger
from cogvideox_factory.torch_engine.ranks import Ranks

CLIPS = [f"clip-{index}" for index in range(12)]
BUCKETS = {clip: "9x64x96" if index < 8 else "9x96x64" for index, clip in enumerate(CLIPS)}


class Fake(Ranks):
    """One of several processes, whose sums a test makes."""

    __slots__ = ()


def noted(ranks, rank, sampler, draws, num_steps):
    """The losses of a rank: 100 * step + place in the global batch."""
    ledger = Ledger(sampler, draws, num_micros=2, ranks=ranks)
    for step in range(1, num_steps + 1):
        places = torch.arange(len(sampler.batch(step - 1)), dtype=torch.float32).view(
            2, ranks.layout.num_data_ranks, -1
        )
        ledger.note(step, list(100.0 * step + places[:, rank]), torch.tensor(float(step)), torch.tensor(math.inf))
    return ledger


@pytest.mark.parametrize(("size", "sequence"), [(1, 1), (2, 1), (4, 2)])
def test_every_sample_keeps_its_loss_clip_and_timestep(size, sequence, monkeypatch):
    sampler = Sampler(CLIPS, batch_size={"9x64x96": 4, "9x96x64": 8}, seed=0, buckets=BUCKETS)
    draws, layout = Draws(seed=0), Layout(size=size, sequence=sequence)
    sent = []
    for rank in range(size):
        ledger = noted(Fake(layout=layout, rank=rank), rank // sequence, sampler, draws, 6)
        monkeypatch.setattr(Fake, "mean", lambda self, x: sent.append(x) or x)
        ledger.fetch(torch.tensor(7.0))
    total = sum(sent) / size
    monkeypatch.setattr(Fake, "mean", lambda self, x: total)
    steps, extras = noted(Fake(layout=layout), 0, sampler, draws, 6).fetch(torch.tensor(7.0))
    assert extras == [7.0]
    assert len({step.bucket for step in steps}) == 2
    for step in steps:
        picks = sampler.batch(step.number - 1)
        assert [sample.clip_id for sample in step.samples] == [pick.clip_id for pick in picks]
        assert [sample.loss for sample in step.samples] == [100.0 * step.number + place for place in range(len(picks))]
        drawn = [draws.sample(pick, (1, 1, 1, 1))["timesteps"] for pick in picks]
        assert [sample.timestep for sample in step.samples] == drawn
        assert (step.norm, step.limit) == (float(step.number), math.inf)


def step_of(number, bucket, *pairs, norm=1.0):
    samples = [Sample(clip_id=f"clip-{t}", timestep=t, loss=loss) for t, loss in pairs]
    return Step(number=number, bucket=bucket, samples=samples, norm=norm, limit=math.inf)


STEPS = [
    step_of(1, "a", (0, 1.0), (249, 3.0)), step_of(2, "b", (250, 5.0), (999, 7.0), norm=3.0),
    step_of(3, "b", (600, math.nan), norm=math.nan),
]  # fmt: skip


def test_means_by_part_of_the_schedule_and_by_shape_leave_out_what_is_not_finite():
    assert averages(STEPS[:2], by_bucket=True) == {
        "loss": 4.0, "grad_norm": 2.0, "loss/t0-250": 2.0, "loss/t250-500": 5.0, "loss/t750-1000": 7.0,
        "loss/bucket/a": 2.0, "loss/bucket/b": 6.0,
    }  # fmt: skip
    with_bad = averages(STEPS, by_bucket=False)
    assert (with_bad["loss"], with_bad["grad_norm"]) == (4.0, 2.0)
    assert not any(name.startswith("loss/bucket") for name in with_bad)


def test_rows_are_the_last_samples_and_no_more_than_asked():
    assert [row["timestep"] for row in sample_rows(STEPS, 2)] == [999, 600]
    assert sample_rows(STEPS, 0) == []
    assert sample_rows(STEPS, 99)[0] == {"step": 1, "clip": "clip-0", "bucket": "a", "timestep": 0, "loss": 1.0}


def test_rates_are_of_all_cards_for_tokens_and_of_one_for_flops():
    work = Work(tokens={"a": 10, "b": 100}, flops={"a": 10**12, "b": 4 * 10**12}, num_cards=2, peak_tflops=20.0)
    # Two steps of half a second: 2 x 10 + 2 x 100 tokens, (2 x 1 + 2 x 4) TFLOP.
    assert work.rates(STEPS[:2], 0.5) == {"tokens_per_second": 220.0, "tflops_per_card": 5.0, "mfu": 0.25}
    unknown = Work(tokens={"a": 1}, flops={"a": 1}, num_cards=1, peak_tflops=None)
    assert "mfu" not in unknown.rates(STEPS[:1], 1.0)
