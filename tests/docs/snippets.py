"""The fenced blocks of the pages, the commands in them, and what a translated page keeps of its original."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *(ROOT / "docs").rglob("*.md")])
CHINESE = {ROOT / "README.md": ROOT / "README_zh.md"} | {
    page: page.parent / "zh" / page.name for page in (ROOT / "docs").glob("*.md") if not page.name.startswith("faults")
}
"""Each page and its translation; `faults.md` and `faults-mindspore.md` are written by a program."""
ENGLISH = [page for page in PAGES if page not in CHINESE.values()]

_BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]+) -->\n)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_TABLE = re.compile(r"^<!-- table: (?P<name>\w+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)
_LINK = re.compile(r"\]\(([^):\s]+)\)")


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
    """Return what `cogvideox` gets of a command, started by itself or by a launcher; None for other programs."""
    if words[0] == "cogvideox":
        return words[1:]
    if words[0] in ("torchrun", "msrun") and "cogvideox_factory" in words:
        return words[words.index("cogvideox_factory") + 1 :]
    return None


def tables_of(page: Path) -> dict[str, str]:
    """Return the tables that code writes into a page, by name."""
    return {match["name"]: match[0] for match in _TABLE.finditer(page.read_text(encoding="utf-8"))}


def anchors_of(page: Path) -> set[str]:
    """Return what a link may name after `#`, as GitHub makes it of the headings."""
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for _, heading in _HEADING.findall(text)}


def links_of(page: Path) -> list[tuple[Path, str]]:
    """Return the file and the anchor of every link that stays in the repository."""
    links = [link.partition("#") for link in _LINK.findall(_BLOCK.sub("", page.read_text(encoding="utf-8")))]
    return [((page.parent / file).resolve() if file else page, anchor) for file, _, anchor in links]


def skeleton(page: Path) -> dict[str, list]:
    """Return what a page and its translation have in common: all that is not prose, without tables that code writes."""
    text = _TABLE.sub("", page.read_text(encoding="utf-8"))
    prose = _BLOCK.sub("", text)
    lines = prose.splitlines()
    return {
        "blocks": [(block.language, block.text, block.reason) for block in blocks_of(page)],
        "levels of headings": [len(marks) for marks, _ in _HEADING.findall(prose)],
        "columns of table rows": [line.count(" |") for line in lines if line.startswith("|")],
        "settings": sorted(set(re.findall(r"--[a-z]+\.[a-z][a-z_-]*", text))),
        "numbers": sorted(set(re.findall(r"\d+(?:[.,]\d+)*", prose))),
        "code": sorted({" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose)}),
    }
