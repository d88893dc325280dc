"""Settings of training: adapters, the optimisation, many processes, and what is watched."""

from typing import Annotated, Literal

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


class Parallel(Section):
    """How the processes that torchrun starts divide a training run, and how long they wait."""

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
    hang_seconds: Annotated[float, Field(ge=0)] = 300
    """A run that makes no step for so long (or for ten times its usual step, if that is more) ends with exit code 8 and
    the stacks of its threads. 0: never. Saving and validation may take longer."""


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
