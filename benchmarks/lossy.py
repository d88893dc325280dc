"""`cpu.lossy.*`: what the lossy shortcuts of `generate` gain on the embedded model, and what they cost.

The embedded text-to-video model, 20 DDIM steps, guidance 2, denoising and decoding of one prompt timed turn by turn
against the same without a shortcut. Likeness (PSNR, SSIM) and the judge's scores are of the videos of 64 prompts that
the model was not trained on.
"""

from typing import Any

import numpy as np

from benchmarks.interleave import Ratio, interleave
from cogvideox_factory import quality
from cogvideox_factory.tiny import lesson
from cogvideox_factory.tiny.judge import score
from cogvideox_factory.tiny.world import random_scene
from cogvideox_factory.torch_engine.pipeline import CogVideoXPipeline
from cogvideox_factory.torch_engine.reuse import Reuse

NUM_PROMPTS = 64
CALL: dict[str, Any] = {"num_inference_steps": 20, "guidance_scale": 2.0, "seed": 42}
WAYS: dict[str, dict[str, Any]] = {
    "guidance_interval 0.3 1": {"guidance_interval": (0.3, 1.0)},
    "first_block_cache 0.15": {"reuse": Reuse(first_block=0.15)},
    "tea_cache 0.15": {"reuse": Reuse(tea=0.15)},
}


class Trial:
    """The model, its prompts, and how they are made into videos."""

    def __init__(self, num_prompts: int) -> None:
        self.scenes = [random_scene(21, index, split="held_out") for index in range(num_prompts)]
        self.pipe = CogVideoXPipeline.from_pretrained("tiny-t2v", device="cpu", tiling=False)
        self.embeds = self.pipe.encode_prompts([scene.caption for scene in self.scenes])
        self.negative = self.pipe.encode_prompts([""])

    def make(self, index: int, **way: Any) -> np.ndarray:
        """Return the video of one prompt."""
        embeds = self.embeds[index : index + 1]
        return self.pipe(prompt_embeds=embeds, negative_prompt_embeds=self.negative, **CALL, **way)[0][0]

    def make_all(self, **way: Any) -> tuple[list[np.ndarray], float]:
        """Return the videos of all prompts, and how many steps of each took over what blocks did before."""
        videos, reused = [], 0
        for index in range(len(self.scenes)):
            videos.append(self.make(index, **way))
            reused += self.pipe.num_reused
        return videos, reused / len(videos)

    def scores(self, videos: list[np.ndarray]) -> dict[str, float]:
        """Return what share of the videos shows each attribute as its prompt says."""
        verdicts = [score(video, scene) for video, scene in zip(videos, self.scenes, strict=True)]
        return {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in lesson.KNOWN}


def likeness(videos: list[np.ndarray], plain: list[np.ndarray]) -> str:
    """Return the mean PSNR and SSIM of videos to those without a shortcut, as text."""
    psnr = np.mean([quality.psnr(ours, theirs) for ours, theirs in zip(videos, plain, strict=True)])
    frames = [pair for ours, theirs in zip(videos, plain, strict=True) for pair in zip(ours, theirs, strict=True)]
    return f"PSNR {psnr:.1f} dB, SSIM {np.mean([quality.ssim(*pair) for pair in frames]):.3f}"


def run() -> list[Ratio]:
    """Return one ratio a shortcut, with its cost in the note."""
    trial = Trial(NUM_PROMPTS)
    plain, _ = trial.make_all()
    before = trial.scores(plain)
    ratios = []
    for name, way in WAYS.items():
        videos, reused = trial.make_all(**way)
        after = trial.scores(videos)
        points = ", ".join(f"{key} {100 * after[key]:.0f} ({100 * (after[key] - before[key]):+.0f})" for key in after)
        note = f"{reused:.1f} of {CALL['num_inference_steps']} steps reuse; {likeness(videos, plain)}; {points}"
        ratios.append(
            interleave(
                f"cpu.lossy.{name}",
                lambda: trial.make(0),
                lambda way=way: trial.make(0, **way),
                num_rounds=7,
                num_threads=1,  # so small a model is slower with two
                note=note,
            )
        )
    return ratios
