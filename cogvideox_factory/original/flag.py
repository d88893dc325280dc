"""One flag of the older trainers, what was typed, and what becomes of it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from cogvideox_factory.errors import FactoryError, nearest

Kind = Literal["text", "integer", "integers", "number", "switch", "truth"]
"""text, integer, number: one word. integers: one or more. switch: no word. truth: True or False."""
MINDSPORE, PYTORCH = "mindspore", "pytorch"
BOTH = "both"


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A row of the table."""

    name: str
    kind: Kind
    origin: str = BOTH
    """Which of the two has it."""
    default: Any = None
    """What it is where it is not typed; None is nothing."""
    pytorch_default: Any = None
    """The same in the PyTorch trainers, where that differs."""
    also: tuple[str, ...] = ()
    """Other names it has had."""
    choices: tuple[str, ...] = ()
    fate: Literal["setting", "inert", "refused"]
    setting: str = ""
    """Settings it decides."""
    note: str = ""
    """How; or why it has no effect; or what to do in its place."""
    only: Literal["", "t2v", "i2v", "lora", "full"] = ""
    """The task or method it is for; elsewhere it has no effect."""
    by: Callable[["Given"], None] | None = None
    """What decides several settings from several flags; None gives the one setting the value."""


def same(name: str, kind: Kind, setting: str, default: Any = None, note: str = "", **more: Any) -> Flag:
    """Return a flag that is a setting of ours under another name."""
    return Flag(name=name, kind=kind, fate="setting", setting=setting, default=default, note=note, **more)


def joint(
    name: str, kind: Kind, setting: str, by: Callable[["Given"], None], default: Any = None, note: str = "", **more: Any
) -> Flag:
    """Return a flag whose setting depends on other flags, or is another number."""
    return Flag(name=name, kind=kind, fate="setting", setting=setting, default=default, note=note, by=by, **more)


def inert(name: str, kind: Kind, why: str, default: Any = None, **more: Any) -> Flag:
    """Return a flag that changes nothing here."""
    return Flag(name=name, kind=kind, fate="inert", note=why, default=default, **more)


def refused(name: str, kind: Kind, way_out: str, default: Any = None, **more: Any) -> Flag:
    """Return a flag whose wish cannot be granted."""
    return Flag(name=name, kind=kind, fate="refused", note=way_out, default=default, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class Script:
    """One of their programs."""

    name: str
    command: str
    """Which of our commands does its work."""
    flags: tuple[Flag, ...]
    task: str = ""
    method: str = ""

    def find(self, name: str) -> Flag | None:
        """Return the flag of that name, today's or an older one."""
        return next((flag for flag in self.flags if name in (flag.name, *flag.also)), None)

    def is_for(self, flag: Flag) -> bool:
        """Tell whether the flag has a meaning in this script."""
        return flag.only in ("", self.task, self.method)


@dataclass(kw_only=True, slots=True)
class Given:
    """A command line of theirs, and what it has come to so far."""

    script: Script
    origin: str
    """Whose defaults count."""
    typed: dict[str, Any]
    ours: frozenset[str] = frozenset()
    """Settings of ours that stand on the same command line; what is typed there counts."""
    engine: str = "torch"
    """Which is to run."""
    num_processes: int = 1
    rank: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    def __getitem__(self, name: str) -> Any:
        """Return what was typed, or the default."""
        flag = self.script.find(name)
        if flag is None:
            return None
        if name in self.typed:
            return self.typed[name]
        is_other = self.origin == PYTORCH and flag.pytorch_default is not None
        return flag.pytorch_default if is_other else flag.default

    def set(self, setting: str, value: Any) -> None:
        """Decide a setting, unless it is typed as one of ours."""
        if setting not in self.ours:
            self.settings[setting] = value

    def say(self, text: str) -> None:
        """Tell the user something, once."""
        if text not in self.said:
            self.said.append(text)

    def say_inert(self, names: Iterable[str], why: str) -> None:
        """Tell of each of these flags that was typed why it has no effect."""
        for name in names:
            value = self.typed.get(name)
            if value is not None and value is not False:  # a typed 0 is a wish, too
                self.say(f"--{name}: no effect, {why}")


_UNDOTTED = ("task", "engine")
"""Settings of ours that belong to no section."""


def read_flags(words: list[str], script: Script) -> tuple[dict[str, Any], list[str]]:
    """Return what is typed of a script's flags, and the words of flags of ours among them.

    The last of two equal flags counts, as it did. An empty word counts as a flag that is not there.

    Raises:
        FactoryError: an unknown flag (with the nearest), a word too many or too few, a value of another kind.
    """
    typed: dict[str, Any] = {}
    ours: list[str] = []
    place = 0
    while place < len(words):
        word, place = words[place], place + 1
        if not word.startswith("--"):
            raise FactoryError(f"{word!r} stands where a flag of {script.name} should; quote a value that has spaces")
        name, equals, inline = word[2:].partition("=")
        values = [inline] if equals else []
        while not equals and place < len(words) and not words[place].startswith("--"):
            values.append(words[place])
            place += 1
        if "." in name or name in _UNDOTTED:
            ours += [word] if equals else [word, *values]
            continue
        flag = script.find(name)
        if flag is None:
            known = [known for flag in script.flags for known in (flag.name, *flag.also)]
            raise FactoryError(
                f"{script.name} has no flag --{name}{nearest(name.replace('-', '_'), known)}. All of them: "
                f"cogvideox {script.command} --original {script.name} --help"
            )
        typed[flag.name] = _value(flag, values)
    return {name: value for name, value in typed.items() if value is not None}, ours


def _value(flag: Flag, values: list[str]) -> Any:
    if flag.kind == "switch":
        if values:
            raise FactoryError(f"--{flag.name} is a switch and takes no value; leave {values[0]!r} out")
        return True
    if not values:
        raise FactoryError(f"--{flag.name} needs a value")
    if values == [""]:
        return None
    if flag.kind == "integers":
        return [_number(flag, value, int) for value in values]
    if len(values) > 1:
        raise FactoryError(f"--{flag.name} takes one value, not {len(values)}: {' '.join(values)!r}; quote it")
    value = values[0]
    if flag.kind == "integer":
        return _number(flag, value, int)
    if flag.kind == "number":
        return _number(flag, value, float)
    if flag.kind == "truth":
        if value.lower() not in ("true", "false"):
            raise FactoryError(f"--{flag.name} {value}: give True or False")
        return value.lower() == "true"
    if not flag.choices:
        return value
    matching = [choice for choice in flag.choices if choice.lower() == value.lower()]
    if not matching:
        raise FactoryError(
            f"--{flag.name} {value}{nearest(value, list(flag.choices))}: give one of {', '.join(flag.choices)}"
        )
    return matching[0]


def _number(flag: Flag, value: str, kind: type) -> Any:
    try:
        return kind(value)
    except ValueError as error:
        what = "a whole number" if kind is int else "a number"
        raise FactoryError(f"--{flag.name} {value}: that is not {what}") from error
