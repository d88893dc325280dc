"""`cogvideox export` on runs as they are: every form loads where it is meant for, with a card that is true."""

import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.numpy import load_file

from cogvideox_factory.card_facts import base_of
from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.lora_forms import save_diffusers
from cogvideox_factory.merge import merged_tensors
from cogvideox_factory.recipe import check, read_recipe
from cogvideox_factory.torch_engine import train
from cogvideox_factory.weights import load_folder
from tests import hub as local
from tests.clips import draw_clips
from tests.test_hub import use
from tests.torch_engine.runs import weights_of

PROMPT = 'a "red" circle'


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = draw_clips(tmp_path_factory.mktemp("clips"), [(9, 64, 96)] * 3)
    export_to_video(np.zeros((2, 64, 96, 3), np.uint8), folder / "short.mp4", fps=8)
    (folder / "short.txt").write_text("too short")
    return folder


def run_of(folder: Path, model: Path, clips: Path, **sections) -> Path:
    values = {
        "model": {"path": str(model)},
        "data": {"root": str(clips), "fps": 8.0, "max_bad": 1.0, "trigger_word": "sks"},
        "run": {"device": "cpu", "dtype": "float32"},
        "train": {"dir": str(folder / "mine"), "steps": 4, "save_every": 2, "log_every": 1, "learning_rate": 1e-2,
                  "checkpointing": "none", **sections.pop("train")},
        **sections,
    }  # fmt: skip
    return train.run(check(values, source="test"))


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, tiny_model, clips) -> Path:
    """Text to video, LoRA, with averages and sample videos."""
    return run_of(
        tmp_path_factory.mktemp("lora"), tiny_model("cogvideox1.5-5b"), clips, lora={"rank": 4, "alpha": 8.0},
        train={"ema_decay": 0.5}, validation={"every": 2, "num_clips": 1, "prompts": [PROMPT]}, sampling={"steps": 2},
    )  # fmt: skip


@pytest.fixture(scope="module")
def full_run(tmp_path_factory, tiny_model, clips) -> Path:
    """Image to video, all weights but the learned positions, in bfloat16."""
    return run_of(
        tmp_path_factory.mktemp("full"), tiny_model("cogvideox-5b-i2v"), clips, task="i2v",
        train={"method": "full"}, run={"device": "cpu", "dtype": "bfloat16"},
    )  # fmt: skip


def export(*words, says=None, capsys=None) -> int:
    code = main(["export", *(str(word) for word in words)])
    if says:
        error = capsys.readouterr().err
        assert says in error, error
        assert "Traceback" not in error
    return code


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["diffusers", "peft", "comfyui"])
@pytest.mark.parametrize("alpha", ["kept", "baked"])
def test_a_lora_adds_the_same_in_every_form(lora_run, tmp_path, form, alpha):
    assert export(lora_run, "--to", form, "--alpha", alpha, "--out", tmp_path / "out") == 0
    trained = load_lora(lora_run / "final")
    (path,) = (tmp_path / "out").glob("*.safetensors")
    again = load_lora(path)
    assert set(again.modules) == set(trained.modules)
    assert {again.scaling(module) for module in again.modules} == ({1.0} if alpha == "baked" else {2.0})
    for module in trained.modules:
        before, after = (
            file.scaling(module) * file.arrays[f"{module}.lora_B.weight"] @ file.arrays[f"{module}.lora_A.weight"]
            for file in (trained, again)
        )
        assert np.abs(before).max() > 0
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-8)


def test_a_merged_lora_predicts_as_the_lora_does(lora_run, tiny_model, tmp_path):
    out = tmp_path / "out"
    assert export(lora_run, "--to", "merged", "--out", out, "--max-shard-gb", 1e-4) == 0
    assert len(list((out / "transformer").glob("*-of-*.safetensors"))) > 3
    base = tiny_model("cogvideox1.5-5b")
    pipe = CogVideoXPipeline.from_pretrained(base)
    inputs = {
        "hidden_states": torch.randn(1, 4, 16, 8, 12), "encoder_hidden_states": torch.randn(1, 16, 32),
        "timestep": torch.tensor([500]), "return_dict": False,
        "image_rotary_emb": pipe._prepare_rotary_positional_embeddings(64, 96, 4, torch.device("cpu")),
    }  # fmt: skip
    with torch.no_grad():
        (plain,) = pipe.transformer(**inputs)
        pipe.load_lora_weights(str(lora_run / "final"), weight_name="pytorch_lora_weights.safetensors")
        (adapted,) = pipe.transformer(**inputs)
        merged = CogVideoXTransformer3DModel.from_pretrained(out / "transformer")
        (folded,) = merged(**inputs)
    assert (adapted - plain).abs().max() > 1e-3
    torch.testing.assert_close(folded, adapted, rtol=1e-4, atol=1e-5)


