"""`replay`: a step that went wrong, computed again from what its run kept of it (`bad_steps`), on one device.

The batch is the one of that step to the bit; the weights are those of the newest checkpoint at that time, or the run's
first ones. Numbers that are wrong again point at data, weights or dtype; numbers that are right, at the steps in
between or at the machine.
"""

import json
from pathlib import Path
from typing import Any

import torch

from cogvideox_factory.checkpoints import checkpoint_folder, list_checkpoints
from cogvideox_factory.config import Config
from cogvideox_factory.data.replay import read_batch
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import say
from cogvideox_factory.ranks import Layout
from cogvideox_factory.recipe import read_recipe
from cogvideox_factory.torch_engine import checkpoint
from cogvideox_factory.torch_engine.device import pick_device
from cogvideox_factory.torch_engine.encode import Encoder
from cogvideox_factory.torch_engine.examine import first_not_finite
from cogvideox_factory.torch_engine.learner import load_transformer, make_objective, make_update
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.start import Plan, make_plan
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.watch import to_device


def run(file: Path, *, device: str | None = None, dtype: str | None = None, weights_of: Path | None = None) -> bool:
    """Compute the step of `RUN/replay/step-N.json` again, say what comes out, and return whether all is finite.

    Args:
        file: what the run kept.
        device: instead of the run's.
        dtype: instead of the run's.
        weights_of: a checkpoint of the run, instead of the newest at that time.

    Raises:
        MissingError, UnfitError: no such file, or one of something else; a checkpoint that is no longer there.
    """
    known, run_folder = _read(file), file.resolve().parent.parent
    folder = weights_of or _checkpoint(run_folder, known["checkpoint"])
    plan = make_plan(_with_run(read_recipe(run_folder / "config.yaml"), device=device, dtype=dtype))
    ranks = Ranks(layout=Layout())
    transformer = load_transformer(plan, ranks)
    update = make_update(plan, transformer, ranks)
    if folder is not None:
        weights = {name: tensor for name, tensor in update.tensors().items() if name.startswith("model.")}
        update.restore(checkpoint.load_checkpoint(folder, weights, only="model.")["scalars"])
    objective = make_objective(plan, transformer)
    say(f"step {known['step']} ({known['reason']}) with the weights of {folder or 'the start'}")
    batches = [to_device(read_batch(file.parent / name), plan.device) for name in known["files"]]
    if any("pixels" in batch for batch in batches):
        encoder = _load_encoder(plan)
        batches = [encoder.batch(batch) for batch in batches]
    with torch.no_grad():
        for batch in batches:
            losses, timesteps = objective(batch).tolist(), batch["timesteps"].tolist()
            for clip_id, timestep, loss in zip(batch["clip_ids"], timesteps, losses, strict=True):
                say(f"  {clip_id} at timestep {timestep}: loss {loss:.6g}")
    where = first_not_finite(objective, update, batches, ranks)
    say(f"first not finite: {where}" if where else "all is finite: losses, outputs and gradients of every module")
    return where is None


def _read(file: Path) -> dict[str, Any]:
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {key: known[key] for key in ("step", "reason", "checkpoint", "files")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnfitError(f"{file} is no step that training kept ({error}); give a RUN/replay/step-N.json.") from error


def _checkpoint(run_folder: Path, name: str | None) -> Path | None:
    """Return the checkpoint that was the newest at the time, None for the start of the run."""
    if name is None:
        return None
    if (run_folder / name).is_dir():
        return run_folder / name
    there = ", ".join(str(checkpoint_folder(run_folder, step)) for step in list_checkpoints(run_folder))
    raise UnfitError(
        f"{run_folder / name} is no longer there (train.keep_checkpoints). The weights of another one may do: "
        f"--checkpoint with one of {there or 'none, for the run has none left'}."
    )


def _with_run(config: Config, **given: str | None) -> Config:
    """Return the settings of the step, `given` ones changed; on a CPU nothing is moved out of a card's way.

    Weights are rounded by no update here, so any dtype will do.
    """
    run = config.run.model_copy(update={key: value for key, value in given.items() if value is not None})
    train = config.train.model_copy(update={"master_weights": "float32"})
    if pick_device(run.device).type == "cpu":
        train = train.model_copy(update={"activation_offload": False, "optimizer_offload": False, "swapped_blocks": 0})
    if given.get("dtype") in ("float32", "float16"):  # products in float8 are of bfloat16
        train = train.model_copy(update={"fp8": "none"})
    return config.model_copy(update={"run": run, "train": train})


def _load_encoder(plan: Plan) -> Encoder:
    vae = CogVideoXVAE.from_folder(plan.folder / "vae", dtype=plan.dtype, device=plan.device).requires_grad_(False)
    if plan.config.data.vae_tiling:
        vae.enable_tiling()
    text_encoder = TextEncoder.from_folder(plan.folder, dtype=plan.dtype, device=plan.device)
    return Encoder(vae, text_encoder, max_sequence_length=plan.text_length)
