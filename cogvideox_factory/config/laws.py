"""What settings of several sections must have in common; every contradiction is told at once."""

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from cogvideox_factory.config.data import Data
from cogvideox_factory.config.generation import Generate
from cogvideox_factory.config.training import Train

if TYPE_CHECKING:
    from cogvideox_factory.config import Config


def problems_of(config: "Config") -> list[str]:
    """Return one line for each law that `config` breaks."""
    problems = _problems_of_sets(config.data, config.task)
    if (config.data.captions is None) != (config.data.videos is None):
        problems.append("data.captions and data.videos belong together; give both or neither")
    if config.data.table and config.data.captions:
        problems.append("data.table and data.captions both name the captions; give one of them")
    if config.train.warmup_steps >= config.train.steps and config.train.warmup_steps > 0:
        problems.append(
            f"train.warmup_steps={config.train.warmup_steps} must be below train.steps={config.train.steps}, "
            "or the learning rate never reaches its peak"
        )
    if config.model.transformer_config and not config.model.transformer and config.train.method == "lora":
        problems.append(
            "model.transformer_config alone means random weights, and a LoRA over those learns nothing; "
            "set train.method to full, or name weights for it with model.transformer"
        )
    if config.train.swapped_blocks and config.train.method == "full":
        problems.append(
            "train.swapped_blocks is for frozen weights, and train.method=full trains them all; use train.method=lora, "
            "or divide them with parallel.zero=3"
        )
    for name, wanted in (
        ("train.swapped_blocks", config.train.swapped_blocks > 0),
        ("lora.base", config.lora.base != "model"),
    ):
        if wanted and config.parallel.zero:
            problems.append(
                f"{name} keeps frozen weights whole in every process and parallel.zero={config.parallel.zero} divides "
                f"them; choose one: parallel.zero=0, or no {name}"
            )
    if config.train.fp8 != "none" and config.lora.base != "model":
        problems.append(
            f"train.fp8={config.train.fp8} rounds the base for each product, which lora.base={config.lora.base} "
            "has done for good; choose one: train.fp8=none, or lora.base=model"
        )
    if config.vae.config and config.vae.start:
        problems.append("vae.config starts from random weights and vae.start from given ones; give one")
    if config.vae.config and config.vae.parts == "decoder":
        problems.append("vae.parts=decoder keeps an encoder that vae.config has yet to draw; use both")
    if config.vae.balance and config.vae.parts == "decoder":
        problems.append("vae.balance changes the latents and vae.parts=decoder keeps them; choose one")
    if not config.vae.steps and not config.vae.balance:
        problems.append("vae.steps=0 trains nothing and vae.balance=0 balances nothing; set one of them")
    if config.vae.crop and config.vae.crop % 8:
        problems.append(
            f"vae.crop={config.vae.crop} is no multiple of 8; the nearest is {config.vae.crop // 8 * 8 or 8}"
        )
    for name, value, fits in (
        ("windows", config.data.windows, ("first",)),
        ("short_clips", config.data.short_clips, ("reject", "repeat_last")),
    ):
        if config.data.fps_policy == "stretch" and value not in fits:
            problems.append(
                f"data.{name}={value} counts in the source's time, which data.fps_policy=stretch gives up; use "
                f"data.{name}={' or '.join(fits)}, or data.fps_policy=resample"
            )
    if config.cache.dir and config.data.flip_probability:
        problems.append("data.flip_probability has no effect on cached latents; set it to 0 or train without cache.dir")
    for applies, why, names in _WITHOUT_EFFECT:
        if applies(config):
            problems += [f"{name} has no effect with {why}; remove it" for name in names if _is_set(config, name)]
    problems += _problems_of_optimizer(config.train)
    problems += _problems_of_tuning(config)
    if config.train.compile != "none":
        problems += _problems_of_compiling(config)
    problems += _problems_of_generating(config.generate)
    return problems


def _is_set(config: "Config", name: str) -> bool:
    section, field = name.split(".")
    values = getattr(config, section)
    return getattr(values, field) != type(values).model_fields[field].default


