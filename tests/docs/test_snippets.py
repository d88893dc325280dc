"""Every command of the pages runs as written (in the small), or says why it does not and is read by the parser."""

import importlib
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from cogvideox_factory import supervise
from cogvideox_factory.cli import COMMANDS, main
from cogvideox_factory.cli.engine import require_able
from cogvideox_factory.config import Config
from tests.docs.conftest import small
from tests.docs.snippets import (
    CHINESE,
    ENGLISH,
    PAGES,
    ROOT,
    anchors_of,
    blocks_of,
    commands_of,
    factory_words,
    links_of,
    skeleton,
    tables_of,
)

BLOCKS = [block for page in ENGLISH for block in blocks_of(page)]  # a translation has the same ones
SHELL = [block for block in BLOCKS if block.language == "sh"]
MAKE = (ROOT / "Makefile").read_text()


@pytest.mark.parametrize("page", [p for p in ENGLISH if any(b.page == p and not b.reason for b in SHELL)], ids=str)
def test_commands_run_as_written(page, in_workshop):
    for block in (b for b in SHELL if b.page == page and not b.reason):
        for words in commands_of(block):
            carry_out(words, in_workshop)


def carry_out(words: list[str], folder: Path) -> None:
    """Run a command of a page."""
    ours = factory_words(words)
    if ours is not None:
        assert words[0] == "cogvideox", f"{words[0]} starts many processes: say why it is not run"
        assert main(small(ours)) == 0, " ".join(words)
    elif words[-1].startswith("./scripts/"):
        variables = dict(word.split("=", 1) for word in words[:-1])
        done = subprocess.run(
            ["bash", words[-1]],
            env=os.environ | {"PYTHON": "echo"} | variables,
            capture_output=True,
            text=True,
            check=True,
        )
        assert "cogvideox_factory" in done.stdout, words  # what it would start, of which tests/original holds each word
    elif words[0] == "make":
        assert re.search(rf"^{words[1]}:", MAKE, re.MULTILINE), words
    elif words[0] == "pip":
        extra = re.search(r"\[(\w+)\]", words[-1])
        assert extra, words
        assert f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text(), words
    else:
        assert words == ["source", ".venv/bin/activate"], f"what is {words}?"


def load_torch(config: Config, module: str, *, sections: tuple[str, ...]):
    """Refuse what the engine asked for would refuse, and take the one that is here."""
    require_able(config, sections)
    return importlib.import_module(f"cogvideox_factory.torch_engine.{module}")


@pytest.mark.parametrize("block", [block for block in SHELL if block.reason], ids=str)
def test_commands_for_other_machines_are_read(block, in_workshop, monkeypatch):
    """Their settings are checked as on the machine they are for; only the work is not done."""
    for name in ("train", "generate"):
        module = importlib.import_module(f"cogvideox_factory.torch_engine.{name}")
        monkeypatch.setattr(module, "run", lambda config: None)
    for name in ("train", "generate", "prepare"):
        monkeypatch.setattr(f"cogvideox_factory.cli.{name}.load_engine", load_torch)
    monkeypatch.setattr(supervise.Supervisor, "run", lambda self: 0)
    (in_workshop / "runs").mkdir(exist_ok=True)
    if block.text.startswith("#!"):
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
        return
    for words in commands_of(block):
        ours = factory_words(words)
        if ours is None or ours[0] not in ("train", "generate", "prepare", "launch") or "..." in words:
            continue
        if ours[0] == "launch" or Path(ours[1]).exists():  # a run of such a machine is not there
            assert main(small(ours) if ours[0] == "prepare" else ours) == 0, " ".join(words)


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "python"], ids=str)
def test_python_runs_as_written(block, in_workshop):
    exec(compile(block.text, str(block), "exec"), {})  # noqa: S102


def test_every_block_says_what_it_is():
    for block in BLOCKS:
        if block.reason and "tests/" in block.reason:
            assert (ROOT / block.reason.split("; ")[1]).is_file(), f"{block} is held by {block.reason}"
    strays = [str(block) for block in BLOCKS if block.language not in ("sh", "python", "yaml", "text", "json")]
    assert not strays
    for block in BLOCKS:
        if block.language == "yaml":
            assert yaml.safe_load(block.text)


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_settings_and_commands_that_a_page_names_exist(page):
    """Whether in a block or in the text."""
    text = page.read_text(encoding="utf-8")
    for section, field in re.findall(r"--([a-z]+)\.([a-z][a-z0-9_-]*)", text):
        kind = Config.model_fields.get(section)
        fields = getattr(kind.annotation, "model_fields", {}) if kind else {}
        assert field.replace("-", "_") in fields or section == "prepare", f"--{section}.{field}"
    for command in re.findall(r"`cogvideox ([a-z][a-z-]*)", text):
        assert command in COMMANDS, command
    for file, anchor in links_of(page):
        assert file.exists(), f"{page.name} links {file}"
        assert not anchor or anchor in anchors_of(file), f"{page.name} links {file.name}#{anchor}"


@pytest.mark.parametrize("page", sorted(CHINESE), ids=str)
def test_the_chinese_page_has_what_the_english_page_has(page):
    """All but prose is the same; a table that code writes in English may stay behind a link."""
    chinese = CHINESE[page]
    assert chinese.exists(), f"{chinese.relative_to(ROOT)} is missing: every English page has a translation"
    kept = skeleton(chinese)
    for part, parts in skeleton(page).items():
        assert kept[part] == parts, f"{part} of {chinese.relative_to(ROOT)} are not those of {page.name}"
    files = [file for file, _ in links_of(chinese)]
    assert files[:1] == [page], "the first line leads to the English page"
    lost = {CHINESE.get(file, file) for file, _ in links_of(page)} - {*files, chinese}
    assert not lost, f"links of {page.name} that its translation has not: {lost}"
    tables = tables_of(page)
    copies = {name: table for name, table in tables.items() if name in tables_of(chinese)}
    assert tables_of(chinese) == copies, "written by code: copy them again"
    assert files.count(page) > len(tables) - len(copies), "a table is neither there nor behind a link"
