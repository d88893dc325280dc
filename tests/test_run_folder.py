import pytest

from cogvideox_factory.errors import FactoryError, StorageError, UnfitError
from cogvideox_factory.run_folder import check_allowed, locked, require_same


def test_lock_keeps_others_out_and_leaves_no_empty_folder(tmp_path):
    run = tmp_path / "run"
    with locked(run), pytest.raises(FactoryError, match="another process"), locked(run):
        pass
    assert not run.exists()
    with locked(run):
        (run / "config.yaml").write_text("kept")
    assert (run / "config.yaml").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"), locked(tmp_path / "file" / "run"):
        pass


def test_every_differing_setting_is_named(tmp_path):
    assert require_same({"a": 1}, {"a": 1}, source=tmp_path) == {}
    with pytest.raises(UnfitError) as caught:
        require_same({"a": 1, "b": 2, "gone": 3}, {"a": 1, "b": 4, "new": 5}, source=tmp_path)
    text = str(caught.value)
    assert "b: the run has 2, you ask for 4" in text
    assert "gone: the run has 3, you ask for None" in text
    assert "new: the run has None, you ask for 5" in text
    assert "  a:" not in text
    assert "--train.allow-change b gone new" in text


def test_another_base_of_the_same_shape_is_refused_but_for_runs_that_did_not_record_theirs(tmp_path):
    with pytest.raises(UnfitError, match="weights: the run has 'a', you ask for 'b'"):
        require_same({"weights": "a"}, {"weights": "b"}, source=tmp_path, allow=["weights"])
    assert require_same({"model": "m"}, {"model": "m", "weights": "b"}, source=tmp_path) == {}


def test_a_run_of_before_there_was_float8_goes_on_without(tmp_path):
    assert require_same({"a": 1}, {"a": 1, "train.fp8": "none"}, source=tmp_path) == {}
    with pytest.raises(UnfitError, match=r"train\.fp8: the run has 'none', you ask for 'rowwise'"):
        require_same({"a": 1}, {"a": 1, "train.fp8": "rowwise"}, source=tmp_path)


def test_a_change_is_allowed_by_name_but_never_another_model(tmp_path):
    recorded, wanted = {"data": "x", "model": "a", "lora.rank": 4}, {"data": "y", "model": "b", "lora.rank": 8}
    allow = ["data", "model", "lora.rank"]
    assert require_same(recorded, wanted | {"model": "a", "lora.rank": 4}, source=tmp_path, allow=["data"]) == {
        "data": ("x", "y")
    }
    with pytest.raises(UnfitError) as caught:
        require_same(recorded, wanted, source=tmp_path, allow=allow)
    assert "model: the run has" in str(caught.value)
    assert "lora.rank: the run has" in str(caught.value)
    assert "data:" not in str(caught.value)
    assert "allow-change" not in str(caught.value)
    check_allowed(["data"], wanted)
    for name in ("model", "lora.rank"):
        with pytest.raises(FactoryError, match="another state"):
            check_allowed([name], wanted)
    with pytest.raises(FactoryError, match=r"did you mean 'data'"):
        check_allowed(["dat"], wanted)