def _problems_of_optimizer(train: Train) -> list[str]:
    problems, stochastic = [], train.master_weights == "stochastic_bf16"
    if stochastic and train.optimizer not in ("adamw", "adamw8bit"):
        problems.append(
            f"train.master_weights=stochastic_bf16 is for adamw and adamw8bit, not train.optimizer={train.optimizer}; "
            "use one of those, or float32"
        )
    if train.optimizer_offload and train.optimizer not in ("adamw", "adam"):
        problems.append(
            f"train.optimizer_offload is for adamw and adam, not train.optimizer={train.optimizer}, which is slow on a "
            "processor; use one of those, or leave it on the device"
        )
    if train.optimizer_offload and stochastic:
        problems.append(
            "train.optimizer_offload moves float32 masters, which train.master_weights=stochastic_bf16 does without; "
            "choose one"
        )
    return problems


def _problems_of_tuning(config: "Config") -> list[str]:
    return [
        f"{name}.compile=max_autotune chooses kernels by the clock, so a run does not repeat bit for bit as "
        f"run.deterministic=true asks; use {name}.compile=default, or run.deterministic=false"
        for name in ("train", "generate")
        if getattr(config, name).compile == "max_autotune" and config.run.deterministic
    ]


def _problems_of_compiling(config: "Config") -> list[str]:
    problems = []
    for name, wanted in (
        ("train.activation_offload", config.train.activation_offload),
        (f"lora.base={config.lora.base}", config.lora.base != "model"),
    ):
        if wanted:
            problems.append(f"{name} is not for compiled blocks; choose train.compile=none, or no {name.split('=')[0]}")
    return problems


def _problems_of_generating(ask: Generate) -> list[str]:
    """Return what `generate` cannot do at once."""
    problems = []
    start, stop = ask.guidance_interval
    if start >= stop:
        problems.append(f"generate.guidance_interval={start:g} {stop:g} holds no step; give the smaller share first")
    if ask.first_block_cache and ask.tea_cache:
        problems.append(
            "generate.first_block_cache and generate.tea_cache are two ways to leave out blocks; use one of them"
        )
    if ask.lora_weight and len(ask.lora_weight) != len(ask.lora):
        problems.append(
            f"generate.lora_weight has {len(ask.lora_weight)} values for "
            f"{len(ask.lora)} LoRAs; give one each, or none for 1.0"
        )
    if ask.compile != "none" and ask.offload in ("model", "block", "group"):
        problems.append(
            f"generate.compile keeps blocks where they are and generate.offload={ask.offload} moves them; choose one"
        )
    if ask.base != "model":
        for name, wanted in (("generate.compile", ask.compile != "none"), ("generate.merge_lora", ask.merge_lora)):
            if wanted:
                problems.append(f"{name} needs plain weights, and generate.base={ask.base} has few bits; choose one")
    return problems


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


def lacking_in_mindspore(config: "Config", sections: Collection[str]) -> list[str]:
    """Return one line for each setting in `sections`, those a command reads, that the MindSpore engine has not."""
    problems = [
        f"{section}.{field}={_spelled(value)}: the MindSpore engine has not got this; {instead}"
        for section, field, has, instead in _LACKING
        if section in sections and not has(value := getattr(getattr(config, section), field))
    ]
    if "parallel" in sections:
        default = type(config.parallel)()
        problems += [
            f"parallel.{field}={_spelled(value)}: the MindSpore engine has not got this; remove it, or use "
            "--engine torch"
            for field in ("ring", "guidance", "replicas")
            if (value := getattr(config.parallel, field)) != getattr(default, field)
        ]
        if "train" in sections and config.train.master_weights == "stochastic_bf16" and config.parallel.zero:
            problems.append(
                f"train.master_weights=stochastic_bf16 with parallel.zero={config.parallel.zero}: the MindSpore engine "
                "rounds whole weights only; use parallel.zero=0, float32 master weights, or --engine torch"
            )
    return problems


