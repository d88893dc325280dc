"""How far this engine is from the golden files: what its tests hold it to and `python -m tests.ascend` reports."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor

from cogvideox_factory.diffusion.frames import num_decoded_frames, num_latent_frames
from cogvideox_factory.diffusion.schedule import alphas_cumprod
from cogvideox_factory.mindspore_engine.border import load_parameters, to_array, to_tensor, to_tensors
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.learner import Learner
from cogvideox_factory.mindspore_engine.lora import add_lora, lora_arrays
from cogvideox_factory.mindspore_engine.objective import OFS, Objective, Scales
from cogvideox_factory.mindspore_engine.optim import Update
from cogvideox_factory.mindspore_engine.sampling import Predict, denoise
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.mindspore_engine.vae import CogVideoXVAE
from cogvideox_factory.models import PUBLISHED
from tests.golden import cases, difference, error, golden, record, worst

MODES = {"PyNative": Mode(), "O0": Mode(graph=True), "O1": Mode(graph=True, jit_level="O1")}
FORWARD, GRADIENT = 1e-5, 5e-5
"""Float32. Seen on a CPU are 3e-6 and 2e-5, as far as torch's float32 is from float64."""
STEPS = 2e-5
"""Of losses and norms of ten steps of training, of which a loss is about 1."""
SAMPLES = 2e-5
"""Of ten steps of denoising, each of which starts where the one before led; seen are 1.4e-6."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Apart:
    """By how much something is from the golden file, and by how much it may be; in parts of its largest entry."""

    what: str
    error: float
    limit: float

    @property
    def holds(self) -> bool:
        return self.error <= self.limit  # not so for NaN


def hold(found: Iterable[Apart]) -> None:
    """Fail where anything is further apart than it may be."""
    found = list(found)
    assert found
    assert not [part for part in found if not part.holds]


# --- the transformer --------------------------------------------------------------------------------------------------


def model_of(case: str) -> CogVideoXTransformer:
    model = CogVideoXTransformer(cases.config_of(case))
    load_parameters(model, cases.weights_of(case).items(), source=case)
    return model


def tensors_of(model: CogVideoXTransformer, step: cases.Step) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """Return the arguments of the model, and the gradient of its output."""
    positions = model.positions(**step.shape)
    latents, prompt, timesteps, grad = map(to_tensor, (step.latents, step.prompt_embeds, step.timesteps, step.grad))
    ofs = None if step.ofs is None else to_tensor(step.ofs)
    return (latents, prompt, timesteps, positions.cos, positions.sin, positions.added, ofs), grad


def transformer(case: str, mode: Mode) -> list[Apart]:
    """One call of a variant, and the gradients of its inputs and of all its weights."""
    model, expected = model_of(case), golden("transformer")
    args, grad = tensors_of(model, cases.step_of(case))
    weights = model.trainable_params()

    def run(latents, prompt, timesteps, cos, sin, added, ofs, grad):
        v = model(latents, prompt, timesteps, cos, sin, added, ofs)
        return (v * grad).sum(), v

    function = mode.compiled(ms.value_and_grad(run, (0, 1), weights, has_aux=True), of=model)
    (_, v), (of_inputs, of_weights) = function(*args, grad)
    found = {weight.name: to_array(value) for weight, value in zip(weights, of_weights)}
    return [
        Apart(what="v", error=error(to_array(v), expected[f"{case}/v"]), limit=FORWARD),
        *(
            Apart(what=f"gradient of {name}", error=error(to_array(value), expected[f"{case}/{name}"]), limit=GRADIENT)
            for name, value in zip(("latents", "prompt_embeds"), of_inputs)
        ),
        Apart(what="gradients of weights", error=worst(found, expected[f"{case}/weights"]), limit=GRADIENT),
    ]


def in_half(case: str, dtype: Any, *, limit: float) -> list[Apart]:
    """One call in half precision, weights too."""
    folder = cases.model_folder(case) / "transformer"
    model = CogVideoXTransformer.from_folder(folder, dtype=dtype)
    (latents, prompt, timesteps, cos, sin, added, ofs), _ = tensors_of(model, cases.step_of(case))
    halves = (None if x is None else x.astype(dtype) for x in (added, ofs))
    v = model(latents.astype(dtype), prompt.astype(dtype), timesteps, cos, sin, *halves)
    found = to_array(v.astype(ms.float32))
    return [Apart(what="v", error=error(found, golden("transformer")[f"{case}/v"]), limit=limit)]


# --- VAE and text -----------------------------------------------------------------------------------------------------


def videos(vae: CogVideoXVAE, case: str, pixels: np.ndarray, latents: np.ndarray) -> list[Apart]:
    """A video encoded, and another decoded."""
    expected = golden("vae")
    mean, logvar = vae.encode(to_tensor(pixels))
    decoded = vae.decode(to_tensor(latents))
    assert mean.shape[1] == num_latent_frames(pixels.shape[2])
    assert decoded.shape[2] == num_decoded_frames(latents.shape[1])
    found = {"mean": mean, "logvar": logvar, "pixels": decoded}
    return [
        Apart(what=name, error=error(to_array(tensor), expected[f"{case}/{name}"]), limit=FORWARD)
        for name, tensor in found.items()
    ]


def frames(vae: CogVideoXVAE, count: int) -> list[Apart]:
    """A video of so many frames."""
    return videos(vae, str(count), cases.pixels(count), cases.latents(num_latent_frames(count)))


def texts(length: int, mode: Mode) -> list[Apart]:
    """Captions of all kinds, cut or padded to a length."""
    encoder = TextEncoder.from_folder(cases.model_folder("cogvideox-2b"), mode=mode)
    embeds = encoder.encode(cases.CAPTIONS, length)
    assert embeds.shape == (len(cases.CAPTIONS), length, encoder.width)
    return [Apart(what="embeddings", error=error(to_array(embeds), golden("text_encoder")[str(length)]), limit=FORWARD)]


# --- training and denoising -------------------------------------------------------------------------------------------


def training(case: str, mode: Mode) -> list[Apart]:
    """Ten steps of two micro-batches, some of them clipped."""
    variant, method, expected = cases.TRAININGS[case], case.split()[1], golden("training")
    model = model_of(variant)
    if method == "lora":
        add_lora(model, rank=4, alpha=4, seed=0)
    scheduler = PUBLISHED[variant].scheduler
    objective = Objective(
        model, alphas_cumprod=alphas_cumprod(scheduler), scales=Scales(**cases.SCALES), dtype=ms.float32
    )
    most = cases.MAX_GRAD_NORM[method]
    update = Update(model.trainable_params(), max_grad_norm=most, mode=mode, **cases.OPTIMIZER)
    learner = Learner(objective, update, num_micros=cases.NUM_MICROS, mode=mode)
    losses, norms = [], []
    for step in range(1, cases.NUM_STEPS + 1):
        for micro in range(cases.NUM_MICROS):
            losses.append(to_array(learner.micro(to_tensors(cases.batch_of(variant, step, micro)))))
        norms.append(float(learner.step(cases.learning_rate(step))))
    assert min(norms) < most < max(norms), "the case is to clip some steps and others not"
    arrays = lora_arrays(model) if method == "lora" else dict(model.iterate_arrays())
    rows, allowed = expected[f"{case}/weights"], cases.trained_tolerances(case, len(arrays))
    of_weights = [difference(record(array), row) for (_, array), row in zip(sorted(arrays.items()), rows, strict=True)]
    wanted = expected[f"{case}/norms"]
    return [
        Apart(what="losses", error=float(np.abs(np.stack(losses) - expected[f"{case}/losses"]).max()), limit=STEPS),
        Apart(what="norms", error=float((np.abs(np.float32(norms) - wanted) / wanted).max()), limit=STEPS),
        *(
            Apart(what=what, error=max(e for e, most in zip(of_weights, allowed, strict=True) if most == limit),
                  limit=limit)
            for limit, what in ((1e-4, "weights"), (1e-3, "biases of k's norm")) if limit in allowed
        ),
    ]  # fmt: skip


def predict_by(model: CogVideoXTransformer, mode: Mode) -> Predict:
    """Return how `denoise` asks a transformer."""

    def call(*arguments):
        return model(*arguments)

    compiled = mode.compiled(call, of=model)
    ofs = to_tensor(np.full(1, OFS, np.float32)) if model.config.ofs_embed_dim else None

    def predict(latents: Tensor, prompt_embeds: Tensor, timesteps: Tensor) -> Tensor:
        _, frames, _, height, width = latents.shape
        places = model.positions(
            latent_frames=frames, latent_height=height, latent_width=width, text_length=prompt_embeds.shape[1]
        )
        return compiled(latents, prompt_embeds, timesteps, places.cos, places.sin, places.added, ofs)

    return predict


def denoising(case: str, predict: Predict) -> list[Apart]:
    """Ten steps of a sampler, guided."""
    given = cases.denoising_of(case)
    denoise(
        predict, to_tensor(given.latents), to_tensor(given.prompt_embeds), table=given.table, guidance=given.guidance,
        negative_embeds=to_tensor(given.negative_embeds),
        image_latents=None if given.image_latents is None else to_tensor(given.image_latents),
        step_noise=lambda step: to_tensor(given.noise(step)),
    )  # fmt: skip
    steps = zip(given.table.samples, golden("denoising")[case], strict=True)
    return [
        Apart(what=f"sample after step {number}", error=error(to_array(sample), row), limit=SAMPLES)
        for number, (sample, row) in enumerate(steps, start=1)
    ]