def test_a_lora_file_of_anybody_merges_into_a_base_that_is_named(lora_run, tiny_model, tmp_path, capsys):
    assert export(lora_run, "--to", "comfyui", "--out", tmp_path / "theirs") == 0
    file, base = tmp_path / "theirs" / "theirs.safetensors", tiny_model("cogvideox1.5-5b")
    assert export(file, "--to", "merged", says="give --base FOLDER", capsys=capsys) == 2
    assert export(file, "--to", "merged", "--base", base, "--strength", 0.5, "--dtype", "bfloat16") == 0
    out = tmp_path / "theirs" / "theirs-merged"
    for name, array in merged_tensors(base / "transformer", load_lora(file), strength=0.5, dtype="bfloat16"):
        np.testing.assert_array_equal(load_folder(out / "transformer")[name], array)
    assert "path/to/" in (out / "README.md").read_text()


# diffusers' names and those of ComfyUI's module tree (comfy/ldm/cogvideo/model.py), written down apart from ours
CORE = (
    (r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])", r"blocks.\1.\2"),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0", r"blocks.\1.attn_out"),
    (r"transformer_blocks\.(\d+)\.attn1\.norm_([qk])", r"blocks.\1.norm_\2"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"blocks.\1.ff_proj"),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"blocks.\1.ff_out"),
    (r"transformer_blocks\.(\d+)\.norm", r"blocks.\1.norm"),
    (r"(time|ofs)_embedding\.linear_", r"\1_embedding_linear_"),
)


@pytest.mark.parametrize("source", ["run", "checkpoint"])
def test_a_whole_model_for_comfyui_is_the_same_bytes_under_its_names(full_run, tmp_path, source):
    place = full_run if source == "run" else full_run / "checkpoint-000004"
    assert export(place, "--to", "comfyui", "--out", tmp_path / "fox") == 0
    assert sorted(path.name for path in (tmp_path / "fox").iterdir()) == ["README.md", "fox.safetensors", "loss.png"]
    theirs = load_file(tmp_path / "fox" / "fox.safetensors")
    expected = {}
    for name, array in load_folder(full_run / "final" / "transformer").items():
        for pattern, replacement in CORE:
            name = re.sub(f"^{pattern}", replacement, name)
        expected[name] = array
    assert theirs.keys() == expected.keys()
    for name, array in expected.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(theirs[name], array)
    assert "blocks.0.norm1.linear.weight" in theirs  # by which ComfyUI knows the architecture


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_last_checkpoint_holds_what_the_run_exported(lora_run, full_run, tmp_path, method):
    run = {"lora": lora_run, "full": full_run}[method]
    for step in (2, 4):
        assert (
            export(run / f"checkpoint-00000{step}", "--to", "diffusers", "--out", tmp_path / str(step) / "final") == 0
        )
    last, earlier, final = weights_of(tmp_path / "4"), weights_of(tmp_path / "2"), weights_of(run)
    assert last.keys() == earlier.keys() == final.keys()
    for name, array in final.items():
        assert array.dtype == last[name].dtype
        np.testing.assert_array_equal(last[name], array, err_msg=name)
    assert any(not np.array_equal(earlier[name], array) for name, array in final.items())
    config = "final/transformer/config.json"
    assert method == "lora" or (tmp_path / "4" / config).read_text() == (run / config).read_text()


def test_raw_weights_and_their_average_are_both_to_be_had(lora_run, full_run, tmp_path, capsys):
    folder = lora_run / "checkpoint-000004"
    for kind in ("raw", "average", "auto"):
        assert export(folder, "--to", "diffusers", "--weights", kind, "--out", tmp_path / kind / "final") == 0
    raw, average, auto = (weights_of(tmp_path / kind) for kind in ("raw", "average", "auto"))
    assert all(np.array_equal(average[name], auto[name]) for name in average)
    assert any(not np.array_equal(average[name], raw[name]) for name in average)
    words = (full_run / "checkpoint-000004", "--to", "diffusers", "--weights", "average", "--out", tmp_path / "x")
    assert export(*words, says="holds no average", capsys=capsys) == 2


# --- cards ------------------------------------------------------------------------------------------------------------


def test_the_card_tells_what_was_learnt_and_nothing_of_the_machine(lora_run, clips, tmp_path):
    assert export(lora_run / "checkpoint-000002", "--to", "peft", "--out", tmp_path / "fox") == 0
    for card, steps in ((tmp_path / "fox" / "README.md", 2), (lora_run / "final" / "README.md", 4)):
        front = ModelCard.load(card, ignore_metadata_errors=False).data
        assert front.pipeline_tag == "text-to-video"
        assert front.instance_prompt == "sks"
        assert {"cogvideox", "lora", "text-to-video"} <= set(front.tags)
        text = card.read_text()
        for part in ("4: 3 used, 1 too_short", f"{steps} of 1 clip", "9 frames of 64 x 96", "rank: 4", PROMPT):
            assert part in text, part
        for private in (tmp_path, clips, lora_run.parent, Path.home()):
            assert str(private) not in text
        for picture in ("loss.png", "samples.png"):
            assert f"]({picture})" in text
            pixels = np.asarray(Image.open(card.with_name(picture)))
            assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 5  # something is drawn
    assert ModelCard.load(tmp_path / "fox" / "README.md").data.library_name == "peft"


