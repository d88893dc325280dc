"""Whole pipelines against diffusers: same folder, same noise, same frames."""

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXVideoToVideoPipeline,
)
from PIL import Image

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError, NonFiniteError
from cogvideox_factory.models import PUBLISHED
from cogvideox_factory.torch_engine import pipeline as ours

PROMPT = "a red circle moves right"
NEGATIVE = "a blue square"
CALL = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 4, "guidance_scale": 6.0}
SEED = 3


def picture() -> np.ndarray:
    rows, columns = np.mgrid[0:64, 0:96]
    return np.stack([rows * 3, columns * 2, 255 - rows * 3], axis=-1).astype(np.uint8)


def noise_like(shape: torch.Size, *key, frames_first: bool = True) -> torch.Tensor:
    """Our draw for a tensor that diffusers holds as [B, F, C, h, w], or as [B, C, F, h, w]."""
    if frames_first:
        return torch.from_numpy(draws.normal(SEED, *key, shape=tuple(shape)))
    b, c, f, h, w = shape
    return torch.from_numpy(draws.normal(SEED, *key, shape=(b, f, c, h, w))).transpose(1, 2)


@pytest.fixture
def same_noise(monkeypatch):
    """Make diffusers use our noise: for the image's posterior, and for each sampler step."""
    step = {"index": -1}
    original = CogVideoXDPMScheduler.step

    def counted(self, *args, **kwargs):
        step["index"] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(CogVideoXDPMScheduler, "step", counted)
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_dpm_cogvideox.randn_tensor",
        lambda shape, **kwargs: noise_like(shape, "sampler noise", step["index"]),
    )
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor",
        lambda shape, **kwargs: noise_like(shape, "image posterior", frames_first=False),
    )
    return step


def reference(folder, sampler: str, is_i2v: bool) -> np.ndarray:
    pipe = (CogVideoXImageToVideoPipeline if is_i2v else CogVideoXPipeline).from_pretrained(folder)
    scheduler = CogVideoXDDIMScheduler if sampler == "ddim" else CogVideoXDPMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    frames = 4 if pipe.transformer.config.patch_size_t else 3
    image = {"image": Image.fromarray(picture())} if is_i2v else {}
    latents = noise_like((1, frames, 16, 8, 12), "initial noise")
    length = pipe.transformer.config.max_text_seq_length
    video = pipe(
        prompt=PROMPT, negative_prompt=NEGATIVE, latents=latents, output_type="np", max_sequence_length=length,
        **image, **CALL,
    )  # fmt: skip
    return video.frames[0]


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize("variant", list(PUBLISHED))
def test_frames_equal_diffusers(tiny_model, same_noise, variant, sampler):
    folder = tiny_model(variant)
    is_i2v = PUBLISHED[variant].transformer.is_image_to_video
    theirs = reference(folder, sampler, is_i2v)
    pipe = ours.CogVideoXPipeline.from_pretrained(folder, device="cpu", tiling=False)
    video = pipe(PROMPT, picture() if is_i2v else None, negative_prompt=NEGATIVE, sampler=sampler, seed=SEED, **CALL)[
        0
    ][0]
    assert video.dtype == np.uint8
    assert video.shape == theirs.shape
    assert np.abs(np.rint(theirs * 255) - video.astype(np.float64)).max() <= 1
    assert video.std() > 5, "a constant picture would prove nothing"


def reference_of_video(folder, sampler: str, video: np.ndarray, *, strength: float) -> np.ndarray:
    pipe = CogVideoXVideoToVideoPipeline.from_pretrained(folder)
    scheduler = CogVideoXDDIMScheduler if sampler == "ddim" else CogVideoXDPMScheduler
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    call = {key: value for key, value in CALL.items() if key != "num_frames"}
    length = pipe.transformer.config.max_text_seq_length
    result = pipe(
        [Image.fromarray(frame) for frame in video], prompt=PROMPT, negative_prompt=NEGATIVE, strength=strength,
        output_type="np", max_sequence_length=length, **call,
    )  # fmt: skip
    return result.frames[0]


