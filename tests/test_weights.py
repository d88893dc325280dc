"""Model folders: ours and diffusers' are the same thing, damage is named, a failed save changes nothing."""

import json
import shutil

import numpy as np
import pytest

from cogvideox_factory import weights
from cogvideox_factory.errors import MissingError, StorageError, UnfitError
from cogvideox_factory.models import TransformerConfig, tiny_facts
from cogvideox_factory.weights import (
    find_weight_files,
    iterate_tensors,
    load_folder,
    read_config,
    resolve_model,
    save_folder,
)

CONFIG = {"_class_name": "X", "size": 1}


def arrays(seed=0, count=6):
    rng = np.random.default_rng(seed)
    return {f"layer.{i}.weight": rng.standard_normal((4, 8)).astype(np.float32) for i in range(count)}


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("shard_bytes", [1, 128, 300, 10**9])
def test_round_trip(tmp_path, shard_bytes):
    folder = tmp_path / "model"
    save_folder(folder, arrays(), config=CONFIG, max_shard_bytes=shard_bytes)
    assert_same(load_folder(folder), arrays())
    assert read_config(folder) == CONFIG
    files = find_weight_files(folder)
    assert len(files) == {1: 6, 128: 6, 300: 3, 10**9: 1}[shard_bytes]
    assert all(path.name in names(folder) for path in files)


def test_layout_of_shards(tmp_path):
    save_folder(tmp_path / "model", arrays(count=3), config=CONFIG, stem="model", max_shard_bytes=300)
    assert names(tmp_path / "model") == [
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]  # fmt: skip
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 3 * 128}
    assert index["weight_map"]["layer.2.weight"] == "model-00002-of-00002.safetensors"


def test_saves_are_byte_identical(tmp_path):
    for name in "ab":
        save_folder(tmp_path / name, arrays(), config=CONFIG, max_shard_bytes=300)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_generator_is_written_shard_by_shard(tmp_path):
    """Two tensors make a shard here; never more than a shard and the tensor that did not fit are alive."""
    import weakref

    alive, most = weakref.WeakSet(), 0

    class Counted(np.ndarray):
        __hash__ = object.__hash__
        __eq__ = object.__eq__

    def produce():
        nonlocal most
        for i in range(10):
            array = np.zeros((4, 8), dtype=np.float32).view(Counted)
            alive.add(array)
            most = max(most, len(alive))
            yield f"t{i}", array
            del array

    save_folder(tmp_path / "model", produce(), config=CONFIG, max_shard_bytes=256)
    assert len(load_folder(tmp_path / "model")) == 10
    assert most <= 4


def test_replaces_an_earlier_save_and_nothing_else(tmp_path):
    folder = tmp_path / "model"
    save_folder(folder, arrays(0), config=CONFIG, max_shard_bytes=128)
    (folder / "README.md").write_text("mine")
    (folder / "other.safetensors").write_text("mine too")
    save_folder(folder, arrays(1), config=CONFIG | {"size": 2}, max_shard_bytes=300)
    assert_same(load_folder(folder), arrays(1))
    assert len(find_weight_files(folder)) == 3
    save_folder(folder, arrays(2), config=CONFIG | {"size": 3})
    assert_same(load_folder(folder), arrays(2))
    assert read_config(folder)["size"] == 3
    assert names(folder) == [
        "README.md",
        "config.json",
        f"{weights.MODEL_STEM}.safetensors",
        "other.safetensors",
    ]


def test_failed_save_changes_nothing(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    save_folder(folder, arrays(0), config=CONFIG, max_shard_bytes=128)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    real, calls = weights.save_tensors, []

    def full(path, arrays, **rest):
        calls.append(path)
        if len(calls) == 2:
            raise StorageError("could not write: disk full")
        real(path, arrays, **rest)

    monkeypatch.setattr(weights, "save_tensors", full)
    with pytest.raises(StorageError):
        save_folder(folder, arrays(1), config=CONFIG, max_shard_bytes=128)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    calls.clear()
    with pytest.raises(StorageError):
        save_folder(tmp_path / "new", arrays(1), config=CONFIG, max_shard_bytes=128)
    assert names(tmp_path) == ["model"]


def test_missing_weights(tmp_path):
    with pytest.raises(MissingError, match=r"holds neither .*Check the path"):
        find_weight_files(tmp_path)
    (tmp_path / "diffusion_pytorch_model.fp16.safetensors").write_text("")
    with pytest.raises(MissingError, match=r"it holds diffusion_pytorch_model\.fp16\.safetensors"):
        find_weight_files(tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_text("")
    with pytest.raises(MissingError, match=r"only pickled weights .*save_pretrained"):
        find_weight_files(tmp_path)


def test_two_sets_of_weights(tmp_path):
    save_folder(tmp_path / "m", arrays(), config=CONFIG)
    (tmp_path / "m" / f"{weights.MODEL_STEM}.safetensors.index.json").write_text("{}")
    with pytest.raises(UnfitError, match="two sets of weights"):
        find_weight_files(tmp_path / "m")


@pytest.fixture
def sharded(tmp_path):
    save_folder(tmp_path / "m", arrays(count=3), config=CONFIG, max_shard_bytes=128)
    return tmp_path / "m"


def edit_index(folder, change):
    path = folder / f"{weights.MODEL_STEM}.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


def test_missing_shard(sharded):
    find_weight_files(sharded)[1].unlink()
    with pytest.raises(UnfitError, match=r"lacks 1 of 3 shards: .*00002-of-00003"):
        load_folder(sharded)


def test_shards_of_different_saves(sharded):
    edit_index(sharded, lambda names: names.update({"extra": names["layer.0.weight"]}))
    with pytest.raises(UnfitError, match="disagree on 1 tensors: extra"):
        load_folder(sharded)
    edit_index(
        sharded,
        lambda names: (
            names.pop("extra"),
            names.pop("layer.0.weight"),
            names.update(extra=sorted(names.values())[0]),
        ),
    )
    shutil.copy(find_weight_files(sharded)[-1], sharded / "copy.safetensors")
    edit_index(sharded, lambda names: names.update(copied="copy.safetensors"))
    with pytest.raises(UnfitError, match="is in an earlier shard too"):
        load_folder(sharded)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors"])
def test_index_cannot_leave_its_folder(sharded, name):
    edit_index(sharded, lambda names: names.update({"layer.0.weight": name}))
    with pytest.raises(UnfitError, match="names files outside its folder"):
        load_folder(sharded)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"weight_map": 3}', '{"weight_map": {}}'])
def test_broken_index(sharded, text):
    (sharded / f"{weights.MODEL_STEM}.safetensors.index.json").write_text(text)
    with pytest.raises(UnfitError, match=r"index\.json"):
        load_folder(sharded)


def test_truncated_shard_names_the_file(sharded):
    path = find_weight_files(sharded)[1]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UnfitError, match=r"00002-of-00003\.safetensors cannot be read"):
        load_folder(sharded)


