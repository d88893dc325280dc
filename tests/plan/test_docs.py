"""The figures of docs/small_cards.md and docs/optimizers.md are those of the code."""

import re
from pathlib import Path

import pytest

from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.plan.memory import Training, need
from cogvideox_factory.plan.optimizer import optimizer_memory

DOCS = Path(__file__).parents[2] / "docs"
GIB = 2**30
FLAGS = {
    "checkpointing": str, "checkpointing-layers": int, "base": str, "swapped-blocks": int,
    "activation-offload": lambda text: text == "True",
}  # fmt: skip


def rows(file, header):
    """Cells of the rows of the table that begins with `header`."""
    text = (DOCS / file).read_text().split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def options_of(words):
    found = {"checkpointing": "full"} if "`full`" in words or words.startswith("and ") else {}
    for name, value in re.findall(r"--(?:train|lora)\.([\w-]+) (\w+)", words):
        found[name.replace("-", "_")] = FLAGS[name](value)
    return found


@pytest.mark.parametrize("cells", rows("small_cards.md", "settings"), ids=lambda cells: cells[0])
def test_memory_of_a_small_card_is_what_the_plan_says(cells):
    model = PUBLISHED["cogvideox-5b"].transformer
    tokens = (49 - 1) // 4 * 30 * 45 + 30 * 45
    wanted = need(Training(model=model, video_tokens=tokens, text_tokens=226, **options_of(cells[0])))
    assert cells[1] == f"{wanted.device / GIB:.1f}"
    assert (cells[2] or "0.0") == f"{wanted.host / GIB:.1f}"


@pytest.mark.parametrize("cells", rows("optimizers.md", "`--train.optimizer`"), ids=lambda cells: cells[0])
def test_bytes_of_an_optimizer_are_what_the_plan_says(cells):
    name = cells[0].split("`")[1]
    memory = optimizer_memory(name, [(3072, 3072)], half=False)
    total = memory.weights + memory.gradients + memory.masters + memory.state
    assert cells[1] == f"{total / 3072**2:.0f}"
