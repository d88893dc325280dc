"""CLIP scores: the same numbers as transformers' own processor and model, on a tiny random CLIP."""

import json

import numpy as np
import pytest
import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.errors import MissingError, UnfitError
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine.clip import Clip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    words = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ids = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={**small, "vocab_size": len(words), **ids},
        vision_config={**small, "image_size": 32, "patch_size": 8},
        projection_dim=8,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_it_is_the_cosine_of_transformers_own_features(folder):
    video = render(random_scene(0, 1), num_frames=5, height=48, width=80, fps=8)
    prompt = "a large red circle moves right"
    model, tokenizer = CLIPModel.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder)
    pictures = CLIPImageProcessor.from_pretrained(folder)(list(video), return_tensors="pt")
    with torch.no_grad():
        outputs = model(**tokenizer([prompt], return_tensors="pt"), **pictures)
    expected = float((outputs.image_embeds @ outputs.text_embeds.T).mean())
    ours = Clip.from_folder(folder)
    assert float((ours.pictures(torch.from_numpy(video)) - pictures["pixel_values"]).abs().max()) < 0.05
    assert ours.similarity(video, prompt) == pytest.approx(expected, abs=2e-3)


def test_evaluate_reports_it_and_needs_prompts(folder, tmp_path, capsys):
    scene = random_scene(0, 2)
    export_to_video(render(scene, num_frames=5, height=32, width=32, fps=8), tmp_path / "v" / "0.mp4")
    words = ["evaluate", str(tmp_path / "v"), "--clip", str(folder), "--json", str(tmp_path / "r.json")]
    assert main(words) == 3
    assert "no prompt is known of 0.mp4" in capsys.readouterr().err
    (tmp_path / "v" / "0.txt").write_text(scene.caption)
    assert main(words) == 0
    assert -1 <= json.loads((tmp_path / "r.json").read_text())["mean"]["clip"] <= 1


def test_what_is_no_clip_is_refused(folder, tmp_path, tiny_model):
    with pytest.raises(MissingError, match="preprocessor_config"):
        Clip.from_folder(tiny_model("cogvideox-2b") / "text_encoder")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(MissingError, match="safetensors"):
        Clip.from_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UnfitError, match="cannot be loaded"):
        Clip.from_folder(tmp_path)


def test_long_videos_are_sampled_and_single_frames_do(folder):
    clip = Clip.from_folder(folder)
    frames = np.zeros((20, 32, 32, 3), np.uint8)
    assert clip.similarity(frames, "a") == pytest.approx(clip.similarity(frames[:1], "a"), abs=1e-5)
