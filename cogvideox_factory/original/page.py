"""The table of flags, for a terminal and for `docs/original.md`."""

import re
from collections.abc import Iterable
from textwrap import wrap

from cogvideox_factory.original.flag import BOTH, PYTORCH, Flag, Script
from cogvideox_factory.original.modes import MEANINGS
from cogvideox_factory.original.published import compared
from cogvideox_factory.original.translate import SCRIPTS, WAYS

_TABLES = {
    "training": SCRIPTS["text-to-video-sft"].flags,
    "preparation": SCRIPTS["prepare-dataset"].flags,
    "inference": SCRIPTS["infer"].flags,
}
_MARK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def listing(script: Script) -> str:
    """Return what `--original NAME --help` prints."""
    lines = [f"usage: cogvideox {script.command} --original {script.name} FLAGS [--section.setting VALUE ...]", ""]
    for flag in script.flags:
        if script.is_for(flag):
            default = "" if flag.default in (None, False) else f" (default {_text(flag.default)})"
            lines += [
                f"  --{flag.name}{default}",
                *wrap(_fate(flag), 108, initial_indent=" " * 8, subsequent_indent=" " * 8),
            ]
    return "\n".join(lines)


def update(text: str) -> str:
    """Return a page with every table between `<!-- table: NAME -->` and `<!-- end -->` as the code has it."""
    return _MARK.sub(lambda match: f"{match[1]}{_table(match[2])}{match[3]}", text)


def _table(name: str) -> str:
    if name == "published":
        header = (
            "model",
            "cards",
            "DP x SP",
            "VAE cache",
            "s/step",
            "GB a card",
            "ours: GB a card",
            "TFLOP",
            "TFLOP/s",
        )
        return _markdown(header, compared())
    if name == "modes":
        rows = [(f"`{row.flag} {row.value}`", row.theirs, row.here) for row in MEANINGS]
        return _markdown(("flag", "with MindSpore", "here"), rows)
    if name == "ways":
        rows = [(text.partition(";")[0], f"`{s} {v}`", text.partition("; ")[2]) for s, v, text in WAYS]
        return _markdown(("without a flag", "taken over as", "better"), rows)
    rows = [(f"`{_names(flag)}`", _default(flag), _fate(flag)) for flag in _TABLES[name]]
    return _markdown(("flag", "default", "here"), rows)


def _markdown(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _names(flag: Flag) -> str:
    return ", ".join((flag.name, *flag.also))


def _default(flag: Flag) -> str:
    default = "" if flag.default is None or flag.default is False else _text(flag.default)
    if flag.pytorch_default is not None and flag.origin == BOTH:
        default = f"{default or 'none'}; PyTorch: {_text(flag.pytorch_default)}"
    return default if len(default) < 80 else f"{default[:60].rsplit(' ', 1)[0]} …"


def _text(value: object) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _fate(flag: Flag) -> str:
    note = flag.note
    if flag.fate == "inert":
        text = f"no effect: {note}"
    elif flag.fate == "refused":
        text = f"refused: {note}"
    else:
        settings = ", ".join(f"`{name}`" for name in flag.setting.split(", ") if name)
        text = "; ".join(part for part in (settings, note) if part)
    if flag.only:
        text += f" ({'LoRA' if flag.only == 'lora' else 'image-to-video'} only)"
    if flag.origin == PYTORCH:
        text += " (PyTorch only)"
    return text
