"""Every setting of a run: its type, default, unit and range. Defaults live here and nowhere else.

A recipe (YAML) is one `Config`; command-line flags override single fields. `None` means "what the model was made
for" and is filled in before a run starts, so the `config.yaml` in a run folder is complete and reruns as it is.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]


class _Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(_Section):
    """Which checkpoint to start from."""

    path: str = ""
    """Model folder in the diffusers layout, or a hub id such as THUDM/CogVideoX-5b; tiny-t2v and tiny-i2v are small
    models of moving shapes that come with this package."""
    revision: str | None = None
    """Hub revision (branch, tag or commit); only for hub ids."""
    transformer: str | None = None
    """Folder of a fine-tuned transformer to use in place of the model's own."""
    transformer_config: str | None = None
    """config.json of a transformer of any size, to train from random weights (train.method full)."""


class DataSet(_Section):
    """One of several data sets that are mixed; what is None is as `data` has it."""

    root: str
    """Folder that holds the clips; see `data.root`."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch sees each clip of the set: 2 is twice, 0.25 a quarter of the clips, another one each epoch."""
    name: str | None = None
    """What reports call it. Default: the last part of `root`."""
    table: str | None = None
    """See `data.table`."""
    captions: str | None = None
    """See `data.captions`."""
    videos: str | None = None
    """See `data.videos`."""
    caption_column: str | None = None
    """See `data.caption_column`."""
    video_column: str | None = None
    """See `data.video_column`."""
    image_column: str | None = None
    """See `data.image_column`."""

    @property
    def called(self) -> str:
        """The name, given or not."""
        return self.name or Path(self.root).name or self.root

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        found = []
        if (self.captions is None) != (self.videos is None):
            found.append(f"data.sets {self.called!r}: captions and videos belong together; give both or neither")
        if self.table and self.captions:
            found.append(f"data.sets {self.called!r}: table and captions both name the captions; give one of them")
        return found


class Data(_Section):
    """Clips and captions, and how frames are taken from them."""

    root: str = ""
    """Folder that holds the clips; every path in a list is relative to it and must stay inside."""
    sets: list[DataSet] = []
    """Several data sets in place of `root`, mixed by weights, each with `root`, `weight` and lists of its own."""
    table: str | None = None
    """CSV, TSV, JSONL or Parquet file (relative to root) with one row a clip."""
    caption_column: str = "caption"
    """Column of the table that holds the caption."""
    video_column: str = "video"
    """Column of the table that holds the clip's path; where there is none, `file_name` (Hugging Face) is taken."""
    image_column: str = "image"
    """Image-to-video: column of the table that names the picture a clip starts from, in place of the clip's own first
    frame. A table without the column, or a row without a name in it, starts from the first frame."""
    captions: str | None = None
    """Text file with one caption a line; needs `videos`."""
    videos: str | None = None
    """Text file with one clip path a line, paired with `captions` line by line."""
    trigger_word: str | None = None
    """Put in front of every caption, so the word comes to mean what the clips show."""
    num_frames: Positive | None = None
    """Frames a clip; 8k+1 survives the VAE unchanged. Default: the model's."""
    height: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frames per second the clips are resampled to. Default: the model's (8, or 16 for 1.5)."""
    fps_policy: Literal["resample", "stretch"] = "resample"
    """resample: keep the speed of the source. stretch: spread the frames over the whole clip."""
    crop: Literal["center", "random", "smart", "stretch"] = "center"
    """center, random, smart: resize to cover, then crop; smart puts the crop where most moves and stands out, one place
    a clip. stretch: distort to the asked size."""
    short_clips: Literal["reject", "repeat_last", "slow"] = "reject"
    """What to do with a clip that has too few frames. slow: play it slower, so that it just fills them."""
    max_slowdown: Annotated[float, Field(ge=1, le=100)] = 2.0
    """short_clips=slow: how many times slower a clip may become; a shorter one is rejected."""
    windows: Literal["first", "uniform", "all", "scenes"] = "first"
    """What is taken of a long video. first: its start. all: one window after another, each a clip of its own. uniform:
    at most max_windows of those, spread over it. scenes: as all in each scene, never across a cut (needs the extra
    `scenes`)."""
    max_windows: Positive = 4
    """windows=uniform: most clips that are made of one video."""
    window_stride: Positive | None = None
    """windows=all or scenes: frames at `fps` from one window's start to the next. Default: a window's length, so that
    they do not overlap."""
    buckets: str | None = None
    """Train at more than one size and length: a bucket file (recipes/buckets/), or `auto` for the shapes the clips
    have. num_frames, height and width are then the largest that auto makes."""
    max_buckets: Positive = 8
    """Most shapes that `buckets: auto` makes."""
    flip_probability: Share = 0.0
    """Chance of a horizontal flip, drawn once a clip (training from raw clips, without a cache)."""
    vae_tiling: bool = False
    """Encode in overlapping tiles: much less memory, slightly other latents."""
    allow_outside_root: bool = False
    """Accept clip paths that lead out of `root`."""
    strict: bool = False
    """Turn the loss of any clip into an error."""
    max_bad: Share = 0.01
    """Stop when a larger share of the rows than this cannot be used (a few are let pass in a small set)."""