@pytest.mark.parametrize(
    ("path", "hub_id", "licence"),
    [
        ("THUDM/CogVideoX-2b", "THUDM/CogVideoX-2b", "apache-2.0"),
        ("zai-org/CogVideoX1.5-5B-I2V", "zai-org/CogVideoX1.5-5B-I2V", "cogvideox-license"),
        ("/x/hub/models--THUDM--CogVideoX-5b/snapshots/abc", "THUDM/CogVideoX-5b", "cogvideox-license"),
        ("me/my-model", "me/my-model", None),
        ("/home/ann/secret/CogVideoX-5b", None, None),
    ],
)
def test_the_base_model_is_named_without_the_machines_paths(path, hub_id, licence):
    base = base_of(path)
    assert base.hub_id == hub_id
    assert base.licence.get("license_name", base.licence.get("license")) == licence
    assert base.name == (hub_id or "path/to/CogVideoX-5b")


def test_a_base_that_nobody_names_has_nothing_of_the_folder_one_is_in(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.chdir(tmp_path)
    assert (base_of("").name, base_of("").licence) == ("path/to/the-base-model", {})


def test_a_local_base_hands_down_its_licence(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: 'mine'\ntags: [x]\n---\nlicense: gone\n")
    assert base_of(str(tmp_path)).licence == {"license": "other", "license_name": "mine"}


@pytest.mark.parametrize("form", ["diffusers", "peft", "whole"])
def test_the_cards_python_runs_as_it_is(lora_run, full_run, tmp_path, monkeypatch, form):
    run = full_run if form == "whole" else lora_run
    assert export(run, "--to", "diffusers" if form == "whole" else form, "--out", tmp_path / "fox") == 0
    code = _stage(tmp_path, run, monkeypatch, "python")
    # diffusers writes MP4 with packages that are not installed here; the array is what the snippet is about.
    monkeypatch.setattr("diffusers.utils.export_to_video", lambda frames, path, fps: export_to_video(
        np.stack([np.asarray(frame) for frame in frames]), path, fps=fps))  # fmt: skip
    exec(compile(code, "card", "exec"), {})  # noqa: S102 - our own card
    assert (tmp_path / "video.mp4").stat().st_size > 0


@pytest.mark.parametrize("form", ["diffusers", "whole"])
def test_the_cards_command_runs_as_it_is(lora_run, full_run, tmp_path, monkeypatch, form):
    run = full_run if form == "whole" else lora_run
    assert export(run, "--to", "diffusers", "--out", tmp_path / "fox") == 0
    words = shlex.split(_stage(tmp_path, run, monkeypatch, "sh"))
    assert words[0] == "cogvideox"
    assert main([*words[1:], "--sampling.steps", "2", "--run.device", "cpu"]) == 0
    assert list((tmp_path / "videos").glob("*.mp4"))


def _stage(folder: Path, run: Path, monkeypatch, language: str) -> str:
    """Go where the card's names mean something, and return its first block of a language."""
    text = (folder / "fox" / "README.md").read_text()
    base = Path(read_recipe(run / "config.yaml").model.path)
    (folder / "path" / "to").mkdir(parents=True)
    (folder / "path" / "to" / base.name).symlink_to(base)
    Image.fromarray(np.full((64, 96, 3), 90, np.uint8)).save(folder / "first.png")
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return next(block for kind, block in blocks if kind == language)


# --- the command ------------------------------------------------------------------------------------------------------


def test_it_is_pushed_as_it_lies_there(lora_run, tmp_path, monkeypatch, capsys):
    with local.running() as hub:
        use(hub.url, monkeypatch)
        words = (lora_run, "--to", "diffusers", "--out", tmp_path / "out", "--push-to-hub", "fox")
        assert export(*words) == 0
        there = hub.repositories["ann/fox"]
        assert there == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
        assert hub.visibility["ann/fox"] == "private"
        assert (
            'load_lora_weights("ann/fox", weight_name="pytorch_lora_weights.safetensors")'
            in there["README.md"].decode()
        )
        use(hub.url, monkeypatch, token="hf_wrong")
        words = (*words[:4], tmp_path / "other", *words[5:])
        assert export(*words, says="hf auth login", capsys=capsys) == 4
        assert not (tmp_path / "other").exists()


def test_a_folder_that_is_there_is_replaced_only_when_asked(lora_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert export(lora_run, "--to", "peft", "--out", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert export(lora_run, "--to", "diffusers", "--out", out, says="is there already", capsys=capsys) == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert export(lora_run, "--to", "diffusers", "--out", out, "--overwrite", "True") == 0
    assert "adapter_model.safetensors" not in {path.name for path in out.iterdir()}


@pytest.mark.parametrize("place", ["a run", "what the source is in", "the source"])
def test_only_an_export_is_ever_replaced(lora_run, tmp_path, capsys, place):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    out = {"a run": run, "what the source is in": run, "the source": run / "final"}[place]
    source = lora_run if place == "a run" else run / "final"
    before = sorted(path.relative_to(run) for path in run.rglob("*"))
    words = (source, "--to", "peft", "--out", out, "--overwrite", "True")
    says = "is no export, it holds" if place == "a run" else "which is exported"
    assert export(*words, says=says, capsys=capsys) == 2
    assert sorted(path.relative_to(run) for path in run.rglob("*")) == before


def test_a_lora_with_layers_of_another_model_is_refused(tmp_path, capsys):
    arrays = {"lora_te_layer_0.lora_A.weight": np.zeros((2, 4)), "lora_te_layer_0.lora_B.weight": np.zeros((4, 2))}
    save_lora(tmp_path / "x.safetensors", arrays, rank=2, alpha=2, target_modules=["x"])
    words = (tmp_path / "x.safetensors", "--to", "diffusers")
    assert export(*words, says="none of a CogVideoX transformer: lora_te_layer_0", capsys=capsys) == 5


def test_names_with_quotes_and_pipes_leave_the_card_whole(lora_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(lora_run, run)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("trigger_word: sks", "trigger_word: 'a|b'"))
    out = tmp_path / 'it\'s "mine"'
    assert export(run, "--to", "diffusers", "--out", out) == 0
    text = (out / "README.md").read_text()
    assert "| trigger word | a\\|b |" in text
    blocks = dict(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))
    compile(blocks["python"], "card", "exec")
    words = shlex.split(blocks["sh"])
    assert words[words.index("--generate.lora") + 1] == out.name


def test_nothing_is_left_of_an_export_that_fails(lora_run, tiny_model, tmp_path, capsys):
    file = load_lora(lora_run / "final")
    file.arrays["transformer_blocks.1.attn1.to_v.lora_B.weight"][:] = 1e9  # found when most is written
    path = save_diffusers(tmp_path / "large", file)
    words = (path, "--to", "merged", "--base", tiny_model("cogvideox1.5-5b"), "--out", tmp_path / "out")
    assert export(*words, "--dtype", "float16", says="float16 cannot hold", capsys=capsys) == 5
    words = (lora_run, "--to", "merged", "--base", tmp_path / "absent", "--out", tmp_path / "out")
    assert export(*words, says="absent", capsys=capsys) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


@pytest.mark.parametrize(
    ("which", "words", "says"),
    [
        ("full", ["--to", "peft"], "is for LoRAs"),
        ("full", ["--to", "merged"], "folds a LoRA in"),
        ("full", ["--to", "diffusers", "--alpha", "baked"], "--alpha baked has no effect"),
        ("lora", ["--to", "merged", "--alpha", "baked"], "--alpha baked has no effect"),
        ("lora", ["--to", "peft", "--weights", "raw"], "--weights raw has no effect"),
        ("lora", ["--to", "peft", "--strength", "2"], "--strength has no effect"),
        ("lora", ["--to", "peft", "--max-shard-gb", "1"], "--max-shard-gb has no effect"),
        ("full", ["--to", "comfyui", "--max-shard-gb", "1"], "--max-shard-gb has no effect"),
        ("lora", ["--to", "peft", "--public", "True"], "--public has no effect"),
        ("lora", ["--to", "peft", "--push-to-hub", "a/b/c"], "no name of a repository"),
    ],
)
def test_what_would_do_nothing_is_refused(lora_run, full_run, tmp_path, capsys, which, words, says):
    run = {"lora": lora_run, "full": full_run}[which]
    assert export(run, *words, "--out", tmp_path / "out", says=says, capsys=capsys) == 2
    assert not (tmp_path / "out").exists()


def test_what_is_no_source_is_told(lora_run, tmp_path, capsys):
    assert export(tmp_path / "absent", "--to", "peft", says="nothing to export there", capsys=capsys) == 2
    unfinished = tmp_path / "run"
    unfinished.mkdir()
    (unfinished / "config.yaml").write_text((lora_run / "config.yaml").read_text())
    assert export(unfinished, "--to", "peft", says="is not finished", capsys=capsys) == 2
