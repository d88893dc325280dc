"""What the trainers' other flags come to where one setting of ours takes several of theirs, or another number."""

from math import ceil
from pathlib import Path

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.original.clips import buckets_of, steps_of_epochs
from cogvideox_factory.original.flag import Given
from cogvideox_factory.original.modes import Modes, dtype_settings, speed_settings
from cogvideox_factory.tracker import TRACKERS

SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")
_SFT = {"lora": "lora", "full": "sft"}
OPTIMIZERS = ("adam", "adamw", "adamw_bf16", "prodigy", "came")


def require_model(given: Given) -> None:
    """Decide the model."""
    if not given["pretrained_model_name_or_path"]:
        raise FactoryError("which model? give --pretrained_model_name_or_path with a folder or a hub id")
    given.set("model.path", given["pretrained_model_name_or_path"])


def choose_sequence(given: Given) -> None:
    """Decide how many processes share a video."""
    given.set("parallel.sequence", _sequence(given))
    if not given["enable_sequence_parallelism"]:
        given.say_inert(("sequence_parallel_shards",), "enable_sequence_parallelism is False")
    elif given.num_processes == 1:
        given.say_inert(("enable_sequence_parallelism", "sequence_parallel_shards"), "this is one process")


def _sequence(given: Given) -> int:
    is_on = given["enable_sequence_parallelism"] and given.num_processes > 1
    return given["sequence_parallel_shards"] if is_on else 1


def choose_zero(given: Given) -> None:
    """Decide what the processes divide; where videos are made there are only weights."""
    if given.script.command == "generate" and given["zero_stage"] in (1, 2):
        given.say_inert(("zero_stage",), "stages 1 and 2 divide what only training has (as with theirs)")
        return
    alone = given.num_processes == 1
    given.set("parallel.zero", 0 if alone else given["zero_stage"])
    if alone and given["zero_stage"]:
        given.say_inert(("zero_stage",), "this is one process")


def choose_batch(given: Given) -> None:
    """Decide the clips of a forward pass: ours counts them over all processes."""
    if _has_bucket_file(given):
        given.say_inert(("train_batch_size",), "the bucket file says how many clips of each shape a step has")
        return
    given.set("train.batch_size", _batch(given))


def _has_bucket_file(given: Given) -> bool:
    return buckets_of(given) not in (None, "auto")


