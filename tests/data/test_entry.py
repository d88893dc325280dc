import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import deserialize

from cogvideox_factory.data.entry import read_entry, read_header, write_entry
from cogvideox_factory.errors import UnfitError

BF16 = ml_dtypes.bfloat16


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    return {
        "mean": rng.standard_normal((3, 4, 2, 2)).astype(BF16),
        "logvar": rng.standard_normal((3, 4, 2, 2)).astype(BF16),
        "scale": rng.standard_normal(()).astype(np.float32),
    }


@given(st.lists(st.integers(0, 5), max_size=4), st.sampled_from([BF16, np.float16, np.float32, np.uint8]))
@settings(max_examples=40, deadline=None)
def test_round_trip_is_exact(tmp_path_factory, shape, dtype):
    path = tmp_path_factory.mktemp("e") / "x.safetensors"
    array = np.random.default_rng(1).integers(0, 200, shape).astype(dtype)
    write_entry(path, {"a": array}, {"note": "schön"})
    back, header = read_entry(path, verify=True)
    assert back["a"].dtype == array.dtype
    assert back["a"].shape == tuple(shape)
    assert (back["a"] == array).all()
    assert header.metadata["note"] == "schön"


def test_any_safetensors_reader_opens_it(tmp_path):
    path = tmp_path / "x.safetensors"
    write_entry(path, arrays(), {"content": "c"})
    found = dict(deserialize(path.read_bytes()))
    assert {name: (info["dtype"], tuple(info["shape"])) for name, info in found.items()} == {
        "mean": ("BF16", (3, 4, 2, 2)), "logvar": ("BF16", (3, 4, 2, 2)), "scale": ("F32", ()),
    }  # fmt: skip
    assert bytes(found["mean"]["data"]) == arrays()["mean"].tobytes()


def test_the_same_content_makes_the_same_bytes(tmp_path):
    one = write_entry(tmp_path / "1", arrays(), {"a": "1", "b": "2"})
    two = write_entry(tmp_path / "2", dict(reversed(arrays().items())), {"b": "2", "a": "1"})
    assert one == two
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    assert write_entry(tmp_path / "3", arrays(), {"a": "1", "b": "3"}) != one


def test_reading_does_not_copy_twice(tmp_path):
    path = tmp_path / "x"
    write_entry(path, arrays(), {})
    back, _ = read_entry(path)
    bases = set()
    for array in back.values():
        while array.base is not None:
            array = array.base
        bases.add(id(array))
    assert len(bases) == 1


def test_every_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "x"
    write_entry(path, arrays(), {"content": "c"})
    data = path.read_bytes()
    for place in range(0, len(data), 3):
        damaged = bytearray(data)
        damaged[place] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            back, header = read_entry(path, verify=True)
        except UnfitError as error:
            assert str(path) in str(error)  # noqa: PT017
            continue
        # A bit in the padding between header and arrays, or one that leaves the JSON's meaning alone.
        assert header.metadata["content"] == "c"
        assert all((back[name] == array).all() for name, array in arrays().items())


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1, -100])
def test_cut_files_are_noticed_from_the_header(tmp_path, keep):
    path = tmp_path / "x"
    write_entry(path, arrays(), {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UnfitError):
        read_header(path)


def header_file(path, header: dict | bytes, data: bytes = b"") -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + data)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[]",
        {},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"__metadata__": {}, "a": {"dtype": "X", "shape": [1], "data_offsets": [0, 4]}},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, -4]}},
        {"__metadata__": {}, "a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}},
        {"__metadata__": {}, "a": {"dtype": "U8", "shape": "4", "data_offsets": [0, 4]}},
        {"__metadata__": {}, "a": {"dtype": "U8", "shape": [2], "data_offsets": [0, 2]},
         "b": {"dtype": "U8", "shape": [2], "data_offsets": [1, 3]}},
    ],
)  # fmt: skip
def test_hostile_headers_are_refused(tmp_path, header):
    header_file(tmp_path / "x", header, b"\0" * 4)
    with pytest.raises(UnfitError):
        read_entry(tmp_path / "x")
    (tmp_path / "y").write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(UnfitError):
        read_header(tmp_path / "y")


def test_a_missing_entry_is_named(tmp_path):
    with pytest.raises(UnfitError, match="nowhere"):
        read_entry(tmp_path / "nowhere")
