"""Write the golden files with the PyTorch engine: `python -m tests.golden`."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.tensors import save_tensors
from cogvideox_factory.torch_engine import generate, prepare, train
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.lora import add_lora, load_lora_into, lora_arrays
from cogvideox_factory.torch_engine.lora_linear import LoraFactors
from cogvideox_factory.torch_engine.objective import Objective, Scales
from cogvideox_factory.torch_engine.optim import Update
from cogvideox_factory.torch_engine.sampling import denoise
from cogvideox_factory.torch_engine.text_encoder import TextEncoder
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from tests.golden import FOLDER, cases, record, runs


def transformer_of(case: str) -> CogVideoXTransformer:
    with torch.device("meta"):
        model = CogVideoXTransformer(cases.config_of(case))
    model.to_empty(device="cpu")
    model.load_arrays(cases.weights_of(case).items())
    return model


def run(model: CogVideoXTransformer, step: cases.Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return v, and the inputs with their gradients."""
    positions = model.positions(**step.shape, device="cpu", dtype=torch.float32)
    latents, prompt = (to_tensor(x).requires_grad_() for x in (step.latents, step.prompt_embeds))
    ofs = None if step.ofs is None else to_tensor(step.ofs)
    v = model(latents, prompt, to_tensor(step.timesteps), positions=positions, ofs=ofs)
    v.backward(to_tensor(step.grad))
    return v, latents, prompt


def gradients(model: CogVideoXTransformer) -> dict[str, np.ndarray]:
    """Return the gradient of every weight by its diffusers name."""
    own = dict(model.named_parameters())
    slots = {name: slot for name, slot in diffusers_names(model.config).items() if slot.name in own}
    return {name: to_array(own[slot.name].grad[slot.start : slot.stop]) for name, slot in slots.items()}


def transformers() -> dict[str, np.ndarray]:
    made = {}
    for case in (*cases.VARIANTS, cases.LARGER):
        model = transformer_of(case)
        v, latents, prompt = run(model, cases.step_of(case))
        made[f"{case}/v"] = record(to_array(v), 1024)
        made[f"{case}/latents"] = record(to_array(latents.grad), 256)
        made[f"{case}/prompt_embeds"] = record(to_array(prompt.grad), 256)
        made[f"{case}/weights"] = np.stack([record(grad) for _, grad in sorted(gradients(model).items())])
    return made