class Cache(_Section):
    """Prepared latents and text embeddings."""

    dir: str | None = None
    """Cache folder. `train` without one encodes raw clips on the fly."""
    image_noise_variants: NotNegative = 4
    """Image-to-video: noised copies of the first frame to keep a clip (0: only the clean frame)."""


class Vae(_Section):
    """Training of the VAE itself (`train-vae`); everything else leaves it as it is."""

    config: str | None = None
    """config.json of a VAE to train from random weights. Default: go on from `start`."""
    start: str | None = None
    """Folder of the VAE to go on from. Default: the model's own."""
    parts: Literal["both", "decoder"] = "both"
    """decoder: keep the encoder, and with it every transformer made for it; only the pictures get better."""
    dir: str = "runs/vae"
    """Folder of the result: config, metrics, and the VAE in the diffusers layout."""
    steps: NotNegative = 1000
    """Optimizer steps; 0 only balances."""
    balance: Share = 0.0
    """Mix the latent channels so that faint directions count more: 0 leaves them, 1 makes all equal. Pictures stay."""
    batch_size: Positive = 8
    """Clips a step."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Peak learning rate; it falls to 0 along a cosine."""
    warmup_steps: NotNegative = 20
    """Steps over which the learning rate rises linearly from 0."""
    crop: Positive | None = None
    """Side in pixels of the square cut at random from each clip, a multiple of 8. Default: whole frames."""
    image_share: Share = 0.1
    """Share of the steps that see single frames, as the first frame of image-to-video is encoded."""
    l1_weight: Annotated[float, Field(ge=0)] = 0.2
    """Weight of the mean absolute error beside the mean squared one."""
    kl_weight: Annotated[float, Field(ge=0)] = 1e-5
    """Weight of the divergence of the latents from a unit normal, per latent value."""
    num_held_out: Positive = 16
    """Clips kept out of training, on which the reconstruction is measured."""
    log_every: Positive = 20
    """Steps between log lines."""
    save_every: Positive = 200
    """Steps between measurements on the held-out clips; the VAE is saved after each."""


class Text(_Section):
    """Captions to embeddings."""

    max_sequence_length: Positive | None = None
    """Tokens every caption is padded or cut to. Default: the model's (226)."""


class Lora(_Section):
    """Low-rank adapters (Hu et al. 2021); used when train.method is lora."""

    rank: Positive = 64
    """Rank of each adapter."""
    alpha: Annotated[float, Field(gt=0)] = 64.0
    """Adapters are scaled by alpha/rank (alpha/sqrt(rank) with rslora)."""
    use_rslora: bool = False
    """Rank-stabilised scaling (Kalajdzievski 2023)."""
    use_dora: bool = False
    """Weight-decomposed adapters (Liu et al. 2024)."""
    target_modules: list[str] = ["to_q", "to_k", "to_v", "to_out.0"]
    """Module names (as in diffusers), matched by ending, or regular expressions."""