def _batch(given: Given) -> int:
    return given["train_batch_size"] * max(1, given.num_processes // _sequence(given))


def _clips_a_step(given: Given) -> int:
    return _batch(given) * given["gradient_accumulation_steps"]


def choose_steps(given: Given) -> None:
    """Decide the length of the run, from epochs if need be, and what of it is kept."""
    steps = given["max_train_steps"]
    if steps is None:
        steps = _steps_of(given, "num_train_epochs", instead="max_train_steps")
    else:
        given.say_inert(("num_train_epochs",), "max_train_steps decides")
    given.set("train.steps", steps)
    every, limit = given["checkpointing_steps"], given["checkpoints_total_limit"]
    given.set("train.save_every", every)
    count = max(1, ceil(steps / max(1, every)))
    given.set("train.keep_checkpoints", count if limit is None else limit)
    if limit is None and count > 1:
        given.say(f"--checkpoints_total_limit is not given: all {count} checkpoints are kept")


def _steps_of(given: Given, flag: str, *, instead: str) -> int:
    """Return the steps of as many epochs as `flag` says.

    Raises:
        FactoryError: a bucket file decides how many clips a step has.
    """
    if _has_bucket_file(given):
        raise FactoryError(
            f"--{flag} {given[flag]} with --bucket_config {given['bucket_config']}: that file gives each shape its own "
            f"clips a step, so epochs are no number of steps; give --{instead} N"
        )
    return steps_of_epochs(given, given[flag], _clips_a_step(given))


def choose_resume(given: Given) -> None:
    """Decide where to go on: only the last part of a path counts, looked for in output_dir."""
    wanted = given["resume_from_checkpoint"]
    if wanted is None or wanted == "latest":
        given.set("train.resume", "auto")
        return
    name = Path(wanted).name
    number = name.removeprefix("checkpoint-")
    if number.isdigit():
        name = f"checkpoint-{int(number):06}"
    given.set("train.resume", str(Path(given["output_dir"]) / name))


def choose_rate(given: Given) -> None:
    """Decide the learning rate and its course."""
    rate, factor = given["learning_rate"], _clips_a_step(given)
    if given["scale_lr"]:
        given.set("train.learning_rate", rate * factor)
        given.say(f"--scale_lr: learning rate {rate:g} x {factor} clips a step = {rate * factor:g}")
    else:
        given.set("train.learning_rate", rate)
    name = given["lr_scheduler"]
    given.set("train.schedule", "constant" if name == "constant_with_warmup" else name)
    if name == "constant":
        given.set("train.warmup_steps", 0)
        given.say_inert(("lr_warmup_steps",), "lr_scheduler constant has none (constant_with_warmup has)")
    else:
        given.set("train.warmup_steps", given["lr_warmup_steps"])
    for flag, setting, owner in (
        ("lr_num_cycles", "train.num_cycles", "cosine_with_restarts"),
        ("lr_power", "train.power", "polynomial"),
    ):
        if name == owner:
            given.set(setting, given[flag])
        else:
            given.say_inert((flag,), f"it belongs to lr_scheduler {owner}")


def choose_optimizer(given: Given) -> None:
    """Decide the optimizer and where its state lives."""
    name = {"adamw_bf16": "adamw"}.get(given["optimizer"], given["optimizer"])
    if given["use_8bit"]:
        if name != "adamw":
            raise FactoryError(f"--use_8bit --optimizer {name}: 8-bit moments are there for adamw; use that")
        name = "adamw8bit"
    if name != "adamw":
        given.set("train.optimizer", name)
    if given["use_cpu_offload_optimizer"]:
        given.set("train.optimizer_offload", True)
    if name in ("prodigy", "came"):
        given.set("train.beta3", given["beta3"])
    else:
        given.say_inert(("beta3",), "it belongs to prodigy and came")
    if name == "came":
        given.say_inert(("epsilon",), "came has its own")
    else:
        given.set("train.epsilon", given["epsilon"])


def choose_checkpointing(given: Given) -> None:
    """Decide what the backward pass computes again."""
    again = given["fa_gradient_checkpointing"]
    if not given["gradient_checkpointing"]:
        given.set("train.checkpointing", "none")
        given.say_inert(("fa_gradient_checkpointing",), "without gradient_checkpointing nothing is computed again")
        return
    given.set("train.checkpointing", "full" if again else "save_attention")


def choose_arithmetic(given: Given) -> None:
    """Decide dtype and compilation.

    Raises:
        FactoryError: a mode that is not there.
    """
    known = {name: given[name] for name in ("mindspore_mode", "jit_level", "amp_level")}
    modes = Modes(**{name: value for name, value in known.items() if value is not None})
    if modes.mindspore_mode not in (0, 1):
        raise FactoryError(f"--mindspore_mode {modes.mindspore_mode}: give 0 (graph) or 1 (PyNative)")
    if given.engine == "mindspore":
        _hand_modes_through(given, modes)
        return
    for setting, value in dtype_settings(modes, given["mixed_precision"] or "no").items():
        given.set(setting, value)
    if given["mixed_precision"] != "fp16":
        given.say_inert(("amp_level",), "it counts with mixed_precision fp16 only (as with theirs)")
    if given.script.command == "generate":
        given.say_inert(("mindspore_mode", "jit_level"), "making videos is eager; compiling is for training")
        return
    row = speed_settings(modes)
    for setting, value in row.settings.items():
        given.set(setting, value)
    if modes.mindspore_mode == 1:
        given.say_inert(("jit_level",), "it belongs to graph mode (mindspore_mode 0)")
    elif "mindspore_mode" in given.typed:
        given.say(f"--mindspore_mode 0 --jit_level {modes.jit_level}: {row.here}")


def _hand_modes_through(given: Given, modes: Modes) -> None:
    """The MindSpore engine knows these words."""
    precision = given["mixed_precision"] or "no"
    given.set("run.dtype", {"bf16": "bfloat16", "fp16": "float16", "no": "float32"}[precision])
    given.set("mindspore.mode", modes.mindspore_mode)
    if modes.mindspore_mode == 0:
        given.set("mindspore.jit_level", modes.jit_level)
    else:
        given.say_inert(("jit_level",), "it belongs to graph mode (mindspore_mode 0)")
    if precision == "fp16":
        given.set("mindspore.amp_level", modes.amp_level)
    else:
        given.say_inert(("amp_level",), "it counts with mixed_precision fp16 only (as with theirs)")


def choose_validation(given: Given) -> None:
    """Decide which sample videos are made, and how often."""
    text, mark = given["validation_prompt"], given["validation_prompt_separator"]
    others = ("validation_images", "validation_epochs", "validation_steps", "guidance_scale", "use_dynamic_cfg")
    if text is None:
        given.say_inert(others, "there is no validation_prompt")
        return
    every = given["validation_steps"]
    if every is None and given["validation_epochs"]:
        every = _steps_of(given, "validation_epochs", instead="validation_steps")
    else:
        given.say_inert(("validation_epochs",), "validation_steps decides")
    if not every:
        raise FactoryError("--validation_prompt: how often? give --validation_steps N or --validation_epochs N")
    given.set("validation.every", every)
    given.set("validation.prompts", text.split(mark))
    if given.script.task == "i2v":
        images = given["validation_images"]
        given.set("validation.images", images.split(mark) if images else [])
    else:
        given.say_inert(("validation_images",), "it belongs to image-to-video")
    given.set("sampling.guidance_scale", given["guidance_scale"])
    given.set("sampling.dynamic_guidance", given["use_dynamic_cfg"])


def choose_report(given: Given) -> None:
    """Decide where numbers go besides the run folder.

    Raises:
        FactoryError: somewhere that is not there, or two of them.
    """
    names = [name.strip() for name in (given["report_to"] or "").split(",")]
    trackers = [name for name in names if name not in ("", "none", "tensorboard")]
    if len(trackers) > 1 or not set(trackers) <= set(TRACKERS):
        raise FactoryError(
            f"--report_to {','.join(trackers)}: give one of {', '.join(TRACKERS)}; tensorboard/ and metrics.jsonl are "
            "written in any case"
        )
    if not trackers:
        given.say_inert(("tracker_name",), "it belongs to report_to wandb or trackio")
        return
    given.set("train.tracker", trackers[0])
    given.set("train.tracker_project", given["tracker_name"] or "cogvideox-" + _SFT[given.script.method])
