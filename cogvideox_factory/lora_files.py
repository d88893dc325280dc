"""LoRA files as diffusers and PEFT write and read them, so that weight 1.0 is always right.

One safetensors file, keys `transformer.MODULE.lora_A.weight` [rank, in], `.lora_B.weight` [out, rank] and
for DoRA `.lora_magnitude_vector` [out]. What a layer adds is `scaling * B @ A` with scaling = alpha / rank
(rsLoRA: alpha / sqrt(rank)). alpha is not in the tensors: it travels in the header, as the JSON string
`lora_adapter_metadata` (the PEFT config, keys prefixed `transformer.`). A file without it means alpha =
rank. finetrainers' header `lora_config` (same keys, no prefix) is read too, and so are PEFT's folders
(`adapter_model.safetensors`, with the config beside it) and the names of ComfyUI and CogVideoX-Fun
(`module_names`) with lora_down / lora_up / alpha.

LoRA: Hu et al. (ICLR 2022). rsLoRA: Kalajdzievski (2023). DoRA: Liu et al. (ICML 2024).
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.errors import FactoryError, MissingError, UnfitError
from cogvideox_factory.module_names import to_diffusers
from cogvideox_factory.publish import publish_file
from cogvideox_factory.tensors import open_tensors, save_tensors

LORA_FILE_NAME = "pytorch_lora_weights.safetensors"
PEFT_FILE_NAME, PEFT_CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"
_MATRIX = re.compile(r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora[_.]down|lora[_.]up)(\.\w+)?\.weight")
_MAGNITUDE = re.compile(r"(?P<module>.+)\.lora_magnitude_vector(\.\w+)*")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFile:
    """A LoRA as read: tensors by diffusers name without the `transformer.` prefix, and how they scale."""

    source: str
    arrays: dict[str, np.ndarray]
    """`M.lora_A.weight` [rank, in], `M.lora_B.weight` [out, rank], `M.lora_magnitude_vector` [out]."""
    rank: int
    alpha: float
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of the modules (full names) where it is not `rank`."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    target_modules: tuple[str, ...] | str = ()
    """Module name endings, or one regular expression of full names."""

    @property
    def modules(self) -> list[str]:
        """Full names of the adapted modules, in the file's order."""
        return list(dict.fromkeys(_module_of(name) for name in self.arrays))

    def rank_of(self, module: str) -> int:
        """Return the rank of one module."""
        return self.rank_pattern.get(module, self.rank)

    def alpha_of(self, module: str) -> float:
        """Return alpha of one module."""
        return self.alpha_pattern.get(module, self.alpha)

    def scaling(self, module: str) -> float:
        """Return what B @ A of one module is multiplied by at weight 1."""
        rank = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(rank) if self.use_rslora else rank)


def save_lora(
    path: Path,
    arrays: Mapping[str, np.ndarray],
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    use_rslora: bool = False,
    use_dora: bool = False,
    alpha_pattern: Mapping[str, float] | None = None,
) -> Path:
    """Write a LoRA file atomically and return its path.

    `path` is the file, or the folder that gets `pytorch_lora_weights.safetensors`. `arrays` have the names
    of `LoraFile.arrays`.

    Raises:
        StorageError: the disk is full, read-only or failing.
    """
    path = Path(path)
    path = path if path.suffix == ".safetensors" else path / LORA_FILE_NAME
    config = peft_config(
        rank=rank, alpha=alpha, target_modules=target_modules, ranks=_ranks(arrays), use_rslora=use_rslora,
        use_dora=use_dora, alpha_pattern=alpha_pattern or {},
    )  # fmt: skip
    text = json.dumps({f"transformer.{key}": value for key, value in config.items()}, indent=2, sort_keys=True)
    with publish_file(path) as temporary:
        prefixed = {f"transformer.{name}": array for name, array in arrays.items()}
        save_tensors(temporary, prefixed, metadata={"lora_adapter_metadata": text})
    return path


