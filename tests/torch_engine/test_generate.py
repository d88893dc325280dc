"""What `generate` plans and writes: prompts, images, LoRAs, names, and what it never overwrites."""

import json

import numpy as np
import pytest

from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import DataError, FactoryError, StorageError
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import generate, lora
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline


def settings(tiny_model, tmp_path, *, variant="cogvideox-2b", sampling=None, **ask):
    task = "i2v" if variant.endswith("i2v") else "t2v"
    values = {
        "task": task,
        "model": {"path": str(tiny_model(variant))},
        "sampling": {"steps": 2} | (sampling or {}),
        "generate": {"out": str(tmp_path / "out")} | ask,
        "run": {"device": "cpu"},
    }
    return check(values, source="test")


def make_lora(tiny_model, path, *, seed: int, scale: float = 0.5):
    pipe = CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-2b"), device="cpu", text_encoder=False)
    lora.add_lora(pipe.transformer, rank=4, alpha=4, seed=seed)
    arrays = lora.lora_arrays(pipe.transformer)
    rng = np.random.default_rng(seed)
    arrays = {
        k: (scale * rng.standard_normal(v.shape)).astype(np.float32) if "lora_B" in k else v for k, v in arrays.items()
    }
    return save_lora(path, arrays, **lora.lora_settings(pipe.transformer))


def test_prompts_come_from_flags_and_file_in_order(tiny_model, tmp_path):
    (tmp_path / "prompts.txt").write_text("the second: Ünïcode & more\n\nthe third\n")
    config = settings(tiny_model, tmp_path, prompt=["The First!"], prompt_file=str(tmp_path / "prompts.txt"))
    paths = generate.run(config)
    assert [p.name for p in paths] == ["000-the-first.mp4", "001-the-second-n-code-more.mp4", "002-the-third.mp4"]
    assert [json.loads(p.with_suffix(".json").read_text())["prompt"] for p in paths] == [
        "The First!", "the second: Ünïcode & more", "the third"
    ]  # fmt: skip
    with pytest.raises(StorageError, match="exist"):
        generate.run(config)
    again = settings(tiny_model, tmp_path, prompt=["The First!"], overwrite=True)
    before = paths[0].read_bytes()
    assert generate.run(again)[0].read_bytes() == before, "the same seed and settings give the same file"


def test_loras_add_up_with_their_weights(tiny_model, tmp_path):
    files = [make_lora(tiny_model, tmp_path / f"{i}.safetensors", seed=i) for i in (1, 2)]
    assert load_lora(files[0]).rank == 4

    def video(name: str, **ask) -> bytes:
        out = str(tmp_path / f"{name}.mp4")
        return generate.run(settings(tiny_model, tmp_path, prompt=["x"], **ask | {"out": out}))[0].read_bytes()

    base, both = video("base"), video("both", lora=[str(f) for f in files])
    assert both != base
    assert video("first", lora=[str(f) for f in files], lora_weight=[1.0, 0.0]) == video("alone", lora=[str(files[0])])
    assert video("off", lora=[str(files[0])], lora_weight=[0.0]) == base


def test_one_image_for_all_prompts_or_one_each(tiny_model, tmp_path):
    images = [write_png(tmp_path / f"{i}.png", np.full((30, 40, 3), 60 * i, np.uint8)) for i in (1, 2)]
    variant = "cogvideox1.5-5b-i2v"
    shared = generate.run(settings(tiny_model, tmp_path, variant=variant, prompt=["a", "b"], image=[str(images[0])]))
    each = generate.run(
        settings(
            tiny_model, tmp_path, variant=variant, prompt=["a", "b"], image=[str(i) for i in images],
            out=str(tmp_path / "each"),
        )
    )  # fmt: skip
    assert shared[0].read_bytes() == each[0].read_bytes()
    assert shared[1].read_bytes() != each[1].read_bytes()
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    for images_given, error, says in (
        ([], FactoryError, "one a prompt"),
        ([str(tmp_path / "none.png")], DataError, "no such image"),
        ([str(tmp_path / "broken.png")], DataError, "broken.png"),
    ):
        config = settings(
            tiny_model, tmp_path, variant=variant, prompt=["a"], image=images_given, out=str(tmp_path / "no")
        )
        with pytest.raises(error, match=says):
            generate.run(config)
    assert not (tmp_path / "no").exists()


def test_dynamic_guidance_and_samplers_change_the_video(tiny_model, tmp_path):
    videos = set()
    for name, sampling in (
        ("plain", {}), ("dynamic", {"dynamic_guidance": True}), ("dpm", {"sampler": "dpm"}),
        ("from one", {"dynamic_guidance": True, "guidance_scale": 1.0}), ("other", {"negative_prompt": "red"}),
    ):  # fmt: skip
        out = str(tmp_path / f"{name}.mp4")
        config = settings(tiny_model, tmp_path, prompt=["a circle"], out=out, sampling={"steps": 4} | sampling)
        videos.add(generate.run(config)[0].read_bytes())
    assert len(videos) == 5


def test_frames_the_vae_adds_are_cut_with_a_word(tiny_model, tmp_path, capsys):
    out = str(tmp_path / "five.mp4")
    generate.run(settings(tiny_model, tmp_path, prompt=["x"], num_frames=5, out=out))
    assert "5 frames asked, the VAE decodes 8; the last 3 are cut" in capsys.readouterr().out


def test_one_file_for_many_prompts_is_refused(tiny_model, tmp_path):
    with pytest.raises(FactoryError, match="one file for 2 prompts"):
        generate.run(settings(tiny_model, tmp_path, prompt=["a", "b"], out=str(tmp_path / "x.MP4")))