def test_broken_config(tmp_path):
    with pytest.raises(UnfitError, match=r"config\.json is missing"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UnfitError, match="holds a list"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UnfitError, match="not valid JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize("variant", ["cogvideox-2b", "cogvideox-5b-i2v", "cogvideox1.5-5b-i2v"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shard_size", ["10GB", "500KB"])
def test_diffusers_folder_there_and_back(tmp_path, variant, dtype, shard_size):
    """Saved by diffusers, read and written by us, loaded by diffusers: every tensor the same bits."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    values = tiny_facts(variant).transformer.to_dict()
    values.pop("_class_name")
    theirs = diffusers.CogVideoXTransformer3DModel(**values).to(getattr(torch, dtype))
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size=shard_size)
    assert (len(find_weight_files(tmp_path / "theirs")) > 1) == (shard_size == "500KB")

    ours = load_folder(tmp_path / "theirs")
    state = theirs.state_dict()
    assert set(ours) == set(state)
    assert {array.dtype.name for array in ours.values()} == {dtype}
    config = TransformerConfig.from_folder(tmp_path / "theirs")
    assert config == tiny_facts(variant).transformer

    limit = 10**9 if shard_size == "10GB" else 500_000
    save_folder(
        tmp_path / "ours",
        iterate_tensors(tmp_path / "theirs"),
        config=config.to_dict(),
        max_shard_bytes=limit,
    )
    again = diffusers.CogVideoXTransformer3DModel.from_pretrained(tmp_path / "ours", torch_dtype=getattr(torch, dtype))
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_local_folder_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "THUDM" / "CogVideoX-5b").mkdir(parents=True)
    assert resolve_model("THUDM/CogVideoX-5b").samefile(tmp_path / "THUDM" / "CogVideoX-5b")
    assert resolve_model(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["./models/absent", "/absent/model", "a/b/c", "absent", "../x/y"])
def test_what_can_only_be_a_path(name):
    with pytest.raises(MissingError, match="does not exist"):
        resolve_model(name)


def test_file_is_no_model(tmp_path):
    (tmp_path / "x").write_text("")
    with pytest.raises(MissingError, match="is a file, not a model folder"):
        resolve_model(tmp_path / "x")


def test_offline(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE with an empty cache: no network is touched, the way out is a command to type."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        MissingError, match=r"'nobody/nothing' is no local folder.*`hf download nobody/nothing --revision r1`"
    ):
        resolve_model("nobody/nothing", revision="r1")


def test_hub_is_asked_for_data_only(tmp_path, monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    asked = {}

    def download(hub_id, **rest):
        asked.update(rest, hub_id=hub_id)
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", download)
    for name in ("transformer", "vae"):
        (tmp_path / name).mkdir()
    assert resolve_model("THUDM/CogVideoX-5b", subfolders=("transformer", "vae")) == tmp_path
    assert asked["hub_id"] == "THUDM/CogVideoX-5b"
    assert "transformer/*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith((".py", ".bin", "*")) for pattern in asked["allow_patterns"])
    with pytest.raises(MissingError, match=r"lacks text_encoder, tokenizer, scheduler: an unfinished download\?"):
        resolve_model("THUDM/CogVideoX-5b")


def test_hub_errors_of_every_kind(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    for error in (
        LocalEntryNotFoundError("not cached\nmore"),
        ConnectionError("refused"),
        HfHubHTTPError.__bases__[0]("no route"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(hub, "snapshot_download", fail)
        with pytest.raises(MissingError, match=r"could not be had .*: (not cached|refused|no route) On a machine"):
            resolve_model("THUDM/CogVideoX-5b")


def test_a_changed_config_is_told_beside_weights_that_were_saved_with_another(tmp_path, caplog):
    save_folder(tmp_path / "m", {"a": np.ones(3, np.float32)}, config={"scale": 1.875})
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text() + "\n")
    assert list(load_folder(tmp_path / "m")) == ["a"], "white space says nothing"
    path.write_text(path.read_text().replace("1.875", "1.835"))
    assert not caplog.records
    assert list(load_folder(tmp_path / "m")) == ["a"]
    assert "config.json is not the one these weights were saved with" in caplog.text
    save_folder(tmp_path / "m", {"a": np.ones(3), "b": np.ones(3)}, config={"scale": 1.875}, max_shard_bytes=24)
    path.write_text("{}")
    caplog.clear()
    assert set(load_folder(tmp_path / "m")) == {"a", "b"}
    assert len(caplog.records) == 1, "once, not for each shard"
