"""`generate` on 2 and 4 processes: the frames of one process, each file written once, and what is refused."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from cogvideox_factory import videos
from cogvideox_factory.cli.generate import settings_of_run
from cogvideox_factory.data.picture import write_png
from cogvideox_factory.diffusion.samplers import guidance_scales
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import check, write_recipe
from cogvideox_factory.shapes import clip_shape
from cogvideox_factory.torch_engine import generate, sampling, train
from cogvideox_factory.torch_engine.ranks import Ranks
from tests.torch_engine.processes import run_in
from tests.torch_engine.test_generate import make_lora

PROMPTS = ["a red circle moves right", "a blue square", "two triangles meet"]
STEPS = 3

# (variant, parallel, prompts, LoRA, tiles, shortcuts); a batch of prompts that the groups of processes cannot share
# equally.
FIRST_BLOCK = {"first_block_cache": 9.0, "guidance_interval": [0.0, 0.7]}
CASES = {
    2: [
        ("cogvideox-2b", {"guidance": 2}, 1, True, False, {}),
        ("cogvideox-5b", {"sequence": 2}, 1, False, True, {}),
        ("cogvideox1.5-5b", {"zero": 3}, 3, True, True, {}),
        ("cogvideox-5b-i2v", {"guidance": 2, "zero": 3}, 1, False, False, {}),
        ("cogvideox-5b", {"guidance": 2, "zero": 3}, 1, True, True, FIRST_BLOCK | {"merge_lora": True}),
        ("cogvideox1.5-5b", {"zero": 3}, 3, False, True, {"tea_cache": 9.0}),
    ],
    4: [
        ("cogvideox1.5-5b-i2v", {"guidance": 2, "sequence": 2}, 1, True, True, {}),
        ("cogvideox-2b", {"sequence": 4, "zero": 3}, 1, False, False, {}),
        ("cogvideox1.5-5b", {"guidance": 2, "sequence": 2, "zero": 3}, 1, True, False, {}),
        ("cogvideox-5b-i2v", {"guidance": 2, "zero": 3, "replicas": 2}, 3, True, True, {}),
        ("cogvideox-5b", {"sequence": 2}, 3, False, True, {}),
        ("cogvideox-2b", {"guidance": 2, "sequence": 2}, 1, False, True, FIRST_BLOCK),
    ],
}


def settings(root, model, variant, out, *, parallel=None, prompts=1, lora=False, tiling=True, sampling=None, ask=None):
    is_i2v = variant.endswith("i2v")
    return check(
        {
            "task": "i2v" if is_i2v else "t2v",
            "model": {"path": str(model)},
            "sampling": {"steps": STEPS, "tiling": tiling, "negative_prompt": "grey"} | (sampling or {}),
            "generate": {
                "out": str(out), "prompt": PROMPTS[:prompts],
                "image": [str(root / "first.png")] if is_i2v else [],
                "lora": [str(root / f"{variant}.safetensors")] if lora else [],
            } | (ask or {}),
            "parallel": parallel or {},
            "run": {"device": "cpu"},
        },
        source="test",
    )  # fmt: skip


def generate_each(configs):
    """Generate; return for each run what this process wrote, and how often guidance was exchanged."""
    return [generate_and_watch(config) for config in configs]


def generate_and_watch(config):
    written, exchanged = [], []
    export, exchange = videos.export_to_video, sampling._exchanged

    def keep_frames(frames, path, **options):
        written.append(str(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path.with_suffix(".npy"), frames)
        return export(frames, path, **options)

    def counted(v, halves):
        exchanged.append(v.shape)
        return exchange(v, halves)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(videos, "export_to_video", keep_frames)
        patch.setattr(sampling, "_exchanged", counted)
        paths = generate.run(config)
    return [str(path) for path in paths], written, len(exchanged)


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("many")
    rows, columns = np.mgrid[0:64, 0:96]
    write_png(folder / "first.png", np.stack([rows * 3, columns * 2, 255 - rows * 3], axis=-1).astype(np.uint8))
    for variant in {case[0] for cases in CASES.values() for case in cases if case[3]}:
        make_lora(tiny_model, folder / f"{variant}.safetensors", variant=variant, seed=1)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("size", CASES)
def test_frames_equal_one_process_and_each_file_is_written_once(root, tiny_model, size, tmp_path, capsys):
    configs = [
        settings(root, tiny_model(variant), variant, tmp_path / f"many-{number}", parallel=parallel, prompts=prompts,
                 lora=lora, tiling=tiling, ask=ask)
        for number, (variant, parallel, prompts, lora, tiling, ask) in enumerate(CASES[size])
    ]  # fmt: skip
    results = run_in(size, generate_each, configs, folder=tmp_path)
    for number, (variant, parallel, prompts, lora, tiling, ask) in enumerate(CASES[size]):
        many, one = tmp_path / f"many-{number}", tmp_path / f"one-{number}"
        generate_and_watch(
            settings(root, tiny_model(variant), variant, one, prompts=prompts, lora=lora, tiling=tiling, ask=ask)
        )
        said = capsys.readouterr().out
        assert ("1 of 3 steps took over" in said) == ("first_block_cache" in ask or "tea_cache" in ask), said
        paths = results[0][number][0]
        written = Counter(path for by_rank in results for path in by_rank[number][1])
        assert written == Counter(dict.fromkeys(paths, 1)), "each file by one process, once"
        assert sorted(file.name for file in many.iterdir()) == sorted(file.name for file in one.iterdir())
        assert len(paths) == prompts
        guided = sum(scale > 1 for scale in guidance_scales(6.0, STEPS, interval=ask.get("guidance_interval", (0, 1))))
        made = {generate_share(parallel, size, prompts, rank) * guided for rank in range(size)}
        assert {by_rank[number][2] for by_rank in results} == made, "one exchange a guided step"
        for path in map(Path, paths):
            ours, alone = np.load(path.with_suffix(".npy")), np.load(one / path.with_suffix(".npy").name)
            assert ours.shape == alone.shape
            assert np.abs(ours.astype(int) - alone).max() <= 1, (variant, parallel)
            assert alone.std() > 5, "a constant picture would prove nothing"
            facts = [json.loads((folder / path.with_suffix(".json").name).read_text()) for folder in (many, one)]
            assert facts[0]["prompt"] == facts[1]["prompt"]


def generate_share(parallel, size, prompts, rank):
    """Return how many videos a process takes part in whose guidance it shares."""
    layout = Layout(size=size, **parallel)
    return len(generate.share_of(prompts, Ranks(layout=layout, rank=rank))) * (layout.guidance - 1)


def test_every_job_is_made_once_and_divided_weights_are_met_equally_often():
    for size, zero, guidance, sequence, num_jobs in (
        (4, 0, 1, 1, 7), (4, 3, 1, 1, 7), (8, 3, 2, 2, 5), (8, 0, 2, 1, 4), (6, 3, 1, 3, 9), (1, 0, 1, 1, 3),
    ):  # fmt: skip
        layout = Layout(size=size, zero=zero, guidance=guidance, sequence=sequence)
        shares = [generate.share_of(num_jobs, Ranks(layout=layout, rank=rank)) for rank in range(size)]
        assert sorted(index for share in shares for index, writes in share if writes) == list(range(num_jobs))
        if zero == 3:
            assert len({len(share) for share in shares}) == 1
        for rank, share in enumerate(shares):  # the processes of a video go through the same videos
            first = shares[rank - rank % (guidance * sequence)]
            assert [index for index, _ in share] == [index for index, _ in first]


def plan_for(config, layout):
    transformer = TransformerConfig.from_folder(Path(config.model.path) / "transformer")
    shape = clip_shape(transformer, num_frames=None, height=None, width=None)
    return generate._plan(config, transformer, shape, layout, torch.device("cpu"), torch.float32, tiling=False)


def test_layouts_that_would_do_nothing_are_refused(root, tiny_model, tmp_path, capsys):
    def config(**values):
        return settings(root, tiny_model("cogvideox-2b"), "cogvideox-2b", tmp_path / "out", **values)

    with pytest.raises(FactoryError, match=r"parallel\.zero=2 divides the optimizer or gradients.*Use 3"):
        generate.layout_for(config(parallel={"zero": 2}), 2)
    with pytest.raises(FactoryError, match=r"parallel\.guidance=2 with 3 processes"):
        generate.layout_for(config(parallel={"guidance": 2}), 3)
    with pytest.raises(FactoryError, match=r"sequence=3 x parallel\.guidance=2 does not divide the 4.*\[1, 2\]"):
        generate.layout_for(config(parallel={"guidance": 2, "sequence": 3}), 4)
    with pytest.raises(FactoryError, match=r"parallel\.guidance has no effect with sampling\.guidance_scale=1"):
        config(parallel={"guidance": 2}, sampling={"guidance_scale": 1.0})
    config(parallel={"guidance": 2}, sampling={"guidance_scale": 1.0, "dynamic_guidance": True})
    assert generate.layout_for(config(parallel={"sequence": 4}), 1) == Layout()
    assert "one process: parallel.*" in capsys.readouterr().out
    with pytest.raises(
        FactoryError, match=r"first_block_cache decides for each video.*2 videos.*Use generate\.tea_cache"
    ):
        generate.layout_for(config(parallel={"zero": 3, "sequence": 2}, ask=FIRST_BLOCK), 4)
    generate.layout_for(config(parallel={"zero": 3, "sequence": 2, "guidance": 2}, ask=FIRST_BLOCK), 4)
    few = config(prompts=2)
    with pytest.raises(FactoryError, match=r"2 video\(s\) for 4 groups.*--parallel\.guidance 2"):
        plan_for(few, Layout(size=4))
    values = few.model_dump() | {"parallel": {"guidance": 2}}
    values["cache"]["dir"] = str(tmp_path / "cache")
    with pytest.raises(FactoryError, match="training has no guidance"):
        train.run(check(values, source="test"))


def test_a_run_folder_brings_no_layout_of_its_training(root, tiny_model, tmp_path):
    config = settings(root, tiny_model("cogvideox-2b"), "cogvideox-2b", tmp_path / "out", parallel={"zero": 2})
    write_recipe(tmp_path / "run" / "config.yaml", config)
    shutil.copy(root / "cogvideox-2b.safetensors", tmp_path / "run" / "pytorch_lora_weights.safetensors")
    asked = settings_of_run(tmp_path / "run")
    assert asked.generate.lora == [str(tmp_path / "run")]
    assert generate.layout_for(asked, 2) == Layout(size=2)
