"""Settings of training: adapters, the optimisation, many processes, and what is watched."""

from typing import Annotated, Any, Literal

from pydantic import Field

from cogvideox_factory.config.section import Decay, NotNegative, Positive, Section, Share


class Lora(Section):
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
    base: Literal["model", "int8", "fp8", "nf4"] = "model"
    """How the frozen matrices of the blocks are kept: in the run's dtype, in 8 bits a weight (int8, fp8: a scale a
    row) or in 4 (nf4). Needs the extra lowbit. What is trained fits the plain model."""


class Train(Section):
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
    optimizer: Literal["adamw", "adam", "adamw8bit", "prodigy", "came"] = "adamw"
    """adam: with weight decay in the gradient. adamw8bit: moments of 2 bytes a weight, not 8. prodigy: finds the step
    size itself, of which learning_rate 1.0 is a factor. came: 4 bytes a weight, for one moment and means of rows and
    columns of the other."""
    optimizer_offload: bool = False
    """adamw and adam: keep their moments, and the float32 copies of half-precision weights, in host memory and update
    there; a step then waits for copies and the processor. Needs an accelerator."""
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
    """Decay of the first moment."""
    beta2: Decay = 0.95
    """Decay of the second moment."""
    beta3: Decay | None = None
    """prodigy: decay of the sums behind the step size (default: sqrt(beta2)). came: of the instability (0.9999)."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator (came has its own)."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Share of a weight taken off a step, times the learning rate; with adam, its part in the gradient."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this global norm."""
    master_weights: Literal["float32", "stochastic_bf16"] = "float32"
    """Full fine-tuning in half precision. float32: exact copies (16 more bytes a parameter with the moments).
    stochastic_bf16 (adamw, adamw8bit): bf16 weights and moments (8 bytes a parameter in all; 6 with adamw8bit),
    rounded stochastically."""
    checkpointing: Literal["none", "full", "save_attention"] = "save_attention"
    """What the backward pass recomputes. save_attention keeps attention outputs, the dearest part."""
    compile: Literal["none", "default", "max_autotune"] = "none"
    """torch.compile of each block, in training. Each shape is compiled once, which takes minutes. max_autotune tries
    kernels for each product, and may choose others in another run."""
    fp8: Literal["none", "rowwise", "tensorwise"] = "none"
    """Make the matrix products of the blocks' linear layers in float8, forward and backward, with a scale for each row
    (closer) or for each matrix. Weights stay as they are. Needs a card of compute capability 8.9 and bfloat16; a CPU
    computes the same numbers and saves no time. Meant for train.compile."""
    checkpointing_layers: Positive | None = None
    """Layers, from the first, that do so; the others keep everything and are faster. Default: all."""
    activation_offload: bool = False
    """Keep what the backward pass needs in host memory, fetched one block ahead. Needs an accelerator."""
    swapped_blocks: NotNegative = 0
    """LoRA: blocks whose frozen weights live in host memory and visit the accelerator one block ahead of their turn."""
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
    async_checkpoint: bool = False
    """Write checkpoints while training goes on, from a copy in the host's memory (of the size that each process writes
    of one). A crash before one is written costs the steps since the one before, up to two intervals."""
    time_limit_minutes: Annotated[float, Field(gt=0)] | None = None
    """Save and leave (exit code 75) when another step and its save would end later than this after the start (with
    `cogvideox launch` the first one, restarts included). Each start makes one step at least. Default: no limit."""
    resume: str = "auto"
    """auto: go on from the newest checkpoint of the run folder if there is one. never: refuse a used run folder.
    Or the path of a checkpoint."""
    allow_change: list[str] = []
    """Settings that a resumed run may change although its numbers depend on them, such as train.learning_rate, or data
    for other clips. Changes are said and recorded."""
    num_workers: NotNegative = 2
    """Threads that read ahead."""
    on_bad_step: Literal["skip", "stop"] = "skip"
    """What follows a step whose loss or gradient is not finite, or a spike; it never updates a weight. skip: its clips
    are named in quarantine.jsonl and training goes on, until 3 such steps in a row or 10 within 1000. stop: end."""
    spike_factor: Annotated[float, Field(gt=1)] | None = None
    """A gradient norm over this many times the median of the last 64 steps is a spike. Default: none is."""
    exclude: str | None = None
    """Clips not to train on: the quarantine.jsonl of a run, or any JSONL file with clip ids in a column `clip`."""
    log_samples: NotNegative = 64
    """Samples whose loss is written to losses.jsonl with each log line, the last ones (0: none)."""
    tracker: Literal["none", "wandb", "trackio"] = "none"
    """Send what is logged there as well (needs the extra of that name)."""
    tracker_project: str = "cogvideox-factory"
    """Project of the tracker; the run is called like the run folder."""


class Parallel(Section):
    """How the processes that a launcher starts divide a run of training or of making videos, and how long they wait."""

    sequence: Positive = 1
    """Processes that divide each video's tokens among them (sequence parallelism); others take other clips, prompts."""
    ring: Positive | None = None
    """Of those, the processes along which keys and values travel. Default: as few as the model's heads allow."""
    guidance: Annotated[int, Field(ge=1, le=2)] = 1
    """Generation: 2 lets other processes predict with the prompt than with the negative one."""
    zero: Annotated[int, Field(ge=0, le=3)] = 0
    """What is divided among the processes. 0: nothing. 1: the optimizer. 2: gradients too. 3: weights too. Generation
    has only weights to divide: 0 or 3."""
    replicas: Positive = 1
    """Whole copies of the model among which zero 1-3 does not divide: one a node, say (hybrid sharding)."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 1800
    """How long a process waits for the others before it gives up."""
    hang_seconds: Annotated[float, Field(ge=0)] = 300
    """A run that makes no step for so long (or for ten times its usual step, if that is more) ends with exit code 8 and
    the stacks of its threads. 0: never. Saving, validation and compiling may take longer. Training only."""

    @property
    def layout(self) -> dict[str, Any]:
        """What is divided, without how long anyone waits: the arguments of `ranks.Layout` but its size."""
        return self.model_dump(exclude={"timeout_seconds", "hang_seconds"})


class Validation(Section):
    """Watching a run."""

    every: NotNegative = 0
    """Steps between validations (0: never)."""
    num_clips: Positive = 4
    """Clips held out of training for the validation loss (fixed noise, fixed timesteps)."""
    prompts: list[str] = []
    """A sample video is made for each of these."""
    images: list[str] = []
    """Image-to-video: one image path a prompt."""


class Vae(Section):
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
