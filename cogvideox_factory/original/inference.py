"""The flags of infer, which only the MindSpore project has."""

from dataclasses import replace

from cogvideox_factory.original import choices
from cogvideox_factory.original.flag import MINDSPORE, Given, inert, joint, refused, same

_PROMPT = (
    "A panda in a small red jacket sits on a stool in a bamboo forest and plays a guitar; other pandas listen, and "
    "sunlight falls through the leaves."
)


def choose_image(given: Given) -> None:
    """Decide the task: an image makes it image-to-video."""
    image = given["image_path"]
    given.set("task", "i2v" if image else "t2v")
    if image:
        given.set("generate.image", [image])


def choose_prompt(given: Given) -> None:
    """Decide what to show."""
    given.set("generate.prompt", [given["prompt"]])
    if "prompt" not in given.typed:
        given.say(f"no --prompt: {_PROMPT}")


def choose_weights(given: Given) -> None:
    """Decide whose weights: the model's, a transformer's in its place, or a LoRA's on top."""
    transformer, lora = given["transformer_ckpt_path"], given["lora_ckpt_path"]
    if transformer:
        given.set("model.transformer", transformer)
    if lora:
        given.set("generate.lora", [lora])


def choose_output(given: Given) -> None:
    """Decide where to: one file, a video or the array of its frames."""
    video, array = given["video_output_path"], given["npy_output_path"]
    given.set("generate.out", video or array)
    if array and not video:
        given.set("generate.format", "npy")
        given.say(f"--npy_output_path {array}: one file there, of all frames")
    else:
        given.say_inert(("npy_output_path",), "video_output_path has the frames; alone it writes their array")


_FLAGS = (
    same("seed", "integer", "run.seed", 42),
    inert("distributed", "switch", "the launcher decides how many processes there are", False),
    joint("mindspore_mode", "integer", "", choices.choose_arithmetic, 1, "see the table of modes"),
    joint(
        "jit_level", "text", "", choices.choose_arithmetic, "O0", "see the table of modes", choices=("O0", "O1", "O2")
    ),
    joint("zero_stage", "integer", "parallel.zero", choices.choose_zero, 0, "0 or 3"),
    joint("mixed_precision", "text", "run.dtype", choices.choose_arithmetic, "bf16", choices=("no", "fp16", "bf16")),
    joint("enable_sequence_parallelism", "truth", "parallel.sequence", choices.choose_sequence, False),
    joint("sequence_parallel_shards", "integer", "parallel.sequence", choices.choose_sequence, 1),
    joint(
        "pretrained_model_name_or_path", "text", "model.path", choices.require_model, "THUDM/CogVideoX1.5-5b",
    ),
    same("revision", "text", "model.revision"),
    refused(
        "variant", "text", "files without a variant in their names are read; mixed_precision converts while loading"
    ),
    joint("prompt", "text", "generate.prompt", choose_prompt, _PROMPT, "without it: a panda"),
    joint("image_path", "text", "generate.image, task", choose_image, note="with it: task i2v"),
    joint(
        "transformer_ckpt_path", "text", "model.transformer", choose_weights,
        note="a run folder or a folder of safetensors; a .ckpt is read by MindSpore only",
    ),
    joint("lora_ckpt_path", "text", "generate.lora", choose_weights, note="at weight 1.0, its trained strength"),
    same("transformer_config", "text", "model.transformer_config", note="theirs has none; for larger models"),
    same("height", "integer", "generate.height", 768),
    same("width", "integer", "generate.width", 1360),
    same("frame", "integer", "generate.num_frames", 77),
    same("max_sequence_length", "integer", "text.max_sequence_length", 224),
    joint(
        "npy_output_path", "text", "generate.out, generate.format", choose_output,
        note="without video_output_path: one array of all frames in that folder",
    ),
    joint("video_output_path", "text", "generate.out", choose_output, note="at the model's frame rate"),
)  # fmt: skip

FLAGS = tuple(replace(flag, origin=MINDSPORE) for flag in _FLAGS)