def peft_config(
    *,
    rank: int,
    alpha: float,
    target_modules: Sequence[str] | str,
    ranks: Mapping[str, int],
    use_rslora: bool,
    use_dora: bool,
    alpha_pattern: Mapping[str, float],
) -> dict[str, Any]:
    """Return a LoRA's settings as PEFT names them; few keys, because PEFT refuses one that is newer than itself."""
    return {
        "r": rank,
        "lora_alpha": _plain(alpha),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": target_modules if isinstance(target_modules, str) else sorted(target_modules),
        "rank_pattern": {module: r for module, r in sorted(ranks.items()) if r != rank},
        "alpha_pattern": {module: _plain(a) for module, a in sorted(alpha_pattern.items())},
        "use_rslora": use_rslora,
        "use_dora": use_dora,
    }


def load_lora(path: Path) -> LoraFile:
    """Read a LoRA file, or that of a folder as diffusers or PEFT writes them.

    Raises:
        MissingError: no such file, or only a pickled one.
        UnfitError: damaged; tensors that belong to no LoRA; a header that contradicts the tensors.
    """
    path = Path(path)
    if path.is_dir():
        path = path / (LORA_FILE_NAME if not (path / PEFT_FILE_NAME).is_file() else PEFT_FILE_NAME)
    if path.suffix in (".bin", ".pt", ".ckpt", ".pth"):
        raise MissingError(f"{path} is pickled, which can run code when it is opened. Convert it to safetensors first.")
    if not path.is_file():
        raise MissingError(f"LoRA {path} does not exist. Give the .safetensors file or the folder it lies in.")
    with open_tensors(path) as file:
        config = _read_settings(path, file.metadata)
        arrays, alphas = _canonical({name: file.read(name) for name in file.names}, str(path))
    if not arrays:
        raise UnfitError(f"{path} holds no tensors. Export the LoRA again.")
    ranks = _ranks(arrays)
    if config is None:
        alpha = {module: alphas.get(module, float(rank)) for module, rank in ranks.items()}
        rank, common = _most_common(ranks), _most_common(alpha)
        config = {}
    else:
        _check_header(config, ranks, arrays, str(path))
        alpha = {module: _of_pattern(config, "alpha_pattern", "lora_alpha", module) for module in ranks}
        rank, common = config["r"], config["lora_alpha"]
    return LoraFile(
        source=str(path),
        arrays=arrays,
        rank=rank,
        alpha=common,
        rank_pattern={module: r for module, r in ranks.items() if r != rank},
        alpha_pattern={module: a for module, a in alpha.items() if a != common},
        use_rslora=bool(config.get("use_rslora", False)),
        use_dora=_has_magnitudes(arrays),
        target_modules=_targets(config, ranks),
    )


def resolve_lora(path: str | Path) -> Path:
    """Return the LoRA file of a file, a folder that holds one, or a run folder.

    Raises:
        FactoryError: nothing there.
    """
    path = Path(path)
    for candidate in (path, path / LORA_FILE_NAME, path / PEFT_FILE_NAME, path / "final" / LORA_FILE_NAME):
        if candidate.is_file():
            return candidate
    raise FactoryError(
        f"{path}: no LoRA there. Give a .safetensors file, a folder with {LORA_FILE_NAME} or {PEFT_FILE_NAME}, "
        "or the folder of a finished LoRA run."
    )


def bake_lora(file: LoraFile) -> LoraFile:
    """Return the same LoRA with its scaling multiplied into B, for readers that know no alpha."""
    arrays = dict(file.arrays)
    for module in file.modules:
        name = f"{module}.lora_B.weight"
        arrays[name] = (arrays[name].astype(np.float32) * file.scaling(module)).astype(arrays[name].dtype)
    ranks = {module: float(rank) for module, rank in file.rank_pattern.items()}
    return replace(file, arrays=arrays, alpha=float(file.rank), alpha_pattern=ranks, use_rslora=False)


