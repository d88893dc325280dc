"""Safetensors files: exact round trips for every type, streaming, and every kind of damage named."""

import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from cogvideox_factory.errors import MissingError, StorageError, UnfitError
from cogvideox_factory.tensors import StoredTensor, open_tensors, save_tensors

DTYPES = [
    np.float64, np.float32, np.float16, ml_dtypes.bfloat16, np.int64, np.int32, np.int16, np.int8, np.uint64,
    np.uint32, np.uint16, np.uint8, np.bool_,
]  # fmt: skip


def read_all(path):
    with open_tensors(path) as file:
        return {name: file.read(name) for name in file.names}


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_round_trip(tmp_path, dtype):
    values = np.arange(24).reshape(2, 3, 4)
    arrays = {
        "plain": values.astype(dtype), "scalar": np.array(3, dtype=dtype),
        "empty": np.zeros((0, 4), dtype=dtype),
        "strided": values.astype(dtype)[:, ::2], "transposed": values.astype(dtype).T,
    }  # fmt: skip
    save_tensors(tmp_path / "x", arrays)
    for name, array in read_all(tmp_path / "x").items():
        assert array.dtype == arrays[name].dtype
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
def test_rows_are_those_of_the_whole(tmp_path, dtype):
    arrays = {"a": np.arange(60).reshape(5, 3, 4).astype(dtype), "b": np.arange(7).astype(dtype)}
    save_tensors(tmp_path / "x", arrays)
    with open_tensors(tmp_path / "x") as file:
        for name, array in arrays.items():
            stored = StoredTensor(file=file, name=name)
            assert stored.shape == array.shape
            for rows in (slice(None), slice(0, 2), slice(2, 4), slice(3, 3), slice(4, None)):
                assert stored[rows].dtype == array.dtype
                np.testing.assert_array_equal(stored[rows], array[rows])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_reading_rows_reads_no_others(tmp_path):
    save_tensors(tmp_path / "x", {"a": np.zeros((1000, 1000), np.float32)})
    with open_tensors(tmp_path / "x") as file:
        file.read_rows("a", 0, 1)  # the header is read once
        before = _bytes_read()
        rows = file.read_rows("a", 500, 510)
        assert _bytes_read() - before <= rows.nbytes + 2000
        before = _bytes_read()
        file.read("a")
        assert _bytes_read() - before >= 4_000_000, "the counter counts"


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="only Linux counts what a process reads")
def test_all_is_read_to_verify_and_nothing_where_someone_else_has(tmp_path):
    save_tensors(tmp_path / "x", {"a": np.zeros((1000, 1000), np.float32)})
    for verify in (True, False):
        before = _bytes_read()
        with open_tensors(tmp_path / "x", verify=verify) as file:
            file.read_rows("a", 500, 510)
        assert 4_000_000 * verify <= _bytes_read() - before <= 4_000_000 * verify + 50_000


def _bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


def test_a_file_that_shrinks_under_a_reader_is_told(tmp_path):
    save_tensors(tmp_path / "x", {"a": np.zeros((10, 10), np.float32)})
    with open_tensors(tmp_path / "x") as file:
        with (tmp_path / "x").open("r+b") as other:
            other.truncate(200)
        with pytest.raises(UnfitError, match="was changed while it was read"):
            file.read_rows("a", 8, 10)


@settings(deadline=None, derandomize=True, max_examples=20)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50))
def test_every_bfloat16_bit_pattern_survives(tmp_path_factory, bits):
    """NaN payloads and signed zeros included."""
    path = tmp_path_factory.mktemp("bits") / "x.safetensors"
    array = np.array(bits, dtype=np.uint16)
    save_tensors(path, {"x": array.view(ml_dtypes.bfloat16)})
    np.testing.assert_array_equal(read_all(path)["x"].view(np.uint16), array)


def test_same_bits_as_torch(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file
    from safetensors.torch import save_file as torch_save_file

    theirs = {"x": torch.randn(5, 7).bfloat16(), "s": torch.tensor(2.5, dtype=torch.bfloat16)}
    torch_save_file(theirs, tmp_path / "a.safetensors", metadata={"format": "pt"})
    ours = read_all(tmp_path / "a.safetensors")
    for name, array in ours.items():
        np.testing.assert_array_equal(array.view(np.int16), theirs[name].view(torch.int16).numpy())
    save_tensors(tmp_path / "b.safetensors", ours)
    for name, tensor in load_file(tmp_path / "b.safetensors").items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, theirs[name])


def test_header(tmp_path):
    save_tensors(tmp_path / "x", {"a": np.zeros((2, 3))}, metadata={"made": "here"})
    with open_tensors(tmp_path / "x") as file:
        assert file.metadata == {"format": "pt", "made": "here"}
        assert file.shape("a") == (2, 3)


