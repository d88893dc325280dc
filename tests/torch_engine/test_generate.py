"""What `generate` plans and writes: prompts, images, LoRAs, names, and what it never overwrites."""

import json
import sys

import numpy as np
import pytest
import torch

from cogvideox_factory.cli import main
from cogvideox_factory.data.export import export_to_video
from cogvideox_factory.data.image import read_image
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.errors import DataError, ExhaustedError, FactoryError, MissingError, StorageError
from cogvideox_factory.jobs import read_record
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import check
from cogvideox_factory.torch_engine import generate, lora, prompts
from cogvideox_factory.torch_engine.lora_linear import LoraLinear
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


def make_lora(
    tiny_model, path, *, seed: int, scale: float = 0.5, variant: str = "cogvideox-2b", use_dora: bool = False
):
    pipe = CogVideoXPipeline.from_pretrained(tiny_model(variant), device="cpu", text_encoder=False)
    lora.add_lora(pipe.transformer, rank=4, alpha=4, seed=seed, use_dora=use_dora)
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
    prompts = [read_record(path)["settings"]["generate"]["prompt"] for path in paths]
    assert prompts == [["The First!"], ["the second: Ünïcode & more"], ["the third"]]
    assert [json.loads(path.with_suffix(".json").read_text()) for path in paths] == [read_record(p) for p in paths]


def test_the_same_command_again_makes_only_what_is_missing(tiny_model, tmp_path, capsys):
    config = settings(tiny_model, tmp_path, prompt=["a", "b", "c"])
    paths = generate.run(config)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}
    paths[1].unlink()
    assert generate.run(config) == paths
    assert "2 of 3 video(s) are there already" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in paths} == {path: data for path, (data, _) in before.items()}
    assert [path.stat().st_mtime_ns == before[path][1] for path in paths] == [True, False, True]
    other = settings(tiny_model, tmp_path, prompt=["a"], sampling={"guidance_scale": 2.0})
    with pytest.raises(StorageError, match=r"000-a\.mp4 exist.*other settings"):
        generate.run(other)
    (tmp_path / "out" / "000-a.json").unlink()
    (tmp_path / "out" / "000-a.mp4").write_bytes(b"somebody else's")
    with pytest.raises(StorageError, match="exist"):
        generate.run(config)
    assert (tmp_path / "out" / "000-a.mp4").read_bytes() == b"somebody else's"
    generate.run(settings(tiny_model, tmp_path, prompt=["a"], overwrite=True))
    assert paths[0].read_bytes() == before[paths[0]][0]


LIKE = {
    "mp4": ({"merge_lora": True, "first_block_cache": 9.0}, ["--generate.first-block-cache", "0"]),
    "webp": (
        {"tea_cache": 9.0, "tea_cache_polynomial": [2.0, 0.0]},
        ["--generate.tea-cache", "0", "--generate.tea-cache-polynomial"],
    ),
    "npy": ({"guidance_interval": [0.0, 0.7]}, ["--generate.guidance-interval", "0", "1"]),
}
"""By format: lossy settings that a record must hold, and the words that take them back."""


@pytest.mark.parametrize("ending", LIKE)
def test_a_video_like_another_is_the_same_to_the_bit(tiny_model, tmp_path, ending, monkeypatch):
    file = make_lora(tiny_model, tmp_path / "lora.safetensors", seed=1)
    lossy, taken_back = LIKE[ending]
    config = settings(
        tiny_model, tmp_path, prompt=["x", "y"], seeds=[5, 6], num_videos=2, format=ending, lora=[str(file)],
        lora_weight=[0.5], sampling={"steps": 3, "negative_prompt": "z", "dynamic_guidance": True}, **lossy,
    )  # fmt: skip
    made = generate.run(config)
    assert [path.name for path in made] == [f"{i:03}-{p}-{s}.{ending}" for i, (p, s) in enumerate(
        [("x", 5), ("x", 6), ("y", 6), ("y", 7)])]  # fmt: skip
    copy = tmp_path / f"elsewhere.{ending}"
    made[2].rename(copy)
    if ending == "npy":
        made[2].with_suffix(".json").rename(copy.with_suffix(".json"))
    words = ["--like", str(copy), "--generate.out", str(tmp_path / "again")]
    assert main(["generate", *words]) == 0
    assert (tmp_path / "again" / f"000-y.{ending}").read_bytes() == copy.read_bytes(), "in its own format"
    recorded = read_record(copy)["settings"]["generate"]
    assert {name: recorded[name] for name in lossy} == lossy
    assert main(["generate", *words[:-1], str(tmp_path / f"plain.{ending}"), *taken_back]) == 0
    assert (tmp_path / f"plain.{ending}").read_bytes() != copy.read_bytes(), "they were not there for nothing"
    make_lora(tiny_model, file, seed=2)
    assert main(["generate", *words]) == 5