@pytest.mark.parametrize("sampler", ["ddim", "dpm"])
@pytest.mark.parametrize(("variant", "num_frames"), [("cogvideox-2b", 9), ("cogvideox-5b", 9), ("cogvideox1.5-5b", 13)])
def test_video_to_video_equals_diffusers(tiny_model, same_noise, monkeypatch, variant, num_frames, sampler):
    """Counts that fill whole temporal patches: diffusers refuses others here, ours pads them as in training."""
    folder = tiny_model(variant)
    wave = np.sin(np.arange(num_frames)[:, None, None, None] / 3 + picture() / 40.0)
    video = ((wave + 1) * 120).astype(np.uint8)
    monkeypatch.setattr(
        "diffusers.pipelines.cogvideo.pipeline_cogvideox_video2video.randn_tensor",
        lambda shape, **kwargs: noise_like(shape, "initial noise"),
    )
    monkeypatch.setattr(
        "diffusers.models.autoencoders.vae.randn_tensor",
        lambda shape, **kwargs: noise_like(shape, "video posterior", frames_first=False),
    )
    same_noise["index"] += 1  # of four steps the first is not taken
    theirs = reference_of_video(folder, sampler, video, strength=0.75)
    pipe = ours.CogVideoXPipeline.from_pretrained(folder, device="cpu", tiling=False)
    call = CALL | {"num_frames": num_frames, "sampler": sampler, "seed": SEED, "negative_prompt": NEGATIVE}
    made = pipe(PROMPT, video=video, strength=0.75, **call)[0][0]
    assert np.abs(np.rint(theirs * 255) - made.astype(np.float64)).max() <= 1
    assert made.std() > 5
    assert not np.array_equal(made, pipe(PROMPT, video=video[::-1].copy(), strength=0.75, **call)[0][0])


def test_repeats_bit_for_bit_and_depends_on_seed_and_prompt(tiny_model):
    pipe = ours.CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-5b"), device="cpu")
    first, again = pipe([PROMPT, NEGATIVE], **CALL).frames, pipe([NEGATIVE, PROMPT], **CALL).frames
    assert np.array_equal(first[0], again[1]), "a video does not depend on the others in the list"
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], pipe(PROMPT, seed=1, **CALL)[0][0])


def test_guidance_of_one_needs_no_negative_prompt(tiny_model):
    pipe = ours.CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-2b"), device="cpu")
    call = CALL | {"guidance_scale": 1.0}
    assert np.array_equal(pipe(PROMPT, **call)[0][0], pipe(PROMPT, negative_prompt="x y z", **call)[0][0])


def test_wrong_use_says_what_is_right(tiny_model):
    t2v = ours.CogVideoXPipeline.from_pretrained(tiny_model("cogvideox1.5-5b"), device="cpu")
    i2v = ours.CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-5b-i2v"), device="cpu")
    with pytest.raises(FactoryError, match="takes no image"):
        t2v(PROMPT, picture(), **CALL)
    with pytest.raises(FactoryError, match="give an image"):
        i2v(PROMPT, **CALL)
    with pytest.raises(FactoryError, match="multiples of 16"):
        t2v(PROMPT, **CALL | {"height": 60})
    with pytest.raises(FactoryError, match="num_frames=10"):
        t2v(PROMPT, **CALL | {"num_frames": 10})
    with pytest.raises(FactoryError, match="up to 64x96"):
        t2v(PROMPT, **CALL | {"height": 128})
    with pytest.raises(FactoryError, match="learned positions for 64x96"):
        i2v(PROMPT, picture(), **CALL | {"height": 32})
    with pytest.raises(FactoryError, match=r"uint8 \(64, 96, 3\)"):
        i2v(PROMPT, picture()[:32], **CALL)
    with pytest.raises(FactoryError, match="takes a text-to-video model"):
        i2v(PROMPT, picture(), video=np.zeros((9, 64, 96, 3), np.uint8), **CALL)
    with pytest.raises(FactoryError, match=r"uint8 \(9, 64, 96, 3\)"):
        t2v(PROMPT, video=np.zeros((9, 32, 96, 3), np.uint8), **CALL)
    with pytest.raises(FactoryError, match="give a prompt"):
        t2v(**CALL)
    for scale in (0.0, 0.5, float("nan")):
        with pytest.raises(FactoryError, match=rf"guidance_scale={scale:g} must be 1 \(no guidance\) or more"):
            t2v(PROMPT, **CALL | {"guidance_scale": scale})
    with pytest.raises(FactoryError, match="num_inference_steps=0 must be 1 or more"):
        t2v(PROMPT, **CALL | {"num_inference_steps": 0})
    with pytest.raises(FactoryError, match=r"shape \[1, 5, 7\] are not this model's: \[prompts, tokens, "):
        t2v(prompt_embeds=torch.zeros(1, 5, 7), **CALL)
    with pytest.raises(FactoryError, match="no LoRA there"):
        t2v.load_lora_weights("/nowhere")


def test_latents_that_are_not_finite_are_refused(tiny_model):
    pipe = ours.CogVideoXPipeline.from_pretrained(tiny_model("cogvideox-2b"), device="cpu")
    with torch.no_grad():
        next(pipe.transformer.parameters()).fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"--run\.dtype bfloat16"):
        pipe(PROMPT, **CALL)