def test_one_tensor_in_memory_at_a_time(tmp_path):
    """Reading 8 tensors of 16 MiB one after the other must not cost 128 MiB."""
    save_tensors(tmp_path / "x", {f"t{i}": np.zeros(2**22, dtype=np.float32) for i in range(8)})
    code = (
        "import resource, sys\nfrom cogvideox_factory.tensors import open_tensors\n"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "with open_tensors(sys.argv[1]) as f:\n    for n in f.names: f.read(n).sum()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 60 * 1024  # KiB; one or two tensors


@pytest.fixture
def good(tmp_path):
    save_tensors(tmp_path / "good", {"a": np.arange(1000.0), "b": np.ones(3)})
    return (tmp_path / "good").read_bytes()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: b"", "holds 0 bytes"),
        (lambda data: data[:5], "holds 5 bytes"),
        (lambda data: data[:60], "cut off"),
        (lambda data: data[:-10], "cut off"),
        (lambda data: data + b"more", "damaged or cut off"),
        (
            lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n",
            "git-lfs pointer",
        ),
        (lambda data: b"<!DOCTYPE html><html>not found</html>", "no safetensors file"),
        (lambda data: b"\x80\x02}q\x00." * 30, "no safetensors file"),
        (lambda data: data[:8] + b"{" * 40 + data[48:], "damaged"),
    ],
    ids=["empty", "5 bytes", "header", "end", "longer", "lfs", "html", "pickle", "json"],
)
def test_damage_is_named(tmp_path, good, damage, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(good))
    with pytest.raises(UnfitError, match=rf"bad\.safetensors cannot be read: .*{says}"):
        read_all(path)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(st.integers(0, 8200), st.binary(min_size=1, max_size=12))
def test_hostile_bytes_never_crash(tmp_path_factory, at, junk):
    """Any overwritten stretch is refused, or says nothing: what is read is what was written."""
    folder = tmp_path_factory.mktemp("hostile")
    save_tensors(folder / "x", {"a": np.arange(1000.0), "b": np.ones(3)})
    data = bytearray((folder / "x").read_bytes())
    data[at : at + len(junk)] = junk
    (folder / "x").write_bytes(data)
    try:
        found = read_all(folder / "x")
    except UnfitError:
        return
    assert np.array_equal(found["a"], np.arange(1000.0))
    assert np.array_equal(found["b"], np.ones(3))


def test_cut_off_while_it_is_read(tmp_path, good):
    """Mapped into memory this would be a bus error."""
    with open_tensors(tmp_path / "good") as file:
        (tmp_path / "good").write_bytes(good[:200])
        with pytest.raises(UnfitError, match=r"good cannot be read: it is (damaged or )?cut off"):
            file.read("a")


def test_every_flipped_bit_of_what_is_written_here_is_refused(tmp_path):
    """A flip in the digest's own key, which alone makes it a file without one, changes no number."""
    rng = np.random.default_rng(0)
    arrays = {"w": rng.standard_normal((5, 7)).astype(np.float32)}
    save_tensors(tmp_path / "x", arrays, metadata={"made": "here"})
    good = (tmp_path / "x").read_bytes()
    key = good.index(b"cogvideox_factory.sha256")
    for place in range(0, 8 * len(good), 5):
        spoilt = bytearray(good)
        spoilt[place // 8] ^= 1 << place % 8
        (tmp_path / "x").write_bytes(spoilt)
        if key <= place // 8 < key + len(b"cogvideox_factory.sha256"):
            with suppress(UnfitError):
                np.testing.assert_array_equal(read_all(tmp_path / "x")["w"], arrays["w"])
        else:
            with pytest.raises(UnfitError):
                read_all(tmp_path / "x")


def test_absent(tmp_path):
    with pytest.raises(MissingError, match="does not exist"):
        read_all(tmp_path / "x")


def test_types_nobody_computes_with(tmp_path):
    save_file({"a": np.ones(3, dtype=ml_dtypes.float8_e4m3fn)}, tmp_path / "x")
    with pytest.raises(UnfitError, match=r"tensor 'a' is of type F8_E4M3"):
        read_all(tmp_path / "x")


def test_unwritable(tmp_path):
    with pytest.raises(StorageError, match="could not write"):
        save_tensors(tmp_path / "no" / "x", {"a": np.ones(3)})


def test_errors_of_the_reader_are_not_mistaken_for_damage(tmp_path, good):
    def stumble():
        with open_tensors(tmp_path / "good"):
            raise FileNotFoundError("mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        stumble()


def test_layout_is_the_librarys(tmp_path):
    """Same header entries, same data bytes, aligned, as the reference writer; and always the same bytes."""
    arrays = {"b": np.ones((2, 3), np.float16), "a": np.arange(3, dtype=np.int8), "c": np.arange(5.0)}
    save_file(arrays, tmp_path / "theirs", metadata={"format": "pt"})
    save_tensors(tmp_path / "ours", arrays)
    (ours, our_data), (theirs, their_data) = (split(tmp_path / name) for name in ("ours", "theirs"))
    assert len(ours["__metadata__"].pop("cogvideox_factory.sha256")) == 64
    assert ours == theirs
    assert our_data == their_data
    assert ((tmp_path / "ours").stat().st_size - len(our_data)) % 8 == 0
    metadata = {"z": "1", "a": "é", "m": '"\n'}
    for name in ("x", "y"):
        save_tensors(tmp_path / name, arrays, metadata=metadata)
    assert (tmp_path / "x").read_bytes() == (tmp_path / "y").read_bytes()
    with open_tensors(tmp_path / "x") as file:
        assert file.metadata == metadata | {"format": "pt"}


def split(path):
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def test_big_endian(tmp_path):
    save_tensors(tmp_path / "x", {"a": np.arange(5, dtype=">f4")})
    array = read_all(tmp_path / "x")["a"]
    np.testing.assert_array_equal(array, np.arange(5))
    assert array.dtype == np.dtype("<f4")