class Train(_Section):
    """The optimisation."""

    dir: str = "runs/run"
    """Run folder: config, metrics, checkpoints, samples, final weights."""
    method: Literal["lora", "full"] = "lora"
    """lora: adapters over a frozen model. full: every weight of the transformer (SFT)."""
    steps: Positive = 1000
    """Optimizer steps in total."""
    batch_size: Positive = 1
    """Clips in one forward pass, over all processes together; each takes an equal share."""
    gradient_accumulation: Positive = 1
    """Forward passes a step; the global batch is batch_size x this."""
    learning_rate: Annotated[float, Field(ge=0)] = 1e-4
    """Peak learning rate."""
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    """How the learning rate falls after warm-up."""
    warmup_steps: NotNegative = 0
    """Steps over which the learning rate rises linearly from 0."""
    num_cycles: Positive = 1
    """Restarts of cosine_with_restarts."""
    power: Annotated[float, Field(gt=0)] = 1.0
    """Exponent of the polynomial schedule."""
    beta1: Decay = 0.9
    """AdamW: decay of the first moment."""
    beta2: Decay = 0.95
    """AdamW: decay of the second moment."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW: added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """AdamW: decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    master_weights: Literal["float32", "stochastic_bf16"] = "float32"
    """Full fine-tuning in half precision. float32: exact copies (16 more bytes a parameter with the moments).
    stochastic_bf16: bf16 weights and moments, rounded stochastically (8 bytes a parameter in all)."""
    checkpointing: Literal["none", "full", "save_attention"] = "save_attention"
    """What the backward pass recomputes. save_attention keeps attention outputs, the dearest part."""
    caption_dropout: Share = 0.1
    """Chance that a sample is trained with the empty caption (keeps guidance calibrated)."""
    image_dropout: Share = 0.05
    """Image-to-video: chance that a sample is trained without its image."""
    image_noise: bool = True
    """Image-to-video: train on noised first frames, as the models were (sigma = exp(N(-3, 0.5)))."""
    image_scale: Literal["pipeline", "training"] = "pipeline"
    """Image-to-video: scale image latents as the sampling pipeline does (right unless you sample elsewhere), or
    always multiply by the VAE's factor, as the older trainers did."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an exponential moving average of the trained weights and export that."""
    log_every: Positive = 10
    """Steps between log lines; between them nothing waits for the device."""
    save_every: Positive = 500
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 3
    """Checkpoints to keep; an older one goes only after a newer one is complete."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of the run folder if there is one. never: refuse a used run folder.
    Or the path of a checkpoint."""
    num_workers: NotNegative = 2
    """Threads that read ahead."""


class Parallel(_Section):
    """How the processes that torchrun starts divide a training run; one process needs none of it."""

    sequence: Positive = 1
    """Processes that divide each video's tokens among them (sequence parallelism); the others take other clips."""
    ring: Positive | None = None
    """Of those, the processes along which keys and values travel. Default: as few as the model's heads allow."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """What is divided among the processes. 0: nothing. 1: the optimizer. 2: gradients too. 3: weights too."""
    replicas: Positive = 1
    """Whole copies of the model among which zero 1-3 does not divide: one a node, say (hybrid sharding)."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 1800
    """How long a process waits for the others before it gives up."""


class Sampling(_Section):
    """How noise becomes video; used by `generate` and by the sample videos of a run."""

    negative_prompt: str = ""
    """What to steer away from."""
    guidance_scale: Annotated[float, Field(ge=1)] = 6.0
    """Classifier-free guidance; 1 turns it off and halves the work."""
    dynamic_guidance: bool = False
    """Let guidance rise steeply towards the end of the steps, from 1 to 1 + guidance_scale."""
    steps: Positive = 50
    """Denoising steps."""
    sampler: Literal["auto", "ddim", "dpm"] = "auto"
    """auto: ddim for 2B, dpm for the others, as their authors sample."""
    tiling: bool = True
    """Decode in overlapping tiles: less memory, slightly more work."""


class Validation(_Section):
    """Watching a run."""

    every: NotNegative = 0
    """Steps between validations (0: never)."""
    num_clips: Positive = 4
    """Clips held out of training for the validation loss (fixed noise, fixed timesteps)."""
    prompts: list[str] = []
    """A sample video is made for each of these."""
    images: list[str] = []
    """Image-to-video: one image path a prompt."""


