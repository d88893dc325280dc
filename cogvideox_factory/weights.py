"""Model folders in the layout of diffusers and transformers, as {name: array}, and where to get them.

A folder holds `config.json` and the weights under a stem (`diffusion_pytorch_model` for transformer and
VAE, `model` for the text encoder): one `STEM.safetensors`, or shards named by
`STEM.safetensors.index.json`. Reading goes tensor by tensor, writing shard by shard, so neither needs the
model twice in memory. Pickled weights are never opened.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from cogvideox_factory.errors import FactoryError, MissingError, UnfitError
from cogvideox_factory.json_object import read_object
from cogvideox_factory.lora_check import check_lora
from cogvideox_factory.lora_files import LoraFile, bake_lora, load_lora, save_lora
from cogvideox_factory.publish import publish_files
from cogvideox_factory.tensors import StoredTensor, open_tensors, save_tensors

__all__ = [
    "MAX_SHARD_BYTES",
    "MODEL_STEM",
    "TEXT_ENCODER_STEM",
    "LoraFile",
    "bake_lora",
    "check_lora",
    "find_weight_files",
    "iterate_tensors",
    "load_folder",
    "load_lora",
    "read_config",
    "resolve_model",
    "resolve_transformer",
    "sample_digest",
    "save_folder",
    "save_lora",
    "stored_tensors",
]

logger = logging.getLogger(__name__)

MODEL_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_STEM = "model"
MAX_SHARD_BYTES = 10**10
"""As diffusers cuts them."""
MODEL_SUBFOLDERS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
EMBEDDED = ("tiny-t2v", "tiny-i2v")
_SAMPLES, _SAMPLE_BYTES = 64, 4096
_CONFIG = "cogvideox_factory.config_sha256"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def read_config(folder: Path) -> dict[str, Any]:
    """Return `folder/config.json`.

    Raises:
        UnfitError: missing, or no JSON object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise UnfitError(
            f"{path} is missing, so {folder} is no model folder. "
            "Give the folder that holds config.json and its weights."
        )
    return read_object(path, way_out="Download or export the model again.")


def find_weight_files(folder: Path, stem: str = MODEL_STEM) -> list[Path]:
    """Return the safetensors file, or all shards, of a model folder.

    Raises:
        MissingError: no weights there, or pickled ones only.
        UnfitError: shards that are named but absent, or two sets of weights.
    """
    folder = Path(folder)
    index, single = folder / f"{stem}.safetensors.index.json", folder / f"{stem}.safetensors"
    if index.is_file() and single.is_file():
        raise UnfitError(f"{folder} holds two sets of weights, {single.name} and {index.name}. Remove one of them.")
    if index.is_file():
        return sorted(set(_weight_map(index).values()))
    if single.is_file():
        return [single]
    if pickled := sorted(folder.glob("*.bin")):
        raise MissingError(
            f"{folder} holds only pickled weights ({pickled[0].name}), which can run code when they are "
            "opened. Convert them where you trust them: load with diffusers or transformers and "
            "`save_pretrained(folder)` again."
        )
    others = ", ".join(path.name for path in sorted(folder.glob("*.safetensors"))[:5])
    raise MissingError(
        f"{folder} holds neither {single.name} nor {index.name}"
        + (f"; it holds {others}. Rename or convert what you want to load." if others else ". Check the path.")
    )


def sample_digest(folder: Path) -> str:
    """Return a digest of the configs of a model folder and of samples of its weights: cheap, and another's differs."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).iterdir() if path.suffix in (".json", ".safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for number in range(_SAMPLES):
                file.seek(number * max(size - _SAMPLE_BYTES, 0) // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16]


def _weight_map(index: Path) -> dict[str, Path]:
    """Return {tensor name: shard} of an index file, every shard there and beside it."""
    names = read_object(index, way_out="Download or export the model again.").get("weight_map")
    if not isinstance(names, dict) or not names:
        raise UnfitError(f"{index} has no weight_map. Download or export the model again.")
    shards = {str(name) for name in names.values()}
    if outside := sorted(name for name in shards if Path(name).name != name):
        raise UnfitError(f"{index} names files outside its folder ({outside[0]!r}). Do not use this model.")
    if absent := sorted(name for name in shards if not (index.parent / name).is_file()):
        raise UnfitError(
            f"{index.parent} lacks {len(absent)} of {len(shards)} shards: {', '.join(absent[:5])}. "
            "Download or export the model again."
        )
    return {tensor: index.parent / name for tensor, name in names.items()}


def iterate_tensors(folder: Path, stem: str = MODEL_STEM) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every (name, array) of a model folder, one in memory at a time.

    Raises:
        MissingError, UnfitError: as `stored_tensors`.
    """
    for name, stored in stored_tensors(folder, stem):
        yield name, stored[:]


