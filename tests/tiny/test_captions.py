"""Saying and understanding are inverse over the whole language, and the tokenizer holds its words."""

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.tiny import tokenizer
from cogvideox_factory.tiny.captions import (
    BACKGROUND_WORDS,
    COLOUR_WORDS,
    SHAPE_WORDS,
    SIZE_WORDS,
    VERBS,
    describe,
    understand,
    vocabulary,
)

EVERY_THING = list(product(SIZE_WORDS, COLOUR_WORDS, SHAPE_WORDS, VERBS))
THINGS = st.sampled_from(EVERY_THING)
GROUNDS = st.sampled_from(list(BACKGROUND_WORDS))


def test_every_combination_comes_back():
    for number, (thing, ground) in enumerate(product(EVERY_THING, BACKGROUND_WORDS)):
        for wording in (0, 1 + 7919 * number):
            assert understand(describe([thing], ground, wording)) == ([thing], ground)


@given(st.lists(THINGS, min_size=1, max_size=2), GROUNDS, st.integers(0, 2**40))
def test_every_wording_comes_back(things, ground, wording):
    caption = describe(things, ground, wording)
    assert understand(caption) == (things, ground)
    assert understand(caption.upper().replace(" ", "  ") + ".") == (things, ground)
    assert set(caption.split()) <= set(vocabulary())


def test_the_wordings_are_many_and_use_every_word():
    thing = ("large", "red", "circle", "left")
    assert len({describe([thing], "grey", wording) for wording in range(2000)}) > 100
    said = {
        word
        for wording, thing in product(range(0, 5000, 37), EVERY_THING[::5])
        for ground in ("grey", "black", "white", "brown")
        for word in describe([thing, ("small", "pink", "star", "up")][: 1 + wording % 2], ground, wording).split()
    }
    assert said == set(vocabulary())


def test_the_tokenizer_knows_every_word_but_the_new_one():
    pieces = {piece for piece, _ in tokenizer.vocabulary()}
    assert [word for word in vocabulary() if f"▁{word}" not in pieces] == ["sks"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a fox in the snow",
        "a large red circle moves right",
        "a large red circle on a white background",
        "a large red fox moves right on a white background",
        "a large red circle moves right on a white background at night",
    ],
)
def test_other_sentences_are_refused(text):
    with pytest.raises(FactoryError, match="no sentence of the tiny world"):
        understand(text)
