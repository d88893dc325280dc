"""The flags of prepare_dataset."""

from cogvideox_factory.errors import FactoryError
from cogvideox_factory.original import choices, clips
from cogvideox_factory.original.flag import MINDSPORE, PYTORCH, Given, inert, joint, same
from cogvideox_factory.original.training import SHAPES

_KEPT = "a cache has latents and embeddings, always"


def choose_task(given: Given) -> None:
    """Decide the task: image latents are for image-to-video."""
    given.set("task", "i2v" if given["save_image_latents"] else "t2v")


def choose_cache(given: Given) -> None:
    """Decide where to, and which part of the work is this process's."""
    if not given["output_dir"]:
        raise FactoryError("where to? give --output_dir FOLDER")
    given.set("cache.dir", given["output_dir"])
    if given.num_processes > 1:
        given.set("prepare.shard", f"{given.rank + 1}/{given.num_processes}")


def tell_kept(given: Given) -> None:
    """Say what is kept where the flags ask for less: a cache has latents and embeddings."""
    if not given["save_latents_and_embeddings"] and not (given["vae_cache"] and given["embeddings_cache"]):
        given.say("latents and embeddings are both kept, with vae_cache and embeddings_cache or without")


def choose_dtype(given: Given) -> None:
    """Decide what the encoders run in."""
    given.set("run.dtype", {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[given["dtype"]])


FLAGS = (
    joint(
        "pretrained_model_name_or_path", "text", "model.path", choices.require_model, note="required",
        pytorch_default="THUDM/CogVideoX-2b", also=("model_id",),
    ),
    joint("data_root", "text", "data.root", clips.choose_clips, note="required"),
    joint("dataset_file", "text", "data.table", clips.choose_clips),
    joint(
        "caption_column", "text", "data.captions, data.caption_column", clips.choose_clips, "caption",
        "a list's name; with dataset_file a column's",
    ),
    joint(
        "video_column", "text", "data.videos, data.video_column", clips.choose_clips, "video",
        "a list's name; with dataset_file a column's",
    ),
    joint("id_token", "text", "data.trigger_word", clips.choose_ways),
    *SHAPES,
    joint("random_flip", "number", "", clips.choose_ways, note="refused: a cache holds no flipped clips"),
    inert("dataloader_num_workers", "integer", "as many threads read as the encoder needs", 1),
    inert("pin_memory", "switch", "memory is pinned wherever there is a card", False, origin=PYTORCH),
    joint(
        "video_reshape_mode", "text", "data.crop", clips.choose_ways, "none", "none: data.crop stretch, as with theirs",
        choices=clips.RESHAPE_MODES,
    ),
    joint("save_image_latents", "switch", "task", choose_task, False, "task i2v"),
    joint("output_dir", "text", "cache.dir", choose_cache, note="required; what the trainers' data_root names"),
    joint("max_num_frames", "integer", "data.num_frames", clips.choose_shape, 49, "frame_buckets decides"),
    same("max_sequence_length", "integer", "text.max_sequence_length", 226),
    inert("target_fps", "integer", "it was the rate of copies of the clips, and none are made; see data.fps", 8),
    joint("vae_cache", "switch", "", tell_kept, False, _KEPT, origin=MINDSPORE, also=("save_latents",)),
    joint("embeddings_cache", "switch", "", tell_kept, False, _KEPT, origin=MINDSPORE, also=("save_embeddings",)),
    joint("save_latents_and_embeddings", "switch", "", tell_kept, False, _KEPT, origin=PYTORCH),
    inert("use_slicing", "switch", "the VAE takes clips one at a time in any case", False),
    joint("use_tiling", "switch", "data.vae_tiling", clips.choose_ways, False),
    inert("batch_size", "integer", "captions are encoded eight at a time, clips one by one", 1),
    inert("num_decode_threads", "integer", "with theirs neither", 0),
    joint("dtype", "text", "run.dtype", choose_dtype, "fp32", choices=("fp32", "fp16", "bf16")),
    same("seed", "integer", "run.seed", 42),
    inert("num_artifact_workers", "integer", "as many threads write as the encoder needs", 4),
    joint(
        "distributed", "switch", "prepare.shard", choose_cache, False, "of several processes each makes its part",
        origin=MINDSPORE,
    ),
)  # fmt: skip
