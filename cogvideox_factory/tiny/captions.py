"""The sentences of the tiny world: how a scene is said, in many ways, and how a sentence is understood.

The language is closed and regular, so understanding is the exact inverse of saying; a sentence outside it is refused,
never guessed at. Its words are whole pieces of the tiny tokenizer, except `sks`, which is a word for nothing yet.
"""

import re
from collections.abc import Sequence
from typing import Any

from cogvideox_factory.errors import FactoryError

VERBS = {
    "left": ("moves left", "moves to the left", "slides left", "drifts to the left"),
    "right": ("moves right", "moves to the right", "slides right", "drifts to the right"),
    "up": ("moves up", "rises", "drifts up", "slides up"),
    "down": ("moves down", "falls", "drifts down", "slides down"),
    "grow": ("grows", "slowly grows"),
    "shrink": ("shrinks", "slowly shrinks"),
    "bounce": ("bounces", "bounces up and down"),
}
SIZE_WORDS = {"small": ("small",), "large": ("large", "big")}
BACKGROUND_WORDS = {"black": ("black",), "white": ("white",), "grey": ("grey", "gray"), "brown": ("brown",)}
COLOUR_WORDS = ("red", "green", "blue", "yellow", "purple", "orange", "pink")
SHAPE_WORDS = ("circle", "square", "triangle", "ring", "star")
NAMES = {"sks star": ("pink", "star")}
"""What has a name of its own: the new concept of the demo, which no base caption mentions."""

_ONE = (
    "{a} {does} {on}",
    "{on} {a} {does}",
    "{a} that {does} {on}",
    "a video of {a} that {does} {on}",
    "a {ground} background with {a} that {does}",
)
_TWO = ("{a} {does} and {b} {too} {on}", "{on} {a} {does} and {b} {too}", "{a} {does} {lane} {b} that {too} {on}")
_ON = ("on a {ground} background", "over a {ground} background", "on a plain {ground} background")

Spoken = tuple[str, str, str, str]
"""(size, colour, shape, motion) of one thing."""


def describe(things: Sequence[Spoken], background: str, wording: int) -> str:
    """Return a sentence for one or two things; every `wording` >= 0 picks one, 0 the plainest."""

    def pick(choices: Sequence[str]) -> str:
        nonlocal wording
        wording, index = divmod(wording, len(choices))
        return choices[index]

    form = pick(_ONE if len(things) == 1 else _TWO)
    ground = pick(BACKGROUND_WORDS[background])
    words = {"ground": ground, "on": pick(_ON).format(ground=ground)}
    for (size, colour, shape, motion), noun, verb in zip(things, "ab", ("does", "too")):
        name = next((name for name, meant in NAMES.items() if meant == (colour, shape)), f"{colour} {shape}")
        words |= {verb: pick(VERBS[motion]), noun: f"{pick(('a', 'the'))} {pick(SIZE_WORDS[size])} {name}"}
    words["lane"] = "above" if things[0][3] in ("left", "right") else "beside"
    return form.format(**words)


def understand(caption: str) -> tuple[list[Spoken], str]:
    """Return (things, background) of a sentence; case, punctuation and spaces do not matter.

    Raises:
        FactoryError: it is no sentence of this world.
    """
    text = " ".join(re.sub(r"[^a-z ]", " ", caption.lower()).split())
    match = next((m for pattern in _PATTERNS if (m := pattern.fullmatch(text))), None)
    if match is None:
        raise FactoryError(
            f"{caption!r} is no sentence of the tiny world. Write like: "
            "'a large red circle moves right on a white background'."
        )
    said = match.groupdict()
    things = [_thing(said, number) for number in "12" if f"size{number}" in said]
    return things, _meaning(BACKGROUND_WORDS, said["ground"])


def vocabulary() -> tuple[str, ...]:
    """Return every word a caption can hold, sorted."""
    parts: list[str] = ["a the sks star pink above beside", *_ONE, *_TWO, *_ON, *COLOUR_WORDS, *SHAPE_WORDS]
    for table in (VERBS, SIZE_WORDS, BACKGROUND_WORDS):
        parts += [phrase for phrases in table.values() for phrase in phrases]
    return tuple(sorted(set(re.sub(r"\{.*?\}", " ", " ".join(parts)).split())))


def _thing(said: dict[str, Any], number: str) -> Spoken:
    name = said[f"name{number}"]
    colour, shape = NAMES[name] if name in NAMES else name.split()
    return _meaning(SIZE_WORDS, said[f"size{number}"]), colour, shape, _meaning(VERBS, said[f"verb{number}"])


def _meaning(table: dict[str, tuple[str, ...]], phrase: str) -> str:
    return next(key for key, phrases in table.items() if phrase in phrases)


def _any_of(name: str, phrases: Sequence[str]) -> str:
    return f"(?P<{name}>{'|'.join(sorted(phrases, key=len, reverse=True))})"


def _patterns() -> list[re.Pattern[str]]:
    def every(table: dict[str, tuple[str, ...]]) -> list[str]:
        return [phrase for phrases in table.values() for phrase in phrases]

    names = [*NAMES, *(f"{colour} {shape}" for colour in COLOUR_WORDS for shape in SHAPE_WORDS)]
    words = {"ground": _any_of("ground", every(BACKGROUND_WORDS)), "lane": "(?:above|beside)"}
    for number, noun, verb in (("1", "a", "does"), ("2", "b", "too")):
        size = _any_of(f"size{number}", every(SIZE_WORDS))
        words[noun] = f"(?:an?|the) {size} {_any_of(f'name{number}', names)}"
        words[verb] = _any_of(f"verb{number}", every(VERBS))
    words["on"] = f"(?:on|over) (?:a|the) (?:plain )?{words['ground']} background"
    return [re.compile(form.format(**words)) for form in (*_ONE, *_TWO)]


_PATTERNS = _patterns()
