"""Write what the MindSpore engine made: `python -m tests.golden.by_mindspore`, where MindSpore is installed.

A LoRA it trained, and a sample of the pixels of a video it made with it, for the other engine to make too; and what
`export` makes of its runs, LoRA and all weights, with what this engine predicts with them, for diffusers to load.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np

from cogvideox_factory.cli import main as cogvideox
from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.mindspore_engine import generate, train
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.lora import load_lora_into
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.tensors import save_tensors
from tests.golden import FOLDER, cases, record, runs


def exported(case: str, folder: Path) -> np.ndarray:
    """Train and export one of `runs.EXPORTED`; return what is predicted with it."""
    out = runs.EXPORTED[case]
    shutil.rmtree(out, ignore_errors=True)
    run_folder = train.run(runs.to_export(case, folder, engine="mindspore"))
    assert cogvideox(["export", str(run_folder), "--to", "diffusers", "--out", str(folder / "out")]) == 0
    shutil.copytree(folder / "out", out, ignore=shutil.ignore_patterns("*.md", "*.png"))
    if case.endswith("lora"):
        model = CogVideoXTransformer.from_folder(cases.model_folder(cases.TASKS["t2v"]) / "transformer")
        load_lora_into(model, load_lora(out / "pytorch_lora_weights.safetensors"))
    else:
        model = CogVideoXTransformer.from_folder(out / "transformer")
    step = cases.step_for(model.config)
    latents, prompt, timesteps = map(to_tensor, (step.latents, step.prompt_embeds, step.timesteps))
    return record(to_array(model.forward(latents, prompt, timesteps, positions=model.positions(**step.shape))), 256)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, lora = Path(name), runs.LORAS["mindspore"]
        run_folder = train.run(runs.recipe("t2v lora", folder, engine="mindspore"))
        shutil.copy(run_folder / "final" / "pytorch_lora_weights.safetensors", lora)
        ask = runs.video_request("t2v ddim lora", folder, engine="mindspore", generate={"lora": [str(lora)]})
        made = {"video": runs.seen(generate.run(ask)[0])}
    for case in runs.EXPORTED:
        with tempfile.TemporaryDirectory() as name:
            made[f"exported {case}"] = exported(case, Path(name))
    save_tensors(FOLDER / "by_mindspore.safetensors", made)


if __name__ == "__main__":
    main()
