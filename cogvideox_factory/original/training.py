"""The flags of the four trainers."""

from cogvideox_factory.original import choices, clips
from cogvideox_factory.original.choices import OPTIMIZERS, SCHEDULES
from cogvideox_factory.original.flag import MINDSPORE, PYTORCH, inert, joint, refused, same

_PYTORCH_SIZES = [256, 320, 384, 480, 512, 576, 720, 768, 960, 1024, 1280, 1536]
_PRODIGY = "Prodigy is used as its authors advise (decoupled decay, bias correction)"
_DEAD = "with theirs neither"

SHAPES = (
    joint(
        "height_buckets",
        "integers",
        "data.height, data.buckets",
        clips.choose_shape,
        [480],
        "several: data.buckets auto",
        pytorch_default=_PYTORCH_SIZES,
    ),
    joint(
        "width_buckets",
        "integers",
        "data.width, data.buckets",
        clips.choose_shape,
        [720],
        "several: data.buckets auto",
        pytorch_default=_PYTORCH_SIZES,
    ),
    joint(
        "frame_buckets",
        "integers",
        "data.num_frames, data.buckets",
        clips.choose_shape,
        [49],
        "several: data.buckets auto",
    ),
)
"""Flags of the trainers and of prepare_dataset alike."""

FLAGS = (
    # Model
    joint("pretrained_model_name_or_path", "text", "model.path", choices.require_model, note="required"),
    same("revision", "text", "model.revision"),
    refused("variant", "text", "files without a variant in their names are read; run.dtype converts while loading"),
    inert("cache_dir", "text", f"{_DEAD}; HF_HOME says where downloads go"),
    same(
        "transformer_config", "text", "model.transformer_config", origin=MINDSPORE,
        note="their YAML with a `transformer:` map, or a config.json",
    ),
    same(
        "transformer_ckpt_path", "text", "model.transformer", origin=MINDSPORE,
        note="a folder of safetensors; a .ckpt is read by MindSpore only",
    ),
    # Data
    joint(
        "data_root", "text", "data.root, cache.dir", clips.choose_clips,
        note="with vae_cache it names the cache that `prepare` wrote",
    ),
    joint("dataset_file", "text", "data.table", clips.choose_clips),
    joint(
        "video_column", "text", "data.videos, data.video_column", clips.choose_clips, "video",
        "a list's name; with dataset_file a column's",
    ),
    joint(
        "caption_column", "text", "data.captions, data.caption_column", clips.choose_clips, "text",
        "a list's name; with dataset_file a column's",
    ),
    joint("id_token", "text", "data.trigger_word", clips.choose_ways, note="with a cache: as it was prepared"),
    *SHAPES,
    joint(
        "vae_cache", "switch", "cache.dir", clips.choose_clips, False, "data_root is the cache", origin=MINDSPORE
    ),
    joint(
        "embeddings_cache", "switch", "cache.dir", clips.choose_clips, False,
        "a cache here holds latents as well; without one, captions are encoded once at the start", origin=MINDSPORE,
    ),
    joint(
        "load_tensors", "switch", "cache.dir", clips.choose_clips, False, "data_root is the cache", origin=PYTORCH
    ),
    joint("random_flip", "number", "data.flip_probability", clips.choose_ways, note="drawn once a clip, not a frame"),
    same("dataloader_num_workers", "integer", "train.num_workers", 1, pytorch_default=0),
    inert("pin_memory", "switch", "memory is pinned wherever there is a card", False),
    inert("dynamic_shape", "switch", "shapes need not be declared", False, origin=MINDSPORE),
    joint(
        "bucket_config", "text", "data.buckets", clips.choose_shape, origin=MINDSPORE,
        note="their bucket.yaml as it is; with a cache: as it was prepared",
    ),
    # Validation
    joint(
        "validation_prompt", "text", "validation.prompts", choices.choose_validation,
        note="full fine-tuning makes samples, too; validation.num_clips clips are held out for a validation loss",
    ),
    joint("validation_images", "text", "validation.images", choices.choose_validation),
    joint("validation_prompt_separator", "text", "validation.prompts", choices.choose_validation, ":::"),
    inert("num_validation_videos", "integer", "one sample video a prompt is made", 1),
    joint(
        "validation_epochs", "integer", "validation.every", choices.choose_validation, note="as that many steps"
    ),
    joint("validation_steps", "integer", "validation.every", choices.choose_validation),
    joint("guidance_scale", "number", "sampling.guidance_scale", choices.choose_validation, 6.0),
    joint("use_dynamic_cfg", "switch", "sampling.dynamic_guidance", choices.choose_validation, False),
    inert("enable_model_cpu_offload", "switch", "the text encoder is gone by the time samples are made", False),
    # Training
    same("seed", "integer", "run.seed", 42, "theirs without it: no seed"),
    same("lora_rank", "integer", "lora.rank", 64, only="lora", also=("rank",)),
    same("lora_alpha", "number", "lora.alpha", 64.0, only="lora"),
    joint(
        "mixed_precision", "text", "run.dtype", choices.choose_arithmetic, "no", "no: float32",
        choices=("no", "fp16", "bf16"),
    ),
    same("output_dir", "text", "train.dir", "cogvideox-sft"),
    inert("height", "integer", "sample videos have the size that is trained", 480),
    inert("width", "integer", "sample videos have the size that is trained", 720),
    joint(
        "video_reshape_mode", "text", "data.crop", clips.choose_ways, "none", "none: data.crop stretch, as with theirs",
        choices=clips.RESHAPE_MODES,
    ),
    inert("fps", "integer", f"{_DEAD}; see data.fps and data.fps_policy", 8),
    joint("max_num_frames", "integer", "data.num_frames", clips.choose_shape, 49, "frame_buckets decides"),
    inert("skip_frames_start", "integer", _DEAD, 0),
    inert("skip_frames_end", "integer", _DEAD, 0),
    same("gradient_accumulation_steps", "integer", "train.gradient_accumulation", 1),
    joint(
        "enable_sequence_parallelism", "truth", "parallel.sequence", choices.choose_sequence, False, origin=MINDSPORE
    ),
    joint("sequence_parallel_shards", "integer", "parallel.sequence", choices.choose_sequence, 1, origin=MINDSPORE),
    joint("zero_stage", "integer", "parallel.zero", choices.choose_zero, 0, origin=MINDSPORE),
    joint(
        "train_batch_size", "integer", "train.batch_size", choices.choose_batch, 4,
        "times the processes that take clips of their own, which ours counts together",
    ),
    joint("num_train_epochs", "integer", "train.steps", choices.choose_steps, 1, "counted in the list of clips"),
    joint("max_train_steps", "integer", "train.steps", choices.choose_steps),
    joint("checkpointing_steps", "integer", "train.save_every", choices.choose_steps, 500),
    joint(
        "checkpoints_total_limit", "integer", "train.keep_checkpoints", choices.choose_steps, note="without it: all"
    ),
    joint(
        "resume_from_checkpoint", "text", "train.resume", choices.choose_resume,
        note="its last part, in output_dir; without it, an unfinished run in output_dir is gone on with",
    ),
    joint("gradient_checkpointing", "switch", "train.checkpointing", choices.choose_checkpointing, False),
    joint(
        "fa_gradient_checkpointing", "truth", "train.checkpointing", choices.choose_checkpointing, False,
        "False: save_attention. True: full", origin=MINDSPORE,
    ),
    joint("learning_rate", "number", "train.learning_rate", choices.choose_rate, 1e-4),
    joint("scale_lr", "switch", "train.learning_rate", choices.choose_rate, False, "times the clips of a step"),
    joint("lr_scheduler", "text", "train.schedule", choices.choose_rate, "constant", choices=SCHEDULES),
    joint("lr_warmup_steps", "integer", "train.warmup_steps", choices.choose_rate, 500, "constant: none"),
    joint("lr_num_cycles", "integer", "train.num_cycles", choices.choose_rate, 1, "cosine_with_restarts"),
    joint("lr_power", "number", "train.power", choices.choose_rate, 1.0, "polynomial"),
    inert("enable_slicing", "switch", "the VAE takes clips one at a time in any case", False),
    joint("enable_tiling", "switch", "data.vae_tiling", clips.choose_ways, False, "with a cache: as it was prepared"),
    same("noised_image_dropout", "number", "train.image_dropout", 0.05, "a sample, not a batch", only="i2v"),
    refused(
        "ignore_learned_positional_embeddings", "switch",
        "CogVideoX-5B-I2V has learned positions for 480 x 720 and is trained at that; leave it out", False,
    ),
    same(
        "max_sequence_length", "integer", "text.max_sequence_length", origin=MINDSPORE, note="without it: the model's"
    ),
    # Optimizer
    joint(
        "optimizer", "text", "train.optimizer", choices.choose_optimizer, "adam",
        "adamw_bf16: adamw, float32 masters; adamw, adam: their own decay", choices=OPTIMIZERS,
    ),
    joint("use_8bit", "switch", "train.optimizer", choices.choose_optimizer, False, "adamw8bit"),
    refused("use_4bit", "switch", "4-bit moments are not there; --use_8bit is", False),
    inert("use_torchao", "switch", "8-bit moments need no library", False),
    same("beta1", "number", "train.beta1", 0.9),
    same("beta2", "number", "train.beta2", 0.95),
    joint("beta3", "number", "train.beta3", choices.choose_optimizer, note="prodigy, came"),
    inert("prodigy_decouple", "switch", _PRODIGY, False),
    inert("prodigy_use_bias_correction", "switch", _PRODIGY, False),
    inert("prodigy_safeguard_warmup", "switch", _PRODIGY, False),
    same("weight_decay", "number", "train.weight_decay", 1e-4),
    joint("epsilon", "number", "train.epsilon", choices.choose_optimizer, 1e-8),
    same("max_grad_norm", "number", "train.max_grad_norm", 1.0),
    joint("use_cpu_offload_optimizer", "switch", "train.optimizer_offload", choices.choose_optimizer, False),
    inert("offload_gradients", "switch", "train.optimizer_offload moves them as well", False),
    # Run
    joint(
        "tracker_name", "text", "train.tracker_project", choices.choose_report,
        note="report_to wandb or trackio; without it cogvideox-lora or cogvideox-sft",
    ),
    refused("push_to_hub", "switch", "train pushes nothing; cogvideox export RUN --push-to-hub NAME does", False),
    inert("hub_token", "text", "nothing is pushed (HF_TOKEN or `hf auth login` keeps a token out of sight)"),
    inert("hub_model_id", "text", "nothing is pushed; cogvideox export has --push-to-hub NAME"),
    inert("logging_dir", "text", "tensorboard/ lies in output_dir", "logs"),
    same("allow_tf32", "switch", "run.tf32", False, origin=PYTORCH),
    same("nccl_timeout", "number", "parallel.timeout_seconds", note="without it: ours, 1800 s"),
    joint(
        "report_to", "text", "train.tracker", choices.choose_report, "tensorboard",
        "wandb, trackio; tensorboard and metrics.jsonl are written in any case",
    ),
    inert("distributed", "switch", "the launcher decides how many processes there are", False, origin=MINDSPORE),
    joint(
        "mindspore_mode", "integer", "train.compile", choices.choose_arithmetic, 1, "see the table of modes",
        origin=MINDSPORE,
    ),
    joint(
        "jit_level", "text", "train.compile, run.deterministic", choices.choose_arithmetic, "O0",
        "see the table of modes", origin=MINDSPORE, choices=("O0", "O1", "O2"),
    ),
    joint(
        "amp_level", "text", "run.dtype", choices.choose_arithmetic, "O2", "fp16 only; see the table of modes",
        origin=MINDSPORE, choices=("O0", "O1", "O2", "O3"),
    ),
)  # fmt: skip