def test_a_video_that_says_nothing_is_like_none(tmp_path, capsys):
    path = export_to_video(np.zeros((3, 16, 16, 3), np.uint8), tmp_path / "v.mp4")
    for words, says in (([str(path)], "does not say how"), ([str(tmp_path / "w.mp4")], "no such video"), ([], "which")):
        assert main(["generate", "--like", *words]) == 2
        assert says in capsys.readouterr().err
    assert main(["generate", "recipe.yaml", "--like", str(path)]) == 2
    assert "comes first" in capsys.readouterr().err


def test_a_video_is_made_anew_and_another_gone_on_with(tiny_model, tmp_path):
    source = tmp_path / "source.mp4"
    ramp = np.linspace(30, 200, 12 * 64 * 96 * 3).reshape(12, 64, 96, 3).astype(np.uint8)
    export_to_video(ramp, source, fps=8)
    size = {"num_frames": 9, "height": 64, "width": 96, "fps": 8.0, "format": "npy"}

    def frames(variant="cogvideox-2b", **ask):
        name = "-".join(map(str, [variant, *ask.values()])).replace("/", "_")
        out = {"out": str(tmp_path / f"{name}.npy")}
        return np.load(
            generate.run(settings(tiny_model, tmp_path, variant=variant, prompt=["x"], **size | ask | out))[0]
        )

    little, much = (frames(video=[str(source)], strength=strength) for strength in (0.5, 1.0))
    assert little.shape == much.shape == (9, 64, 96, 3)
    assert not np.array_equal(little, much)
    longer = frames("cogvideox1.5-5b-i2v", extend=[str(source)])
    assert longer.shape == (12 + 9 - 1, 64, 96, 3)
    assert np.abs(longer[:12].astype(int) - ramp).mean() < 3, "the video it goes on with comes first, as it is"
    with pytest.raises(DataError, match=r"fewer --generate\.num-frames"):
        frames(video=[str(source)], num_frames=17)
    with pytest.raises(FactoryError, match="leaves none"):
        frames(video=[str(source)], strength=0.3)
    with pytest.raises(FactoryError, match=r"generate\.extend has no effect with task=t2v"):
        settings(tiny_model, tmp_path, prompt=["x"], extend=[str(source)])
    with pytest.raises(DataError, match="no such video"):
        frames(video=[str(tmp_path / "gone.mp4")])


def test_loras_add_up_with_their_weights(tiny_model, tmp_path):
    files = [make_lora(tiny_model, tmp_path / f"{i}.safetensors", seed=i) for i in (1, 2)]
    assert load_lora(files[0]).rank == 4

    def video(name: str, **ask) -> bytes:
        out = str(tmp_path / f"{name}.npy")
        return generate.run(settings(tiny_model, tmp_path, prompt=["x"], **ask | {"out": out}))[0].read_bytes()

    base, both = video("base"), video("both", lora=[str(f) for f in files])
    assert both != base
    assert video("first", lora=[str(f) for f in files], lora_weight=[1.0, 0.0]) == video("alone", lora=[str(files[0])])
    assert video("off", lora=[str(files[0])], lora_weight=[0.0]) == base


@pytest.mark.parametrize("use_dora", [False, True])
def test_merged_loras_make_the_video_that_live_ones_make(tiny_model, tmp_path, use_dora, monkeypatch):
    files = [make_lora(tiny_model, tmp_path / f"{i}.safetensors", seed=i, use_dora=use_dora) for i in (1, 2)]
    left, plain_call = [], CogVideoXPipeline.__call__

    def watched(pipe, *args, **kwargs):
        left.append(sum(isinstance(module, LoraLinear) for module in pipe.transformer.modules()))
        return plain_call(pipe, *args, **kwargs)

    monkeypatch.setattr(CogVideoXPipeline, "__call__", watched)

    def video(name: str, **ask) -> np.ndarray:
        ask |= {"lora": [str(file) for file in files], "lora_weight": [1.0, 0.5], "out": str(tmp_path / f"{name}.npy")}
        return np.load(generate.run(settings(tiny_model, tmp_path, prompt=["x"], **ask))[0])

    live, merged = video("live"), video("merged", merge_lora=True)
    assert np.abs(live.astype(int) - merged).max() <= 1
    assert live.std() > 5
    assert left[0] > 0 == left[1], "no adapter is left to be computed"


def test_a_codec_or_an_interval_that_cannot_be_is_refused_before_the_model_loads(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "load_pipeline", lambda *args, **kwargs: pytest.fail("the model was loaded"))
    ask = {"prompt": ["x"], "codec": "h265", "height": 32, "width": 48}
    with pytest.raises(FactoryError, match="32x48 is too small for h265"):
        generate.run(settings(tiny_model, tmp_path, variant="cogvideox-5b", **ask))
    monkeypatch.setattr("av.codecs_available", {"libx264"})
    with pytest.raises(MissingError, match="codec 'h265' cannot be written here; this build of PyAV has h264"):
        generate.run(settings(tiny_model, tmp_path, prompt=["x"], codec="h265"))
    with pytest.raises(FactoryError, match=r"guidance_interval=0\.2 0\.21 holds none of 2 steps"):
        generate.run(settings(tiny_model, tmp_path, prompt=["x"], guidance_interval=[0.2, 0.21]))


