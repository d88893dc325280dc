"""Pushing to a hub on this machine: all files in one commit, or one clear line and nothing."""

import huggingface_hub.constants
import pytest

from cogvideox_factory.errors import FactoryError, MissingError
from cogvideox_factory.hub import push_folder, repository_of
from tests import hub as local


@pytest.fixture
def hub(monkeypatch):
    """A hub that everything asks in place of the real one, with a token in its environment."""
    with local.running() as running:
        use(running.url, monkeypatch)
        yield running


def use(url, monkeypatch, token=local.TOKEN):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setenv("HF_TOKEN", token)


@pytest.fixture
def folder(tmp_path):
    export = tmp_path / "export"
    (export / "transformer").mkdir(parents=True)
    (export / "README.md").write_text("---\ntags: [cogvideox]\n---\n# x\n")
    (export / "transformer" / "x.safetensors").write_bytes(bytes(range(256)) * 40)
    return export


@pytest.mark.parametrize(("public", "visible"), [(False, "private"), (True, "public")])
def test_every_file_arrives_in_one_commit_and_is_private_unless_asked(hub, folder, public, visible):
    assert repository_of("fox") == "ann/fox"
    assert push_folder(folder, "ann/fox", public=public).endswith("ann/fox")
    assert hub.visibility == {"ann/fox": visible}
    assert hub.commits == ["ann/fox"]
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert hub.repositories["ann/fox"] == there
    push_folder(folder, "ann/fox", public=public)  # again, into what is there now
    assert hub.commits == ["ann/fox"] * 2


def test_a_token_that_is_not_known_is_one_line_and_nothing_is_made(hub, monkeypatch):
    use(hub.url, monkeypatch, token="hf_wrong")
    with pytest.raises(MissingError, match=r"hf auth login.*Nothing was exported or uploaded") as caught:
        repository_of("fox")
    assert "\n" not in str(caught.value)
    assert "hf_wrong" not in str(caught.value)
    assert not hub.repositories


def test_a_token_that_may_not_write_leaves_the_repository_empty(hub, folder):
    hub.refuses_commits = True
    with pytest.raises(MissingError, match=r"may write.*upload it with `hf upload ann/fox") as caught:
        push_folder(folder, "ann/fox", public=False)
    assert "\n" not in str(caught.value)
    assert hub.repositories == {"ann/fox": {}}


def test_without_network_it_is_one_line(folder, monkeypatch):
    use("http://127.0.0.1:9", monkeypatch)  # where nobody listens
    with pytest.raises(MissingError, match=r"ann/fox cannot be pushed to the Hugging Face hub: .*") as caught:
        repository_of("ann/fox")
    assert "\n" not in str(caught.value)
    with pytest.raises(MissingError, match=r"was not uploaded to ann/fox: .*The export is whole in"):
        push_folder(folder, "ann/fox", public=False)


@pytest.mark.parametrize("name", ["a/b/c", "", "..", "/x", "a b", "a--b"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(FactoryError, match="no name of a repository"):
        repository_of(name)
