"""Command lines of the older trainers: `cogvideox train --original text-to-video-sft` and their flags.

They become the words of a command of ours, which is printed, so that it can be typed the next time.
"""

import os
import shlex
from operator import attrgetter
from typing import Any

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.launcher import num_processes, rank_of
from cogvideox_factory.metrics import say

_SHARD = "prepare.shard"
"""A flag of `prepare` alone, which no recipe holds."""


def expand(command: str, argv: list[str], *, launched: int | None = None) -> list[str]:
    """Return `argv` in words of ours if it begins with `--original`, else as it is.

    With `launched` they are those of so many processes that are yet to be started, and nothing is printed.

    Raises:
        FactoryError: `--original` elsewhere, or whatever `translate` finds.
        SystemExit: `--help` (0).
    """
    name, words = _asked(argv)
    if name is None:
        if stray := next((word for word in argv if word.partition("=")[0] == "--original"), None):
            raise FactoryError(f"{stray} must come first, without a recipe: cogvideox {command} --original NAME …")
        return argv
    # Imported only here: most command lines are not theirs.
    from cogvideox_factory.original.page import listing
    from cogvideox_factory.original.translate import find_script, translate

    script, origin = find_script(name, command)
    if "--help" in words or "-h" in words:
        print(listing(script))
        raise SystemExit(0)
    rank, size = rank_of(os.environ), num_processes(os.environ)
    found = translate(script, words, origin=origin, num_processes=launched or size, rank=rank)
    ours = [*_words(found.settings), *found.ours]
    if rank == 0 and launched is None:
        for line in found.said:
            say(line)
        where = f", for {size} processes" if size > 1 else ""
        say(f"the same command in this project's own words{where}:\n  {shlex.join(['cogvideox', command, *ours])}")
    return ours


def _asked(argv: list[str]) -> tuple[str | None, list[str]]:
    first = argv[0] if argv else ""
    if first.startswith("--original="):
        return first.partition("=")[2], argv[1:]
    if first == "--original":
        return (argv[1], argv[2:]) if len(argv) > 1 else ("", [])
    return None, argv


def _words(settings: dict[str, Any]) -> list[str]:
    """Return the flags for all settings that are not at their default."""
    words = []
    for name, value in settings.items():
        if value is not None and (name == _SHARD or value != attrgetter(name)(Config())):
            words += [f"--{name.replace('_', '-')}", *map(str, value if isinstance(value, list) else [value])]
    return words