class Generate(_Section):
    """Which videos to make."""

    prompt: list[str] = []
    """What to show; several prompts give several videos."""
    prompt_file: str | None = None
    """Text file with one prompt a line."""
    image: list[str] = []
    """Image-to-video: one image for all prompts, or one a prompt."""
    num_frames: Positive | None = None
    """Frames; 8k+1 comes out as asked. Default: the model's."""
    height: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    fps: Annotated[float, Field(gt=0)] | None = None
    """Frame rate of the mp4. Default: the model's."""
    lora: list[str] = []
    """LoRA files or run folders, added together."""
    lora_weight: list[float] = []
    """One weight a LoRA; 1.0 is always the strength it was trained at."""
    out: str = "videos"
    """Folder (or, for one video, file name) of the result."""
    overwrite: bool = False
    """Replace existing videos."""


class Run(_Section):
    """On what, and from which seed."""

    seed: NotNegative = 42
    """Every random number of a run follows from it."""
    device: str = "auto"
    """auto, cpu, cuda, npu, or cuda:1 and so on."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Arithmetic of the model. auto: the published one on an accelerator, float32 on a CPU; `prepare` goes on with what
    a finished cache was made in."""
    deterministic: bool = True
    """Use only kernels that repeat bit for bit."""


class Config(_Section):
    """One complete run."""

    task: Literal["t2v", "i2v"] = "t2v"
    """t2v: text to video. i2v: text and a first image to video."""
    model: Model = Model()
    data: Data = Data()
    cache: Cache = Cache()
    vae: Vae = Vae()
    text: Text = Text()
    lora: Lora = Lora()
    train: Train = Train()
    parallel: Parallel = Parallel()
    sampling: Sampling = Sampling()
    validation: Validation = Validation()
    generate: Generate = Generate()
    run: Run = Run()

    @model_validator(mode="after")
    def _laws_across_fields(self) -> "Config":
        problems = _problems_of_sets(self.data, self.task)
        if (self.data.captions is None) != (self.data.videos is None):
            problems.append("data.captions and data.videos belong together; give both or neither")
        if self.data.table and self.data.captions:
            problems.append("data.table and data.captions both name the captions; give one of them")
        if self.train.warmup_steps >= self.train.steps and self.train.warmup_steps > 0:
            problems.append(
                f"train.warmup_steps={self.train.warmup_steps} must be below train.steps={self.train.steps}, "
                "or the learning rate never reaches its peak"
            )
        if self.model.transformer and self.model.transformer_config:
            problems.append("model.transformer and model.transformer_config both name the transformer; give one")
        if self.model.transformer_config and self.train.method == "lora":
            problems.append(
                "model.transformer_config starts from random weights, and a LoRA over those learns nothing; "
                "set train.method to full"
            )
        if self.vae.config and self.vae.start:
            problems.append("vae.config starts from random weights and vae.start from given ones; give one")
        if self.vae.config and self.vae.parts == "decoder":
            problems.append("vae.parts=decoder keeps an encoder that vae.config has yet to draw; use both")
        if self.vae.balance and self.vae.parts == "decoder":
            problems.append("vae.balance changes the latents and vae.parts=decoder keeps them; choose one")
        if not self.vae.steps and not self.vae.balance:
            problems.append("vae.steps=0 trains nothing and vae.balance=0 balances nothing; set one of them")
        if self.vae.crop and self.vae.crop % 8:
            problems.append(
                f"vae.crop={self.vae.crop} is no multiple of 8; the nearest is {self.vae.crop // 8 * 8 or 8}"
            )
        for name, value, fits in (
            ("windows", self.data.windows, ("first",)),
            ("short_clips", self.data.short_clips, ("reject", "repeat_last")),
        ):
            if self.data.fps_policy == "stretch" and value not in fits:
                problems.append(
                    f"data.{name}={value} counts in the source's time, which data.fps_policy=stretch gives up; use "
                    f"data.{name}={' or '.join(fits)}, or data.fps_policy=resample"
                )
        if self.cache.dir and self.data.flip_probability:
            problems.append(
                "data.flip_probability has no effect on cached latents; set it to 0 or train without cache.dir"
            )
        for applies, why, names in _WITHOUT_EFFECT:
            if applies(self):
                problems += [f"{name} has no effect with {why}; remove it" for name in names if self._is_set(name)]
        if self.generate.lora_weight and len(self.generate.lora_weight) != len(self.generate.lora):
            problems.append(
                f"generate.lora_weight has {len(self.generate.lora_weight)} values for "
                f"{len(self.generate.lora)} LoRAs; give one each, or none for 1.0"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self

    @property
    def data_sets(self) -> list[dict[str, Any]]:
        """Every data set as plain values: one without a name for `data.root`, or all of `data.sets`, complete."""
        data, is_i2v = self.data, self.task == "i2v"
        columns = {"caption_column": data.caption_column, "video_column": data.video_column}
        columns["image_column"] = data.image_column
        named: list[dict[str, Any]] = [
            {name: value for name, value in part.model_dump().items() if value is not None} | {"name": part.called}
            for part in data.sets
        ]
        lists = {"table": data.table, "captions": data.captions, "videos": data.videos}
        alone = [{"name": "", "weight": 1.0, "root": data.root, **lists}] if data.root else []
        sets = [dict.fromkeys(lists) | columns | part for part in named or alone]
        return [part if is_i2v else part | {"image_column": None} for part in sets]

    def _is_set(self, name: str) -> bool:
        section, field = name.split(".")
        values = getattr(self, section)
        return getattr(values, field) != type(values).model_fields[field].default


def _problems_of_sets(data: Data, task: str) -> list[str]:
    if not data.sets:
        return []
    problems = [problem for part in data.sets for problem in part.problems()]
    for name in ("root", "table", "captions", "videos"):
        if getattr(data, name):
            problems.append(
                f"data.{name} and data.sets both name the clips; each set has its own, so remove data.{name}"
            )
    names = [part.called for part in data.sets]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        problems.append(f"data.sets: {', '.join(map(repr, twice))} is there twice; give each set a name of its own")
    if task == "t2v" and any(part.image_column for part in data.sets):
        problems.append("image_column of data.sets has no effect with task=t2v; remove it")
    return problems


# Settings that would be read by nobody, and when: setting one away from its default is a mistake worth a line.
_WITHOUT_EFFECT: tuple[tuple[Callable[[Config], bool], str, tuple[str, ...]], ...] = (
    (
        lambda config: config.task == "t2v",
        "task=t2v",
        (
            "data.image_column", "generate.image", "validation.images", "cache.image_noise_variants",
            "train.image_dropout", "train.image_noise", "train.image_scale",
        ),
    ),
    (
        lambda config: config.train.method == "full",
        "train.method=full",
        ("lora.rank", "lora.alpha", "lora.use_rslora", "lora.use_dora", "lora.target_modules"),
    ),
    (
        lambda config: config.train.method == "lora",
        "train.method=lora",
        ("train.master_weights",),
    ),
    (lambda config: config.train.schedule != "cosine_with_restarts", "this schedule", ("train.num_cycles",)),
    (lambda config: config.train.schedule != "polynomial", "this schedule", ("train.power",)),
    (lambda config: config.data.buckets != "auto", "data.buckets other than auto", ("data.max_buckets",)),
    (lambda config: config.data.windows != "uniform", "data.windows other than uniform", ("data.max_windows",)),
    (
        lambda config: config.data.windows not in ("all", "scenes"),
        "data.windows other than all and scenes",
        ("data.window_stride",),
    ),
    (lambda config: config.data.short_clips != "slow", "data.short_clips other than slow", ("data.max_slowdown",)),
    (
        lambda config: config.data.buckets is not None,
        "data.buckets, which give a clip no more frames than it has",
        ("data.short_clips",),
    ),
    (
        lambda config: config.data.buckets not in (None, "auto"),
        "a bucket file, which says how many clips of each shape a step has",
        ("train.batch_size",),
    ),
    (lambda config: not config.validation.every, "validation.every=0", ("validation.prompts", "validation.images")),
)  # fmt: skip
