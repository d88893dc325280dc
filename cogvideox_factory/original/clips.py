"""What their data flags come to: which clips, brought to which shape, in which way. Trainers and preparation share it.

Their ways that no flag names are settings here, and are taken over so that a brought command line means what it meant:
frames are spread over a clip whatever its rate, and a picture is brought to the asked size without its proportions.
"""

from math import ceil
from pathlib import Path
from typing import Any

from cogvideox_factory.data.cache_index import read_index
from cogvideox_factory.data.fingerprint import UNKNOWN
from cogvideox_factory.data.mixture import Part, read_parts
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.original.flag import MINDSPORE, Given

_RESHAPE = {"center": "center", "random": "random", "none": "stretch"}
_SIZES = {"num_frames": "frame_buckets", "height": "height_buckets", "width": "width_buckets"}
RESHAPE_MODES = tuple(_RESHAPE)


def cache_of(given: Given) -> Path | None:
    """Return the cache that the run reads, or None where it reads clips.

    Raises:
        FactoryError: no data_root.
        UnfitError: a cache is asked for and `data_root` is none of ours.
    """
    if not given["data_root"]:
        raise FactoryError("which clips? give --data_root FOLDER")
    root = Path(given["data_root"])
    whole = given["vae_cache"] or given["load_tensors"]
    if not whole and not given["embeddings_cache"]:
        return None
    if (root / "cache.json").is_file():
        return root
    if not whole:
        given.say("--embeddings_cache: no cache here, captions are encoded once at the start of the run")
        return None
    if (root / "video_latents").is_dir():
        raise UnfitError(
            f"{root} was prepared by the older trainers. Take it over with\n"
            f"  cogvideox import-prepared --data.root {root} --cache.dir NEW --model.path MODEL --data.height … "
            "(the same model, size and text length)\nand give --data_root NEW."
        )
    raise UnfitError(
        f"{root} holds no cache (cache.json). Make one with `cogvideox prepare --original prepare-dataset "
        f"--data_root CLIPS --output_dir {root} …`, or leave out --vae_cache to encode clips while training."
    )


def choose_clips(given: Given) -> None:
    """Decide where clips and captions are."""
    if given.script.command == "train" and (cache := cache_of(given)):
        given.set("cache.dir", str(cache))
        given.say_inert(("dataset_file", "caption_column", "video_column"), "the cache lists its own clips")
        _take_over(given, read_index(cache).recorded)
        return
    given.set("data.root", given["data_root"])
    captions, videos = given["caption_column"], given["video_column"]
    if given["dataset_file"]:
        given.set("data.table", str(Path(given["dataset_file"]).resolve()))
        given.set("data.caption_column", captions)
        given.set("data.video_column", videos)
    else:
        given.set("data.captions", captions)
        given.set("data.videos", videos)


def _take_over(given: Given, recorded: dict[str, Any]) -> None:
    """Set what the cache was prepared with, since their trainers do not ask for it again."""
    video = recorded["video"]["settings"]
    names = {"fps_policy": "fps_policy", "short_policy": "short_clips", "crop": "crop", "fps": "fps"}
    for name, setting in names.items():
        if video[name] not in (UNKNOWN, 0):
            given.set(f"data.{setting}", video[name])
    given.set("data.vae_tiling", video["tiling"])
    given.set("data.trigger_word", recorded["trigger_word"] or None)
    if given.script.task == "i2v":
        given.set("cache.image_noise_variants", max(video["image_variants"] - 1, 0))
        if video["image_variants"] == 1:
            given.set("train.image_noise", False)
            given.say("the cache holds clean first frames only: --train.image-noise False")


def choose_shape(given: Given) -> None:
    """Decide size and length: one, some made from the clips, or those of a bucket file."""
    buckets = buckets_of(given)
    given.set("data.buckets", buckets)
    if buckets not in (None, "auto"):
        given.say_inert(_SIZES.values(), "the bucket file has the shapes")
        if cache := cache_of(given):  # what it was prepared with beside the file
            for setting in _SIZES:
                given.set(f"data.{setting}", _recorded_video(cache)[setting])
        if given.num_processes > 1:
            given.say("--bucket_config: its batch sizes count the clips of a step on all cards together")
        return
    if buckets == "auto":
        given.say(
            "several height, width or frame buckets: --data.buckets auto makes up to 8 shapes from the clips, none "
            "larger than the largest of these"
        )
    else:
        given.say_inert(("bucket_config",), "the cache was prepared at one size")
    for setting, name in _SIZES.items():
        given.set(f"data.{setting}", max(given[name]))
    if given["max_num_frames"] != max(given["frame_buckets"]):
        given.say_inert(("max_num_frames",), "frame_buckets decides")


def buckets_of(given: Given) -> str | None:
    """Return what gives clips sizes of their own: a bucket file, `auto` for several sizes, or None for one.

    Raises:
        UnfitError: buckets are asked for without vae_cache, but `data_root` is a cache of one size.
    """
    if not (file := given["bucket_config"]):
        return "auto" if any(len(given[name]) > 1 for name in _SIZES.values()) else None
    cache = cache_of(given)
    if cache is None or _recorded_video(cache).get("buckets"):
        return file
    if given["vae_cache"]:
        return None  # theirs ignores the file then
    raise UnfitError(
        f"--bucket_config {file}: the cache {cache} holds clips of one size. Prepare it with the same file "
        f"(--data.buckets {file} beside the flags of prepare-dataset), or give the folder of the clips as --data_root "
        "without --embeddings_cache."
    )


def _recorded_video(cache: Path) -> dict[str, Any]:
    return read_index(cache).recorded["video"]["settings"]


def choose_ways(given: Given) -> None:
    """Decide how frames and pictures are taken: by flag, and as they did without one."""
    if "cache.dir" in given.settings and given.script.command == "train":
        named = ("id_token", "random_flip", "video_reshape_mode", "enable_tiling")
        given.say_inert(named, "the cache has it as it was prepared")
        return
    given.set("data.vae_tiling", given["enable_tiling"] or given["use_tiling"] or False)
    given.set("data.trigger_word", given["id_token"])
    given.set("data.crop", _RESHAPE[given["video_reshape_mode"] or "none"])
    given.set("data.fps_policy", "stretch")
    if given.origin == MINDSPORE and buckets_of(given) is None and "data.buckets" not in given.ours:
        given.set("data.short_clips", "repeat_last")
    _choose_flip(given)


def _choose_flip(given: Given) -> None:
    chance = given["random_flip"]
    if not chance:
        return
    if given.script.command == "prepare":
        raise FactoryError(
            f"--random_flip {chance}: a cache holds no flipped clips; leave it out, or train from clips with "
            "--random_flip and without --vae_cache"
        )
    given.set("data.flip_probability", chance)


def steps_of_epochs(given: Given, epochs: int, clips_a_step: int) -> int:
    """Return the optimizer steps that `epochs` passes over the clips take, and say how that comes."""
    cache = cache_of(given)
    if cache:
        count = len(read_index(cache).clips)
    else:
        named = given.settings
        part = Part.choose(
            name="", weight=1.0, root=given["data_root"], image_column=None, table=named.get("data.table"),
            captions=named.get("data.captions"), videos=named.get("data.videos"),
            caption_column=given["caption_column"], video_column=given["video_column"],
        )  # fmt: skip
        count = len(read_parts([part]).usable)
    steps = max(1, epochs * ceil(count / max(1, clips_a_step)))
    given.say(f"{epochs} epoch(s) of {count} clips, {clips_a_step} a step: {steps} steps")
    return steps
