"""The fenced blocks of the pages, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block; `reason` says why its commands are not run, if so."""

    page: Path
    language: str
    text: str
    reason: str | None

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}: {self.text.splitlines()[0]}"


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [Block(page, m["language"], m["text"], m["reason"]) for m in _BLOCK.finditer(text)]


def commands_of(block: Block) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def factory_words(words: list[str]) -> list[str] | None:
    """Return what `cogvideox` gets of a command, started by itself or by torchrun; None for other programs."""
    if words[0] == "cogvideox":
        return words[1:]
    if words[0] == "torchrun" and "cogvideox_factory" in words:
        return words[words.index("cogvideox_factory") + 1 :]
    return None