def _read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the PEFT config of a file's header without its prefix, or the one beside it, or None if there is none."""
    source, text = str(path), metadata.get("lora_adapter_metadata") or metadata.get("lora_config")
    beside = path.with_name(PEFT_CONFIG_NAME)
    if not text and path.name == PEFT_FILE_NAME:
        if not beside.is_file():
            raise UnfitError(f"{beside} is missing, so the scale of {path.name} is unknown. Copy the whole folder.")
        source, text = str(beside), beside.read_text(encoding="utf-8", errors="replace")
    if not text:
        return None
    try:
        config = {str(key).removeprefix("transformer."): value for key, value in json.loads(text).items()}
        config["r"], config["lora_alpha"] = int(config["r"]), float(config["lora_alpha"])
        _compile_patterns(config)
    except (re.error, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UnfitError(
            f"{source} has LoRA settings without a readable r and lora_alpha ({error!r}), "
            "so its scale is unknown. Export the LoRA again."
        ) from error
    return config


def _compile_patterns(config: Mapping[str, Any]) -> None:
    """Raise now what a broken regular expression in the header would raise later."""
    targets = config.get("target_modules")
    patterns = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    for pattern in [*patterns, targets] if isinstance(targets, str) else patterns:
        re.compile(pattern)


def _canonical(arrays: dict[str, np.ndarray], source: str) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return (tensors under canonical names, alpha by module where the file stores it as a tensor)."""
    result: dict[str, np.ndarray] = {}
    alphas: dict[str, float] = {}
    strays: list[str] = []
    for key, array in arrays.items():
        if found := _MATRIX.fullmatch(key):
            part = "lora_A" if found["part"] in ("lora_A", "lora_down", "lora.down") else "lora_B"
            name = f"{to_diffusers(found['module'])}.{part}.weight"
        elif found := _MAGNITUDE.fullmatch(key):
            name = f"{to_diffusers(found['module'])}.lora_magnitude_vector"
        elif (found := _ALPHA.fullmatch(key)) and array.size == 1:
            alphas[to_diffusers(found["module"])] = float(array.reshape(()))
            continue
        else:
            strays.append(key)
            continue
        if name in result:
            raise UnfitError(f"{source}: two tensors mean {name!r} ({key!r} is the second). Keep one adapter per file.")
        result[name] = array
    if strays:
        raise UnfitError(
            f"{source}: {len(strays)} of {len(arrays)} tensors belong to no LoRA of a CogVideoX transformer: "
            f"{', '.join(sorted(strays)[:5])}. Is it a full model, or another kind of adapter?"
        )
    return result, alphas


def _ranks(arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """Return {module: rank} from the shapes (lora_A, or lora_B where that is missing)."""
    ranks: dict[str, int] = {}
    for name, array in arrays.items():
        if name.endswith(".lora_A.weight") and array.ndim:
            ranks[_module_of(name)] = array.shape[0]
        elif name.endswith(".lora_B.weight") and array.ndim:
            ranks.setdefault(_module_of(name), array.shape[-1])
    return ranks


def _check_header(
    config: Mapping[str, Any], ranks: Mapping[str, int], arrays: Mapping[str, np.ndarray], source: str
) -> None:
    for module, rank in ranks.items():
        said = int(_of_pattern(config, "rank_pattern", "r", module))
        if said != rank:
            raise UnfitError(
                f"{source}: its header gives {module} rank {said}, its tensors have rank {rank}. Export the LoRA again."
            )
    dora = _has_magnitudes(arrays)
    if bool(config.get("use_dora", dora)) != dora:
        raise UnfitError(
            f"{source}: its header says use_dora={config['use_dora']}, but it has {'' if dora else 'no '}"
            "lora_magnitude_vector tensors. Export the LoRA again."
        )


def _of_pattern(config: Mapping[str, Any], patterns: str, default: str, module: str) -> float:
    """Look `module` up as PEFT does: the first pattern that matches the end of its name, else the default."""
    for pattern, value in (config.get(patterns) or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return float(value)
    return float(config[default])


def _targets(config: Mapping[str, Any], ranks: Mapping[str, int]) -> tuple[str, ...] | str:
    """Return what the LoRA says it adapts; without a header: attn1.to_q and the like."""
    if config.get("layers_to_transform") is not None or config.get("exclude_modules"):
        return tuple(sorted(ranks))
    targets = config.get("target_modules")
    if isinstance(targets, str) and targets != "all-linear":
        return targets
    if isinstance(targets, list) and targets:
        return tuple(sorted(str(target) for target in targets))
    return tuple(sorted({re.sub(r"^transformer_blocks\.\d+\.", "", module) for module in ranks}))


def _has_magnitudes(arrays: Mapping[str, np.ndarray]) -> bool:
    return any(name.endswith(".lora_magnitude_vector") for name in arrays)


def _most_common(values: Mapping[str, Any]) -> Any:
    return Counter(values.values()).most_common(1)[0][0]


def _module_of(name: str) -> str:
    return re.sub(r"\.lora_(A\.weight|B\.weight|magnitude_vector)$", "", name)


def _plain(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)
