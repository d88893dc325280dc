"""A command line of theirs, turned into settings of ours, with a line for everything that has no effect."""

from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.original import inference, preparation, training
from cogvideox_factory.original.flag import MINDSPORE, PYTORCH, Flag, Given, Script, read_flags

SCRIPTS = {
    script.name: script
    for script in (
        Script(name="text-to-video-lora", command="train", flags=training.FLAGS, task="t2v", method="lora"),
        Script(name="text-to-video-sft", command="train", flags=training.FLAGS, task="t2v", method="full"),
        Script(name="image-to-video-lora", command="train", flags=training.FLAGS, task="i2v", method="lora"),
        Script(name="image-to-video-sft", command="train", flags=training.FLAGS, task="i2v", method="full"),
        Script(name="prepare-dataset", command="prepare", flags=preparation.FLAGS),
        Script(name="infer", command="generate", flags=inference.FLAGS),
    )
}

WAYS = (
    ("data.fps_policy", "stretch", "frames are spread over each clip whatever its rate; resample keeps its speed"),
    ("data.crop", "stretch", "pictures lose their proportions; center crops instead"),
    ("train.caption_dropout", 0.0, "every caption is kept; dropping 0.1 of them keeps guidance calibrated"),
)
"""What they do without a flag, what it is here, and what is better."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Translation:
    """What a command line of theirs comes to."""

    settings: dict[str, Any]
    """Ours by name, `train.steps`, in the order of their table; None is a setting left to its default."""
    said: list[str]
    """What the user should know: flags without effect, and numbers that are not the typed ones."""
    ours: list[str]
    """Words for settings of ours that stood among theirs, as they were."""


def find_script(name: str, command: str) -> tuple[Script, str]:
    """Return the script of `[pytorch:]NAME` and whose defaults count.

    Raises:
        FactoryError: no such script, or one that another command does.
    """
    origin, _, plain = name.rpartition(":")
    names = [script.name for script in SCRIPTS.values() if script.command == command]
    if origin not in ("", MINDSPORE, PYTORCH):
        raise FactoryError(f"--original {name}: there are mindspore:… (as without a word before it) and pytorch:…")
    if plain not in SCRIPTS:
        raise FactoryError(
            f"--original {name!r}{nearest(plain, list(SCRIPTS))}: `cogvideox {command}` does the work of "
            f"{', '.join(names)}"
        )
    if SCRIPTS[plain].command != command:
        raise FactoryError(f"{plain} is done by `cogvideox {SCRIPTS[plain].command} --original {plain}`")
    return SCRIPTS[plain], origin or MINDSPORE


def translate(script: Script, words: list[str], *, origin: str, num_processes: int = 1, rank: int = 0) -> Translation:
    """Return what `words`, flags of `script`, come to for one of `num_processes`.

    Raises:
        FactoryError: an unknown flag, a wish that cannot be granted, or no model or data.
        UnfitError: a folder that is no cache of ours where one is asked for.
    """
    typed, ours = read_flags(words, script)
    given = Given(
        script=script, origin=origin, typed=typed, ours=frozenset(map(_setting_of, ours)), engine=_engine(ours),
        num_processes=num_processes, rank=rank,
    )  # fmt: skip
    if script.task:
        given.set("task", script.task)
        given.set("train.method", script.method)
    done = set()
    for flag in script.flags:
        if _has_effect(flag, given) and flag.by not in done:
            if flag.by:
                done.add(flag.by)
                flag.by(given)
            else:
                given.set(flag.setting, given[flag.name])
    if script.command == "train":
        given.set("train.caption_dropout", 0.0)
    _say_ways(given)
    return Translation(settings=given.settings, said=given.said, ours=ours)


def _engine(ours: list[str]) -> str:
    """Return the engine that words of ours name."""
    for word, after in zip_longest(ours, ours[1:], fillvalue=""):
        if _setting_of(word) == "engine":
            return word.partition("=")[2] or after
    return "torch"


def _has_effect(flag: Flag, given: Given) -> bool:
    """Tell whether a flag decides something, and say or refuse it where it does not."""
    if not given.script.is_for(flag):
        where = {"lora": "a LoRA", "full": "full fine-tuning", "i2v": "image-to-video", "t2v": "text-to-video"}
        given.say_inert((flag.name,), f"it belongs to {where[flag.only]}")
    elif flag.fate == "inert":
        given.say_inert((flag.name,), flag.note)
    elif flag.fate == "refused" and given.typed.get(flag.name):
        raise FactoryError(f"--{flag.name}: {flag.note}")
    return flag.fate == "setting" and given.script.is_for(flag)


def _say_ways(given: Given) -> None:
    is_cached = given.script.command == "train" and "cache.dir" in given.settings
    for setting, value, text in WAYS:
        if given.settings.get(setting) == value and not (is_cached and setting.startswith("data.")):
            given.say(f"as with theirs, {text} (--{setting.replace('_', '-')})")


def _setting_of(word: str) -> str:
    return word[2:].partition("=")[0].replace("-", "_") if word.startswith("--") else ""