def test_one_image_for_all_prompts_or_one_each(tiny_model, tmp_path, monkeypatch):
    images = [write_png(tmp_path / f"{i}.png", np.full((30, 40, 3), 60 * i, np.uint8)) for i in (1, 2)]
    variant = "cogvideox1.5-5b-i2v"
    reads = []
    with monkeypatch.context() as patch:
        patch.setattr("cogvideox_factory.videos.read_image", lambda *args: reads.append(args) or read_image(*args))
        shared = generate.run(
            settings(tiny_model, tmp_path, variant=variant, prompt=["a", "b"], image=[str(images[0])])
        )
    assert len(reads) == 1 + 2, "once before anything is loaded, and for each video"
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
    with pytest.raises(FactoryError, match="one file for 2 videos"):
        generate.run(settings(tiny_model, tmp_path, prompt=["a", "b"], out=str(tmp_path / "x.MP4")))


def test_out_of_memory_tells_which_video_and_what_would_help(tiny_model, tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(CogVideoXPipeline, "__call__", full)
    with pytest.raises(ExhaustedError) as caught:
        generate.run(settings(tiny_model, tmp_path, prompt=["x"], num_frames=17))
    assert caught.value.exit_code == 4
    assert "out of memory while making 000-x.mp4: " in str(caught.value)
    assert "--sampling.tiling True: about " in str(caught.value)


def test_what_a_video_takes_is_said_before_anything_is_loaded(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "free_memory", lambda device: 2**20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "load_text_encoder", lambda *args, **kwargs: pytest.fail("too early"))
        with pytest.raises(pytest.fail.Exception):
            generate.run(settings(tiny_model, tmp_path, prompt=["x"]))
    told = capsys.readouterr().out
    assert "memory on the device: about 0.0" in told
    assert "(offload none, tiling True); 0.00 GiB are free" in told
    assert "that is more than 90% of what is free, and may fail; --generate.num-frames 1 needs" in told


def test_pictures_are_decoded_whole_where_that_fits_and_either_counts_as_done(
    tiny_model, tmp_path, monkeypatch, capsys
):
    config = settings(tiny_model, tmp_path, prompt=["x", "y"])
    paths = generate.run(config)
    assert [read_record(path)["settings"]["sampling"]["tiling"] for path in paths] == [False, False]
    assert "offload" not in read_record(paths[0])["settings"]["generate"]
    paths[1].unlink()
    monkeypatch.setattr(generate, "free_memory", lambda device: 2**20)
    capsys.readouterr()
    assert generate.run(config) == paths
    assert "1 of 2 video(s) are there already" in capsys.readouterr().out
    assert read_record(paths[1])["settings"]["sampling"]["tiling"] is True
    with pytest.raises(StorageError, match="other settings"):
        generate.run(settings(tiny_model, tmp_path, prompt=["x", "y"], sampling={"tiling": True}))


def test_ways_of_keeping_weights_that_cannot_be_are_refused(tiny_model, tmp_path, monkeypatch):
    for offload in ("model", "block", "group"):
        with pytest.raises(FactoryError, match=rf"generate\.offload={offload} keeps in host memory.*Leave it at auto"):
            generate.run(settings(tiny_model, tmp_path, prompt=["x"], offload=offload))
    with pytest.raises(FactoryError, match=r"generate\.offload_group has no effect with generate\.offload other than"):
        settings(tiny_model, tmp_path, prompt=["x"], offload="block", offload_group=2)
    for options, name in (({"base": "int8"}, "generate.base=int8"), ({"offload": "block"}, "generate.offload=block")):
        config = settings(tiny_model, tmp_path, prompt=["x"], **options)
        with pytest.raises(FactoryError, match=rf"{name} keeps weights whole.*parallel\.zero=0, or no generate\."):
            generate._check_keeping(config, Layout(size=2, zero=3), torch.device("meta"))
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(MissingError, match=r"generate\.base=int8 needs torchao.*Or use --generate\.base model"):
        generate.run(settings(tiny_model, tmp_path, prompt=["x"], base="int8"))


def test_a_base_of_few_bits_is_part_of_what_a_video_is(tiny_model, tmp_path):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    file = make_lora(tiny_model, tmp_path / "lora.safetensors", seed=1)
    path = generate.run(settings(tiny_model, tmp_path, prompt=["x"], base="int8", lora=[str(file)]))[0]
    assert read_record(path)["settings"]["generate"]["base"] == "int8"
    with pytest.raises(StorageError, match="other settings"):
        generate.run(settings(tiny_model, tmp_path, prompt=["x"], lora=[str(file)]))
