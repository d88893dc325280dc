"""`cogvideox doctor CACHE`: whether every entry of a cache is the one that was written."""

from pathlib import Path
from typing import Annotated

import tyro
from pydantic import BaseModel, ConfigDict

from cogvideox_factory.data import cache_check
from cogvideox_factory.data.cache_check import Audit, audit_cache, report_json, set_aside
from cogvideox_factory.data.reasons import printable
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.metrics import console, progress_bar, say
from cogvideox_factory.publish import publish_text

DESCRIPTION = """Read every entry of a cache whole: checksum, header, shapes, finite numbers, against what clips.jsonl
and cache.json say. Every file ends in one state: ok, missing, damaged, orphan (a good entry the list does not name),
foreign (no file of ours), temp-left (of a writer that died). Exit code 5 if anything is damaged or missing. Your clips
are not looked at."""
_MAX_PRINTED = 20


class CacheDoctor(BaseModel):
    """What doctor is asked of a cache."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    json_file: Annotated[str | None, tyro.conf.arg(name="json")] = None
    """Write the whole report here: counts, one entry a file that is not ok."""
    fix: bool = False
    """Move what is damaged to CACHE/set-aside/ and remove what dead writers left; the next prepare makes exactly the
    missing entries again. Foreign files and your clips stay as they are."""
    orphans: bool = False
    """With --fix: move orphans there too. They are good entries, of other settings or of rows that were taken out, and
    a run that goes back to those would have to make them again."""


def run(argv: list[str]) -> None:
    """Look at the cache `argv[0]`, print, write and mend as asked.

    Raises:
        FactoryError: the folder is no cache.
        UnfitError: something is damaged or missing.
    """
    folder = Path(argv[0])
    ask = tyro.cli(
        CacheDoctor, args=argv[1:], prog="cogvideox doctor CACHE", description=DESCRIPTION,
        config=(tyro.conf.FlagConversionOff,),
    )  # fmt: skip
    if not cache_check.is_cache(folder):
        raise FactoryError(
            f"{folder} is a folder and neither a cache nor a run with checkpoints. A data set is looked at with "
            f"--data.root {folder} (and a size: --model.path, or a recipe first)."
        )
    if ask.orphans and not ask.fix:
        raise FactoryError("--orphans True moves files, as a part of --fix True; give both")
    with progress_bar("reading entries", sum(1 for _ in folder.glob("*/??/*.safetensors"))) as advance:
        audit = audit_cache(folder, on_file=advance)
    _print(audit)
    moved = set_aside(audit, orphans=ask.orphans) if ask.fix else []
    if ask.fix:
        say(f"moved to {folder / cache_check.ASIDE}: {len(moved)} files; remove that folder when you do not need it")
    if ask.json_file:
        publish_text(Path(ask.json_file), report_json(audit, moved))
        say(f"report: {ask.json_file}")
    _require_good(audit, fixed=ask.fix)


def _print(audit: Audit) -> None:
    """Print the counts, then what is not ok, the worst first."""
    from rich.table import Table

    counts = Table("state", "files", title=str(audit.folder), title_justify="left")
    for state, count in audit.counts().items():
        counts.add_row(state, str(count))
    counts.add_section()
    counts.add_row("total", str(len(audit.findings)))
    console.print(counts)
    shown = [finding for state in cache_check.STATES[1:] for finding in audit.of(state)]
    for finding in shown[:_MAX_PRINTED]:
        rows = f", row{'s' * (len(finding.rows) > 1)} {', '.join(map(str, finding.rows[:5]))}" if finding.rows else ""
        detail = f": {printable(finding.detail)}" if finding.detail else ""
        say(f"  {finding.state} {printable(finding.file)}{rows}{detail}")
    if len(shown) > _MAX_PRINTED:
        say(f"  … and {len(shown) - _MAX_PRINTED} more; --json FILE has all")


def _require_good(audit: Audit, *, fixed: bool) -> None:
    bad = audit.of(cache_check.DAMAGED, cache_check.MISSING)
    if not bad:
        return
    way = (
        "Run `cogvideox prepare` again: it makes exactly what is not there."
        if fixed or not audit.of(cache_check.DAMAGED)
        else "Run this again with --fix True, then `cogvideox prepare`: it makes exactly what is not there."
    )
    rows = len({row for finding in bad for row in finding.rows})
    raise UnfitError(f"the cache {audit.folder} has {len(bad)} bad files, which {rows} rows need. {way}")