def vaes() -> dict[str, np.ndarray]:
    vae, made = CogVideoXVAE.from_folder(cases.vae_folder(), dtype=torch.float32), {}

    def put(name: str, pixels: np.ndarray, latents: np.ndarray) -> None:
        mean, logvar = vae.encode(to_tensor(pixels))
        made[f"{name}/mean"], made[f"{name}/logvar"] = record(to_array(mean), 256), record(to_array(logvar), 256)
        made[f"{name}/pixels"] = record(to_array(vae.decode(to_tensor(latents))), 1024)

    for frames in cases.VIDEO_FRAMES:
        count = vae.num_latent_frames(frames)
        put(str(frames), cases.pixels(frames), cases.latents(count))
    frames, height, width, tiles = cases.TILED
    vae.enable_tiling(**tiles)
    put("tiled", cases.pixels(frames, height, width, 2), cases.latents(3, height // 8, width // 8, 2))
    return made


def texts() -> dict[str, np.ndarray]:
    encoder = TextEncoder.from_folder(cases.model_folder("cogvideox-2b"), dtype=torch.float32)
    return {
        str(length): record(to_array(encoder.encode(cases.CAPTIONS, length)), 1024) for length in cases.TEXT_LENGTHS
    }


def adapter_gradients(model: CogVideoXTransformer) -> dict[str, np.ndarray]:
    """Return the gradient of every factor by its name in a LoRA file."""
    found = {}
    for part in (module for module in model.modules() if isinstance(module, LoraFactors)):
        found[f"{part.rows.name}.lora_A.weight"] = to_array(part.lora_A.grad)
        found[f"{part.rows.name}.lora_B.weight"] = to_array(part.lora_B.grad)
        if part.magnitude is not None:
            found[f"{part.rows.name}.lora_magnitude_vector"] = to_array(part.magnitude.grad)
    return found


def loras() -> dict[str, np.ndarray]:
    made = {}
    for case in cases.LORAS:
        model = transformer_of(cases.LORA_VARIANT)
        load_lora_into(model, cases.lora_file(case), trainable=True)
        v, _, _ = run(model, cases.step_of(cases.LORA_VARIANT))
        made[f"{case}/v"] = record(to_array(v), 1024)
        made[f"{case}/adapter"] = np.stack([record(grad) for _, grad in sorted(adapter_gradients(model).items())])
    return made


def trainings() -> dict[str, np.ndarray]:
    """Ten steps of two micro-batches: losses, norms of the gradient, and where the weights went."""
    made = {}
    for case, variant in cases.TRAININGS.items():
        method, model = case.split()[1], transformer_of(variant)
        if method == "lora":
            add_lora(model, rank=4, alpha=4, seed=0)
        objective = Objective(
            model, alphas_cumprod=alphas_cumprod(cases.PUBLISHED[variant].scheduler), scales=Scales(**cases.SCALES),
            device=torch.device("cpu"), dtype=torch.float32,
        )  # fmt: skip
        update = Update(
            model.named_parameters(), dtype=torch.float32, device=torch.device("cpu"), stochastic_bf16=False, seed=0,
            max_grad_norm=cases.MAX_GRAD_NORM[method], **cases.OPTIMIZER,
        )  # fmt: skip
        losses, norms = [], []
        for step in range(1, cases.NUM_STEPS + 1):
            for micro in range(cases.NUM_MICROS):
                batch = {name: to_tensor(array) for name, array in cases.batch_of(variant, step, micro).items()}
                loss = objective(batch)
                (loss.mean() / cases.NUM_MICROS).backward()
                losses.append(to_array(loss))
            norms.append(to_array(update.step(cases.learning_rate(step))))
        made[f"{case}/losses"], made[f"{case}/norms"] = np.stack(losses), np.stack(norms)
        arrays = lora_arrays(model) if method == "lora" else model.to_arrays()
        made[f"{case}/weights"] = np.stack([record(array) for _, array in sorted(arrays.items())])
    return made


def denoised() -> dict[str, np.ndarray]:
    """Where each of ten steps of a sampler led."""
    made = {}
    for case, variant in cases.DENOISING.items():
        model, given = transformer_of(variant), cases.denoising_of(case)
        denoise(
            model, to_tensor(given.latents), to_tensor(given.prompt_embeds), table=given.table,
            guidance=given.guidance, negative_embeds=to_tensor(given.negative_embeds),
            image_latents=None if given.image_latents is None else to_tensor(given.image_latents),
            step_noise=lambda step, given=given: to_tensor(given.noise(step)),
        )  # fmt: skip
        made[case] = np.stack([record(to_array(sample), 128) for sample in given.table.samples])
    return made


def encoded() -> dict[str, np.ndarray]:
    """A sample of every entry that this engine prepares."""
    with tempfile.TemporaryDirectory() as folder:
        prepare.run(runs.to_encode("i2v full", Path(folder)))
        return runs.entries_of(Path(folder) / "encoded")


def losses() -> dict[str, np.ndarray]:
    """Fifty steps of each run; what the LoRA learned is written beside."""
    made = {}
    for case in runs.RUNS:
        with tempfile.TemporaryDirectory() as folder:
            run_folder = train.run(runs.recipe(case, Path(folder)))
            made[case] = runs.losses(run_folder)
            if case.endswith("lora"):
                shutil.copy(run_folder / "final" / "pytorch_lora_weights.safetensors", runs.LORAS["torch"])
    return made


def buckets() -> dict[str, np.ndarray]:
    """The losses of each run of several shapes."""
    made = {}
    for case in runs.BUCKETED:
        with tempfile.TemporaryDirectory() as folder:
            made[case] = runs.losses(train.run(runs.bucketed(case, Path(folder))))
    return made


def videos() -> dict[str, np.ndarray]:
    """A sample of the pixels of each video."""
    made = {}
    for case in runs.VIDEOS:
        with tempfile.TemporaryDirectory() as folder:
            made[case] = runs.seen(generate.run(runs.video_request(case, Path(folder)))[0])
    return made


def main() -> None:
    files: dict[str, Callable[[], dict[str, np.ndarray]]] = {
        "denoising": denoised,
        "transformer": transformers, "vae": vaes, "text_encoder": texts, "lora": loras, "training": trainings,
        "encoded": encoded, "losses": losses, "buckets": buckets, "videos": videos,
    }  # fmt: skip
    for name, make in files.items():
        save_tensors(FOLDER / f"{name}.safetensors", make())


if __name__ == "__main__":
    main()
