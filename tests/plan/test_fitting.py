"""Which way a video is made in the memory that is free, and what is said of it."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.plan.fitting import ROOM, first_fit, fits, modes, report, savings, settle
from cogvideox_factory.plan.generation import Generation, need
from cogvideox_factory.shapes import clip_shape

GIB = 2**30
PAGE = Path(__file__).parents[2] / "docs" / "small_cards.md"


def numbers(name: str, **options) -> Generation:
    """Return a video of a published model's own size in bfloat16."""
    facts = PUBLISHED[name]
    shape = clip_shape(facts.transformer, num_frames=facts.num_frames, height=facts.height, width=facts.width)
    values = {
        "model": facts.transformer, "vae": facts.vae, "num_frames": shape.num_frames, "height": shape.height,
        "width": shape.width, "latent_frames": shape.latent_frames + shape.num_front_padding,
        "text_tokens": facts.transformer.max_text_seq_length, "item_bytes": 2,
    }  # fmt: skip
    return Generation(**values | options)


def settled(video: Generation, free: float | None, **options) -> Generation:
    asked = {"offload": "auto", "group": 4, "tiling": "auto", "accelerator": True}
    return settle(video, free=None if free is None else int(free * GIB), **asked | options)


def test_a_video_of_the_largest_published_model_is_possible_in_12_gb():
    video = numbers("cogvideox1.5-5b")
    assert (video.num_frames, video.height, video.width) == (81, 768, 1360)
    by_mode = {each.offload: need(each).device / GIB for each in modes(replace(video, tiling=True), group=4)}
    assert by_mode == pytest.approx({"none": 16.22, "model": 15.82, "group": 8.65, "block": 7.38}, abs=0.01)
    for free, offload in ((11.5, "group"), (9, "block")):  # of a card of 12 GB; and beside a desktop
        chosen = settled(video, free)
        assert (chosen.offload, chosen.tiling) == (offload, True)
        assert need(chosen).device < 12e9 * ROOM


@pytest.mark.parametrize("name", PUBLISHED)
def test_more_memory_never_makes_it_slower_and_what_is_chosen_fits(name):
    video, order = numbers(name), ["block", "group", "model", "none"]
    seen = []
    for free in range(1, 80):
        chosen = settled(video, free)
        if seen:
            assert fits(chosen, free * GIB) or chosen.offload == "block"
        if fits(chosen, free * GIB):
            seen.append((order.index(chosen.offload), not chosen.tiling))
    assert [offload for offload, _ in seen] == sorted(offload for offload, _ in seen)
    assert seen[-1] == (3, True), "on a large card nothing waits and pictures are decoded whole"
    assert seen[0][0] < 2, "on a small one blocks do"
    assert first_fit(video, GIB // 8, group=4) is None


def test_what_is_asked_for_is_what_is_done():
    video = numbers("cogvideox-5b")
    for offload in ("none", "model", "block", "group"):
        chosen = settled(video, 1, offload=offload, tiling=False)
        assert (chosen.offload, chosen.tiling, chosen.group) == (offload, False, 4 if offload == "group" else 1)
    assert settled(video, 1, accelerator=False).offload == "none"
    assert settled(video, 100, accelerator=False).tiling is False
    assert settled(video, 1, accelerator=False).tiling is True
    unknown = settled(video, None)
    assert (unknown.offload, unknown.tiling) == ("model", True)
    assert settled(replace(video, shards=4), 1).offload == "none"


def test_it_is_said_what_is_needed_and_which_way_would_fit():
    video = settled(numbers("cogvideox1.5-5b"), 11.5, offload="model", tiling=True)
    lines = report(video, free=int(11.5 * GIB), group=4, accelerator=True)
    assert re.search(
        r"about 15\.82 GiB at most: text 8\.89, denoising 15\.82, decoding 2\.58, and 10\.78 GiB of host", lines[0]
    )
    assert "(offload model, tiling True); 11.50 GiB are free" in lines[0]
    assert lines[1].endswith("may fail; --generate.offload group needs 8.65 GiB")
    assert len(report(video, free=int(24 * GIB), group=4, accelerator=True)) == 1
    tight = report(settled(video, 5), free=5 * GIB, group=4, accelerator=True)
    assert re.search(r"; --generate.num-frames 41 needs about \d\.\d\d GiB less", tight[1])


def test_advice_saves_what_it_says_and_repeats_nothing_that_is_set():
    video = numbers("cogvideox-5b", item_bytes=4, tiling=False)
    told = {setting: saved for saved, setting in savings(video, accelerator=True)}
    assert list(told.values()) == sorted(told.values(), reverse=True)
    for setting, other in (
        ("--run.dtype bfloat16", replace(video, item_bytes=2)),
        ("--generate.offload block", replace(video, offload="block")),
        ("--generate.base nf4", replace(video, base="nf4")),
        ("--sampling.tiling True", replace(video, tiling=True)),
    ):
        assert told[setting] == need(video).device - need(other).device > GIB, setting
    tight = numbers("cogvideox-5b", offload="block", tiling=True)
    assert [setting for _, setting in savings(tight, accelerator=True)] == ["--generate.num-frames 25"]
    on_cpu = [setting for _, setting in savings(video, accelerator=False)]
    assert not [setting for setting in on_cpu if "offload" in setting or "dtype" in setting]


@pytest.mark.parametrize(
    "options", [{"sequence": 2}, {"guidance": 2}, {"shards": 4}, {"base": "int8"}, {"guided": False}]
)
def test_what_is_divided_or_left_out_takes_less(options):
    video = numbers("cogvideox1.5-5b")
    assert need(replace(video, **options)).denoise < need(video).denoise


def test_adapters_count_where_they_are():
    video = numbers("cogvideox-5b")
    heavy = replace(video, adapter_bytes=42 * 1000)
    assert need(heavy).weights - need(video).weights == 42 * 1000
    by_block = replace(heavy, offload="block")
    assert need(by_block).weights - need(replace(video, offload="block")).weights == 2 * 1000
    assert need(by_block).host - need(replace(video, offload="block")).host == 42 * 1000


def test_the_page_says_what_is_computed():
    video = replace(numbers("cogvideox1.5-5b"), tiling=True)
    rows = [line.split("|")[1:-1] for line in PAGE.read_text().splitlines() if line.startswith("| `--generate.")]
    assert len(rows) >= 6
    for settings, card, host, _ in rows:
        words = dict(re.findall(r"--generate\.(offload|base) (\w+)", settings))
        told = need(replace(video, group=4 if words.get("offload") == "group" else 1, **words))
        assert card.strip() == f"{told.device / GIB:.1f}", settings
        assert host.strip() == (f"{told.host / GIB:.1f}" if told.host else ""), settings
