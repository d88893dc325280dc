"""The embedded models: what they weigh, who can load them, and what they know."""

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline as ImageToVideo
from diffusers import CogVideoXPipeline as TextToVideo

from benchmarks.lossy import CALL, NUM_PROMPTS, WAYS
from cogvideox_factory import quality
from cogvideox_factory.tiny import lesson
from cogvideox_factory.tiny.judge import score
from cogvideox_factory.tiny.world import random_scene, render
from cogvideox_factory.torch_engine.objective import predict_v
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.vae import CogVideoXVAE, pixels_from_uint8, uint8_from_pixels
from cogvideox_factory.weights import EMBEDDED, resolve_model

NUM_OF_SHORTCUTS = 8


@pytest.fixture(scope="module")
def held_out():
    scenes = [random_scene(21, index, split="held_out") for index in range(NUM_PROMPTS)]
    return scenes, [render(scene, **lesson.SIZE) for scene in scenes]


def test_they_weigh_at_most_16_mb_together():
    files = [path for name in EMBEDDED for path in resolve_model(name).rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".json", ".safetensors"}
    assert sum(path.stat().st_size for path in files) <= 16e6


@torch.no_grad()
@pytest.mark.parametrize("name", EMBEDDED)
def test_diffusers_loads_them_and_predicts_the_same(name):
    is_i2v = name.endswith("i2v")
    folder = resolve_model(name)
    theirs = (ImageToVideo if is_i2v else TextToVideo).from_pretrained(folder, dtype=torch.float32)
    ours = CogVideoXPipeline.from_pretrained(folder)
    prompt = ["a large red circle moves right on a white background"]
    embeds = theirs.encode_prompt(prompt, "", do_classifier_free_guidance=False, max_sequence_length=24)[0]
    assert torch.allclose(embeds, ours.encode_prompts(prompt), atol=1e-5)
    latents = torch.randn(1, 4, theirs.transformer.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([500])
    rotary = theirs._prepare_rotary_positional_embeddings(64, 64, 4, torch.device("cpu"))
    ofs = torch.full((1,), 2.0) if is_i2v else None
    expected = theirs.transformer(latents, embeds, timesteps, ofs=ofs, image_rotary_emb=rotary, return_dict=False)[0]
    assert torch.allclose(predict_v(ours.transformer, latents, embeds, timesteps), expected, atol=1e-4)


@torch.no_grad()
def test_the_vae_rebuilds_clips_it_never_saw(held_out):
    _, videos = held_out
    vae = CogVideoXVAE.from_folder(resolve_model("tiny-t2v") / "vae", dtype=torch.float32)
    frames = torch.from_numpy(np.stack(videos[:32]))
    mean, _ = vae.encode(pixels_from_uint8(frames))
    rebuilt = uint8_from_pixels(vae.decode(mean)).numpy()
    psnr = [quality.psnr(a, b) for a, b in zip(rebuilt, videos)]
    assert np.mean(psnr) >= 30


@pytest.fixture(scope="module")
def t2v():
    return CogVideoXPipeline.from_pretrained("tiny-t2v", tiling=False)


@pytest.fixture(scope="module")
def drawn_by_t2v(held_out, t2v):
    """The held-out prompts' videos."""
    return t2v([scene.caption for scene in held_out[0]], **CALL).frames


@pytest.fixture(scope="module")
def spoken(held_out, drawn_by_t2v):
    """What share of them show each attribute."""
    return shares(held_out[0], drawn_by_t2v)


def shares(scenes, videos):
    verdicts = [score(video, scene) for video, scene in zip(videos, scenes, strict=True)]
    return {name: np.mean([verdict[name] for verdict in verdicts]) for name in lesson.KNOWN}


@pytest.mark.parametrize(
    ("attribute", "least"), [("colour", 0.95), ("background", 0.95), ("motion", 0.90), ("shape", 0.85)]
)
def test_text_to_video_shows_what_prompts_say(spoken, attribute, least):
    assert spoken[attribute] >= least, spoken


@pytest.mark.parametrize("way", WAYS)
def test_shortcuts_cost_at_most_two_points_of_what_the_judge_sees(held_out, t2v, drawn_by_t2v, way):
    """At the values that the settings' help names; the whole table is `python -m benchmarks lossy`."""
    scenes, plain = held_out[0][:NUM_OF_SHORTCUTS], drawn_by_t2v[:NUM_OF_SHORTCUTS]
    videos = t2v([scene.caption for scene in scenes], **CALL, **WAYS[way]).frames
    assert (t2v.num_reused > 0) == ("reuse" in WAYS[way])
    before, after = shares(scenes, plain), shares(scenes, videos)
    assert all(after[name] >= before[name] - 0.02 for name in before), (before, after)
    psnr = np.mean([quality.psnr(ours, theirs) for ours, theirs in zip(videos, plain, strict=True)])
    assert 30 < psnr < 60, "another video, but nearly the same"


@pytest.mark.slow
def test_image_to_video_starts_at_the_image_and_moves_as_told(held_out):
    scenes, drawn = held_out
    pipe = CogVideoXPipeline.from_pretrained("tiny-i2v", tiling=False)
    videos = [pipe(s.caption, image=frames[0], **CALL)[0][0] for s, frames in zip(scenes, drawn)]
    assert np.mean([quality.psnr(video[0], frames[0]) for video, frames in zip(videos, drawn)]) >= 28
    assert shares(scenes, videos)["motion"] >= 0.85
