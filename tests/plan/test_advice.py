"""What fits on a machine, and how long it takes: against the formulas it is made of, and by hand."""

from dataclasses import replace

import pytest

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import LARGER, PUBLISHED
from cogvideox_factory.plan.advice import as_given, fitting, seconds
from cogvideox_factory.plan.flops import recomputed_flops, training_flops
from cogvideox_factory.plan.machine import Machine
from cogvideox_factory.plan.memory import Training, need

LORA = Training(model=PUBLISHED["cogvideox-5b"].transformer, video_tokens=17_550, text_tokens=226)
FULL = Training(
    model=PUBLISHED["cogvideox1.5-5b"].transformer, video_tokens=44_880, text_tokens=226, method="full",
    checkpointing="none",
)  # fmt: skip


def words(choices):
    return [" ".join(choice.settings) for choice in choices]


def test_what_fits_as_it_is_comes_first_and_everything_offered_fits():
    machine = Machine.of("RTX 4090")
    choices = fitting(LORA, machine)
    assert words(choices) == ["", "--train.checkpointing full"], "nothing recomputed does not fit, full is slower"
    assert choices[0].flops < choices[1].flops
    for cards, run in ((1, LORA), (8, FULL), (2, LORA), (8, LORA)):
        machine = Machine.of("H100", cards=cards)
        for choice in fitting(run, machine):
            assert need(choice.run).device <= machine.memory
            assert choice.run.processes == cards


@pytest.mark.parametrize("gib", [6, 8, 12, 16, 24, 48, 80])
def test_less_memory_never_makes_it_faster(gib):
    larger = fitting(LORA, Machine.of("any", memory_gib=gib * 1.5))
    smaller = fitting(LORA, Machine.of("any", memory_gib=gib))
    assert larger
    if smaller and not any("offload" in w or "swapped" in w or "base" in w for w in words(smaller)):
        assert smaller[0].flops >= larger[0].flops


def test_host_memory_and_rounding_are_last_resorts():
    assert not any("swapped" in w or "base" in w for w in words(fitting(LORA, Machine.of("L4"))))
    twelve = words(fitting(LORA, Machine.of("any", memory_gib=12)))
    assert twelve[0] == "--train.checkpointing full --train.swapped-blocks 42"
    assert not any("base" in w for w in twelve), "no weight is rounded where moving it is enough"
    assert fitting(LORA, Machine.of("any", memory_gib=3)) == []


def test_what_a_recipe_of_that_kind_refuses_is_not_offered():
    tight = Machine.of("any", memory_gib=16)
    assert any("offload" in w or "base" in w for w in words(fitting(replace(LORA, checkpointing="none"), tight)))
    for gib in (5, 8, 12, 16):
        offered = words(fitting(replace(LORA, compiled=True), Machine.of("any", memory_gib=gib)))
        assert not any("activation-offload" in w or "base" in w for w in offered)
    eight, came = replace(FULL, optimizer="adamw8bit"), replace(FULL, optimizer="came")
    for run, halves in ((eight, True), (came, True), (replace(eight, bfloat16=False), False)):
        offered = [w for w in words(fitting(run, Machine.of("any", memory_gib=56))) if "stochastic" in w]
        assert bool(offered) == halves
        assert run is eight or all("--train.optimizer adamw8bit" in w for w in offered)


def test_full_fine_tuning_of_a_large_model_is_divided():
    choices = fitting(replace(FULL, model=LARGER["20b"]), Machine.of("H100", cards=8))
    assert choices
    assert all("--parallel.zero" in w for w in words(choices))
    best = choices[0]
    groups = 8 // best.run.sequence
    assert f"--train.batch-size {groups}" in best.settings


def test_time_is_arithmetic_over_a_share_of_the_peak():
    machine = Machine.of("A100")
    run = replace(FULL, checkpointing="full")
    shape = {"video_tokens": run.video_tokens, "text_length": run.text_tokens}
    flops = training_flops(run.model, **shape, method="full")
    again = recomputed_flops(run.model, **shape, checkpointing="full", layers=42)
    assert 0.3 < again / flops < 1 / 3, "nearly a forward pass on top of three"
    less = recomputed_flops(run.model, **shape, checkpointing="save_attention", layers=42)
    assert less < again
    assert recomputed_flops(run.model, **shape, checkpointing="full", layers=21) == again // 2
    choice = as_given(run, passes=2)
    assert choice.flops == 2 * (flops + again)
    assert seconds(choice, machine, half=True, utilisation=0.5) == pytest.approx(2 * (flops + again) / (312e12 * 0.5))
    assert seconds(choice, machine, half=False, utilisation=0.5) == pytest.approx(2 * (flops + again) / (19.5e12 * 0.5))
    assert seconds(choice, Machine.of("any", memory_gib=80), half=True) is None


def test_an_unknown_card_needs_its_memory():
    with pytest.raises(FactoryError, match=r"card 'H10' is not known .*H100.*--memory-gib"):
        Machine.of("H10")
    assert Machine.of("h100").card == "H100"
    assert Machine.of("H10", memory_gib=10).memory < 10 * 2**30