def stored_tensors(folder: Path, stem: str = MODEL_STEM, *, verify: bool = True) -> Iterator[tuple[str, StoredTensor]]:
    """Yield every (name, tensor) of a model folder; a tensor can be read, or rows of it, until the next is asked for.

    Args:
        folder: of the model.
        stem: of its files.
        verify: as `open_tensors`.

    Raises:
        MissingError: as `find_weight_files`.
        UnfitError: as `find_weight_files`; a damaged file; shards that do not match their index.
    """
    folder = Path(folder)
    files = find_weight_files(folder, stem)
    index = folder / f"{stem}.safetensors.index.json"
    promised = set(_weight_map(index)) if index.is_file() else None
    seen: set[str] = set()
    for path in files:
        with open_tensors(path, verify=verify) as file:
            if path == files[0]:  # all shards are of one save
                _check_config(folder, file.metadata)
            for name in file.names:
                if name in seen:
                    raise UnfitError(f"{path}: tensor {name!r} is in an earlier shard too. Export the model again.")
                seen.add(name)
                yield name, StoredTensor(file=file, name=name)
    if promised is not None and seen != promised:
        stray = sorted(seen ^ promised)
        raise UnfitError(
            f"{index} and its shards disagree on {len(stray)} tensors: {', '.join(stray[:5])}. "
            "The shards are of different saves; download or export the model again."
        )


def _check_config(folder: Path, metadata: Mapping[str, str]) -> None:
    """Hold `config.json` against what weights of our own say of it; people do edit it, so a change is only told.

    Weights without one have theirs elsewhere (`model.transformer_config`), under any name and in any form.
    """
    if _CONFIG not in metadata or not (folder / "config.json").is_file():
        return
    if metadata[_CONFIG] != _digest_of_config(read_config(folder)):
        logger.warning(
            "%s is not the one these weights were saved with. Unless you changed it, copy or export the folder again.",
            folder / "config.json",
        )


