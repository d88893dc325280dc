"""Whatever stands in a file: an object, or one error that says where and what to do."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.json_object import parse_object, read_object


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b'{"a": ' + b"[" * 100_000, "is not valid JSON"),
        (b'{"a": ' + b"1" * 5_000 + b"}", "is not valid JSON"),
        (b"[1]", "holds a list, not a JSON object"),
        (b"null", "holds a NoneType, not a JSON object"),
    ],
)
def test_what_is_no_object_is_refused_with_the_way_out(tmp_path, content, says):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(UnfitError) as caught:
        read_object(path, way_out="Get another.")
    assert str(caught.value).startswith(f"{path} {says}")
    assert str(caught.value).endswith(". Get another.")


def test_an_object_comes_back():
    assert parse_object('{"a": [1, null], "é": {}}'.encode(), source="here", way_out="") == {"a": [1, None], "é": {}}


@given(st.binary() | st.text())
def test_nothing_that_is_read_crashes(content):
    try:
        parse_object(content, source="here", way_out="Out.")
    except UnfitError as error:
        assert str(error).startswith("here ")  # noqa: PT017 - to be an object is right, too
