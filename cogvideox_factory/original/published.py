"""What the original published of its speed and memory, beside what ours needs by calculation."""

from collections.abc import Iterator
from dataclasses import dataclass

from cogvideox_factory.models import LARGER, PUBLISHED, TransformerConfig
from cogvideox_factory.plan.flops import training_flops
from cogvideox_factory.plan.memory import Training, peak_of_one_pass

VIDEO_TOKENS, TEXT_TOKENS = 10 * 48 * 85, 224  # of 77 x 768 x 1360


@dataclass(frozen=True, slots=True)
class Row:
    """One run of the original's table: full fine-tuning, 1.5 text to video, ZeRO 3, bf16, one clip a group."""

    size: str
    cards: int
    sequence: int
    vae_cache: bool
    seconds: float
    gigabytes: float


PUBLISHED_ROWS = (
    Row("5B", 8, 1, True, 39.23, 35.6),
    Row("5B", 8, 2, True, 20.9, 19.9),
    Row("5B", 8, 4, True, 10.1, 14.6),
    Row("5B", 8, 8, True, 5.16, 8.2),
    Row("5B", 16, 8, True, 5.24, 6.3),
    Row("5B", 8, 1, False, 49.0, 40.0),
    Row("5B", 8, 8, False, 10.58, 9.3),
    Row("10B", 8, 4, True, 15.2, 25.6),
    Row("20B", 8, 4, True, 20.1, 35.7),
    Row("30B", 8, 4, True, 26.5, 47.3),
)
"""From its README: Ascend Atlas 800T A2, jit_level O1, Disney data set."""


def compared() -> Iterator[tuple[str, ...]]:
    """Yield each published row beside ours: memory of the same layout and TFLOP a card and step, both calculated.

    Ours is what fits the original's figures best: bfloat16 weights and moments, attention outputs kept.
    """
    for row in PUBLISHED_ROWS:
        model = _model(row.size)
        run = Training(
            model=model, video_tokens=VIDEO_TOKENS, text_tokens=TEXT_TOKENS, method="full", stochastic=True,
            processes=row.cards, sequence=row.sequence, zero=3,
        )  # fmt: skip
        flops = training_flops(model, video_tokens=VIDEO_TOKENS, text_length=TEXT_TOKENS, method="full")
        tera = flops / row.sequence / 1e12
        yield (
            row.size, str(row.cards), f"{row.cards // row.sequence} x {row.sequence}", "yes" if row.vae_cache else "no",
            f"{row.seconds:g}", f"{row.gigabytes:g}", f"{peak_of_one_pass(run) / 1e9:.1f}" if row.vae_cache else "",
            f"{tera:,.0f}", f"{tera / row.seconds:.0f}",
        )  # fmt: skip


def _model(size: str) -> TransformerConfig:
    return PUBLISHED["cogvideox1.5-5b"].transformer if size == "5B" else LARGER[size.lower()]