def _digest_of_config(config: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def load_folder(folder: Path, stem: str = MODEL_STEM) -> dict[str, np.ndarray]:
    """Return all tensors of a model folder.

    Raises:
        MissingError: as `iterate_tensors`.
        UnfitError: as `iterate_tensors`.
    """
    return dict(iterate_tensors(folder, stem))


def save_folder(
    folder: Path,
    arrays: Mapping[str, np.ndarray] | Iterable[tuple[str, np.ndarray]],
    *,
    config: Mapping[str, Any],
    stem: str = MODEL_STEM,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write `config.json` and the weights of a model folder so that it is complete or as it was before.

    `arrays` may be a generator of (name, array): no more than one shard is then held. Weights of an earlier
    save in the same folder are replaced, other files stay.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    pairs: Iterable[tuple[str, np.ndarray]] = (
        cast(Mapping[str, np.ndarray], arrays).items() if isinstance(arrays, Mapping) else arrays
    )
    earlier = re.compile(rf"{re.escape(stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors(\.index\.json)?")
    with publish_files(folder, replaces=lambda path: earlier.fullmatch(path.name) is not None) as fresh:
        _write_shards(fresh, pairs, stem, max_shard_bytes, metadata={_CONFIG: _digest_of_config(dict(config))})
        text = json.dumps(dict(config), indent=2, sort_keys=True)
        (fresh / "config.json").write_text(text + "\n", encoding="utf-8")


def _write_shards(
    folder: Path,
    pairs: Iterable[tuple[str, np.ndarray]],
    stem: str,
    max_shard_bytes: int,
    *,
    metadata: Mapping[str, str],
) -> None:
    shards: list[list[str]] = []
    waiting: dict[str, np.ndarray] = {}
    seen: set[str] = set()
    total = waiting_bytes = 0

    def flush() -> None:
        shards.append(list(waiting))
        save_tensors(folder / f"{stem}-{len(shards):05d}", waiting, metadata=metadata)
        waiting.clear()

    for name, array in pairs:
        assert name not in seen, name
        seen.add(name)
        if waiting and waiting_bytes + array.nbytes > max_shard_bytes:
            flush()
            waiting_bytes = 0
        waiting[name] = array
        waiting_bytes += array.nbytes
        total += array.nbytes
    flush()

    if len(shards) == 1:
        (folder / f"{stem}-00001").rename(folder / f"{stem}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        final = f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
        (folder / f"{stem}-{number:05d}").rename(folder / final)
        weight_map |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True)
    (folder / f"{stem}.safetensors.index.json").write_text(text + "\n", encoding="utf-8")


def resolve_model(
    path_or_hub_id: str | Path, *, revision: str | None = None, subfolders: Iterable[str] = MODEL_SUBFOLDERS
) -> Path:
    """Return the local folder of a model, downloading it from the Hugging Face hub if it is a hub id.

    A local folder wins; `tiny-t2v` and `tiny-i2v` are the small models this package carries. Only configs,
    safetensors and tokenizer files of `subfolders` are fetched, never code; with HF_HUB_OFFLINE=1 only the local cache
    is looked at.

    Raises:
        MissingError: neither a folder nor to be had from the hub, with the command that would get it.
    """
    name = str(path_or_hub_id)
    if not name:
        raise FactoryError("which model? give --model.path with a folder or a hub id such as THUDM/CogVideoX-5b")
    local = Path(name).expanduser()
    if local.is_dir():
        return local
    if name in EMBEDDED:
        return Path(__file__).parent / "tiny" / "models" / name.removeprefix("tiny-")
    if local.exists() or not _HUB_ID.fullmatch(name) or name.startswith("."):
        what = "is a file, not a model folder" if local.exists() else "does not exist"
        raise MissingError(
            f"model {name!r} {what}. Give a folder in the diffusers layout, or a hub id such as THUDM/CogVideoX-5b."
        )
    return _from_hub(name, revision, tuple(subfolders))


def resolve_transformer(path: str | Path, *, has_config: bool = True) -> Path:
    """Return the transformer folder of a transformer folder, a model folder, or a run folder.

    Without `has_config`, weights alone will do, because their config is named elsewhere.

    Raises:
        FactoryError: nothing there.
    """
    path = Path(path)
    for candidate in (path, path / "transformer", path / "final/transformer"):
        if (candidate / "config.json").is_file() or (not has_config and any(candidate.glob(f"{MODEL_STEM}*"))):
            return candidate
    if path.suffix == ".ckpt":
        raise FactoryError(
            f"{path} is a MindSpore checkpoint, which only MindSpore reads. Where it is installed, save its parameters "
            f"(without the prefix `transformer.`) as {MODEL_STEM}.safetensors, and give the folder of that."
        )
    raise FactoryError(
        f"{path}: no transformer there. Give a folder with config.json and safetensors files, "
        "or the folder of a finished full fine-tuning run."
    )


def _from_hub(hub_id: str, revision: str | None, subfolders: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    kinds = ("*.json", "*.safetensors", "*.model", "*.txt")
    patterns = ["model_index.json", *(f"{folder}/{kind}" for folder in subfolders for kind in kinds)]
    command = f"hf download {hub_id}" + (f" --revision {revision}" if revision else "")
    way_out = (
        f"On a machine with network run `{command}` (with `--local-dir DIR` to carry it over), or "
        "give the path of a local folder."
    )
    # The hub's own HTTP error derives from that of whichever HTTP client it uses; that one is no OSError.
    network_errors = cast(tuple[type[Exception], ...], HfHubHTTPError.__bases__)
    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError, *network_errors) as error:  # not there, gated, offline, no such revision
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingError(
            f"model {hub_id!r} is no local folder and could not be had from the Hugging Face hub: {reason} {way_out}"
        ) from error
    if absent := [name for name in subfolders if not (folder / name).is_dir()]:
        raise MissingError(f"model {hub_id!r} in {folder} lacks {', '.join(absent)}: an unfinished download? {way_out}")
    return folder
