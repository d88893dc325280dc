"""Settings of how noise becomes video, and of which videos to make."""

from typing import Annotated, Literal

from pydantic import Field

from cogvideox_factory.config.section import FrameRate, NotNegative, Positive, Section, Share

Threshold = Annotated[float, Field(ge=0)]


class Sampling(Section):
    """How noise becomes video; used by `generate` and by the sample videos of a run."""

    negative_prompt: str = ""
    """What to steer away from."""
    guidance_scale: Annotated[float, Field(ge=1)] = 6.0
    """Classifier-free guidance; 1 turns it off and halves the work."""
    dynamic_guidance: bool = False
    """Let guidance rise steeply towards the end of the steps, from 1 to 1 + guidance_scale."""
    steps: Annotated[int, Field(gt=0, le=1000)] = 50
    """Denoising steps, at most the 1000 that the models were trained on."""
    sampler: Literal["auto", "ddim", "dpm"] = "auto"
    """auto: ddim for 2B, dpm for the others, as their authors sample."""
    tiling: Literal["auto"] | bool = "auto"
    """Decode in overlapping tiles: less memory, two fifths more work. auto: where whole pictures do not fit in what is
    free (and in the sample videos of a run, which has filled it)."""


class Generate(Section):
    """Which videos to make."""

    prompt: list[str] = []
    """What to show; several prompts give several videos."""
    prompt_file: str | None = None
    """Text file with one prompt a line."""
    prompt_cache: str | None = None
    """Folder that keeps embeddings of prompts (1.9 MB each); prompts that are all in it need no text encoder, which
    for the published models is 9.5 GB to load. Any number of commands may share one. Default: none are kept."""
    num_videos: Positive = 1
    """Videos a prompt, from seeds that follow one another."""
    seeds: list[NotNegative] = []
    """One seed a prompt. Default: run.seed for all."""
    image: list[str] = []
    """Image-to-video: one image for all prompts, or one a prompt."""
    video: list[str] = []
    """Video-to-video (text-to-video models): one video for all prompts, or one a prompt, to be made anew."""
    strength: Annotated[float, Field(gt=0, le=1)] = 0.8
    """Video-to-video: how much is made anew; at 1 only the prompt counts. That share of the steps is taken."""
    extend: list[str] = []
    """Image-to-video models: one video for all prompts, or one a prompt, to be gone on with from its last frame."""
    num_frames: Positive | None = None
    """Frames; 8k+1 comes out as asked. Default: the model's."""
    height: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    fps: FrameRate | None = None
    """Frame rate of the video, 0.01 to 1000 a second. Default: the model's."""
    base: Literal["model", "int8", "fp8", "nf4"] = "model"
    """How the matrices of the transformer's blocks are kept: in run.dtype, in 8 bits a weight (int8, fp8: a scale a
    row) or in 4 (nf4). Needs the extra lowbit."""
    offload: Literal["auto", "none", "model", "block", "group"] = "auto"
    """What waits in host memory. model: the model that is not at work. block: of that too all blocks but the one at
    work and the next. group: the same with groups of blocks. auto: the first of none, model, group and block that fits
    in what is free. No bit of a video depends on it. Needs an accelerator."""
    offload_group: Positive = 4
    """Blocks that come at a time with generate.offload=group; two groups are there at once."""
    lora: list[str] = []
    """LoRA files or run folders, added together."""
    lora_weight: list[float] = []
    """One weight a LoRA; 1.0 is always the strength it was trained at."""
    merge_lora: bool = False
    """Fold the LoRAs into the weights before the first step: faster, and in half precision rounded once more."""
    compile: Literal["none", "default", "max_autotune"] = "none"
    """torch.compile of each block, which takes a minute or more before the first step. The same video up to rounding.
    max_autotune tries kernels for each product, and may choose others in another run."""
    guidance_interval: Annotated[list[Share], Field(min_length=2, max_length=2)] = [0.0, 1.0]
    """Lossy. Guide only the steps from one share of them to another; the others cost half and follow the prompt less.
    0.3 1 on the embedded model: 36.8 dB from the video without it, two points of what a judge sees lost."""
    first_block_cache: Threshold = 0.0
    """Lossy. Run all blocks only when what the first one adds has changed by more than this since they last were; 0:
    always. 0.15 on the embedded model: a quarter of the steps, 38.3 dB, no point lost. With parallel.zero=3 all
    processes must share a video."""
    tea_cache: Threshold = 0.0
    """Lossy. Run the blocks only when the changes of the time embedding add up to this since they last were; 0: always.
    Which steps these are is the same for all videos. 0.15 on the embedded model: a quarter of them, 41.7 dB, no point
    lost."""
    tea_cache_polynomial: list[float] = []
    """What is added up is this polynomial of the change, highest power first, as TeaCache publishes one for each model.
    Default: the change itself."""
    out: str = "videos"
    """Folder (or, for one video, file name) of the result."""
    format: Literal["mp4", "gif", "webp", "png", "npy"] = "mp4"
    """mp4, gif, webp (lossless), png (a folder of pictures a video) or npy (uint8 frames x height x width x 3)."""
    codec: Literal["h264", "h265"] = "h264"
    """Of mp4: h264 plays everywhere, h265 takes half the room."""
    overwrite: bool = False
    """Make and replace videos that exist. Without it those made with the same settings count as done, and others are
    an error."""