def _spelled(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _is_off(value: object) -> bool:
    return not value


# What the MindSpore engine has not got: section, setting, whether it has a value, and what there is instead.
_LACKING: tuple[tuple[str, str, Callable[[Any], bool], str], ...] = (
    ("train", "optimizer", lambda value: value in ("adamw", "adam"), "use adamw or adam, or --engine torch"),
    ("train", "optimizer_offload", _is_off, "leave it off, or use --engine torch"),
    ("train", "activation_offload", _is_off, "leave it off, or use --engine torch"),
    ("train", "swapped_blocks", _is_off, "use 0, or --engine torch"),
    ("train", "checkpointing_layers", _is_off, "remove it (all layers do alike), or use --engine torch"),
    (
        "train", "compile", lambda value: value == "none",
        "it is torch.compile; --mindspore.mode 0 compiles here",
    ),
    ("train", "fp8", lambda value: value == "none", "use none, or --engine torch"),
    ("train", "async_checkpoint", _is_off, "leave it off, or use --engine torch"),
    ("train", "spike_factor", _is_off, "remove it, or use --engine torch"),
    ("lora", "base", lambda value: value == "model", "use model, or --engine torch"),
    ("generate", "base", lambda value: value == "model", "use model, or --engine torch"),
    ("generate", "offload", lambda value: value in ("auto", "none"), "leave it at auto, or use --engine torch"),
    ("generate", "compile", lambda value: value == "none", "it is torch.compile; --mindspore.mode 0 compiles here"),
    ("generate", "first_block_cache", _is_off, "use 0, or --engine torch"),
    ("generate", "tea_cache", _is_off, "use 0, or --engine torch"),
    ("run", "tf32", _is_off, "it is a format of CUDA cards; remove it"),
    ("run", "peak_tflops", _is_off, "its log has no MFU; remove it"),
)  # fmt: skip

# Settings that would be read by nobody, and when: setting one away from its default is a mistake worth a line.
_WITHOUT_EFFECT: tuple[tuple[Callable[["Config"], bool], str, tuple[str, ...]], ...] = (
    (
        lambda config: config.engine != "mindspore",
        "engine=torch",
        ("mindspore.mode", "mindspore.jit_level", "mindspore.amp_level"),
    ),
    (lambda config: config.mindspore.mode == 1, "mindspore.mode=1, which compiles nothing", ("mindspore.jit_level",)),
    (
        lambda config: config.task == "t2v",
        "task=t2v",
        (
            "data.image_column", "generate.image", "generate.extend", "validation.images", "cache.image_noise_variants",
            "train.image_dropout", "train.image_noise", "train.image_scale",
        ),
    ),
    (lambda config: config.task == "i2v", "task=i2v", ("generate.video",)),
    (lambda config: not config.generate.video, "no generate.video", ("generate.strength",)),
    (
        lambda config: bool(config.generate.extend),
        "generate.extend, which starts from the last frame of a video",
        ("generate.image",),
    ),
    (
        lambda config: config.generate.offload not in ("auto", "group"),
        "generate.offload other than auto and group",
        ("generate.offload_group",),
    ),
    (lambda config: config.generate.format != "mp4", "generate.format other than mp4", ("generate.codec",)),
    (
        lambda config: config.train.method == "full",
        "train.method=full",
        ("lora.rank", "lora.alpha", "lora.use_rslora", "lora.use_dora", "lora.target_modules", "lora.base"),
    ),
    (
        lambda config: config.train.method == "lora",
        "train.method=lora",
        ("train.master_weights",),
    ),
    (lambda config: config.train.optimizer == "came", "train.optimizer=came", ("train.epsilon",)),
    (
        lambda config: config.train.optimizer not in ("prodigy", "came"),
        "train.optimizer other than prodigy and came",
        ("train.beta3",),
    ),
    (
        lambda config: config.train.checkpointing == "none",
        "train.checkpointing=none",
        ("train.checkpointing_layers",),
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
    (lambda config: config.parallel.sequence == 1, "parallel.sequence=1", ("parallel.ring",)),
    (lambda config: config.train.tracker == "none", "train.tracker=none", ("train.tracker_project",)),
    (lambda config: config.train.resume == "never", "train.resume=never", ("train.allow_change",)),
    (lambda config: not config.validation.every, "validation.every=0", ("validation.prompts", "validation.images")),
    (lambda config: not config.validation.prompts, "no validation.prompts", ("validation.images",)),
    (
        lambda config: config.sampling.guidance_scale == 1 and not config.sampling.dynamic_guidance,
        "sampling.guidance_scale=1, which predicts once",
        ("parallel.guidance", "generate.guidance_interval", "sampling.negative_prompt"),
    ),
    (lambda config: not config.generate.lora, "no generate.lora", ("generate.merge_lora",)),
    (lambda config: not config.generate.tea_cache, "no generate.tea_cache", ("generate.tea_cache_polynomial",)),
)  # fmt: skip
