"""How well a video fits its prompt, by a CLIP the user has: cosine of text and frame features (arXiv 2103.00020).

Any two-tower model of transformers will do whose folder is here (CLIP, SigLIP, …). Nothing is downloaded or executed.
The score of a video is the mean over a few frames spread over it, as in "CLIPSIM" (arXiv 2104.14806); compare it only
between videos scored with the same model.
"""

import json
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cogvideox_factory.errors import MissingError, UnfitError
from cogvideox_factory.torch_engine.border import to_tensor

# Legend: N frames, H W height and width, E feature width

NUM_FRAMES = 8
"""Frames of a video that are looked at."""


class Clip:
    """The model, its tokenizer and what its pictures look like."""

    def __init__(self, model: Any, tokenizer: Any, picture: dict[str, Any]) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.size = _size(picture)
        self.mean = torch.tensor(picture.get("image_mean", [0.5] * 3)).view(3, 1, 1)
        self.std = torch.tensor(picture.get("image_std", [0.5] * 3)).view(3, 1, 1)

    @classmethod
    def from_folder(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> Self:
        """Load config, safetensors, tokenizer and preprocessor_config.json from one folder.

        Raises:
            MissingError: the folder or one of its files is not there.
            UnfitError: it is no model with features of text and of pictures.
        """
        folder = Path(folder)
        for name in ("config.json", "preprocessor_config.json"):
            if not (folder / name).is_file():
                raise MissingError(f"{folder / name} is missing; give the folder of a CLIP model as the hub serves it.")
        if not any(folder.glob("*.safetensors")):
            raise MissingError(f"{folder} holds no *.safetensors; pickled weights are not read. Convert them first.")
        from safetensors import SafetensorError
        from transformers import AutoModel, AutoTokenizer

        try:
            model = AutoModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            picture = json.loads((folder / "preprocessor_config.json").read_text(encoding="utf-8"))
        except (ValueError, OSError, KeyError, TypeError, SafetensorError) as error:
            raise UnfitError(f"{folder} cannot be loaded as a CLIP model: {error}") from error
        if not (hasattr(model, "get_text_features") and hasattr(model, "get_image_features")):
            raise UnfitError(f"{folder} holds a {type(model).__name__}, which has no features of text and pictures.")
        return cls(model.to(device), tokenizer, picture)

    @torch.no_grad()
    def similarity(self, video: np.ndarray, prompt: str) -> float:
        """Return the mean cosine, -1 to 1, of `prompt` and frames of `video` (uint8 [F, H, W, 3])."""
        chosen = np.linspace(0, len(video) - 1, min(NUM_FRAMES, len(video))).round().astype(int)
        pictures = self.pictures(to_tensor(video[chosen]))
        device = next(self.model.parameters()).device
        words = self.tokenizer([prompt], padding=True, truncation=True, return_tensors="pt").to(device)
        text = _features(self.model.get_text_features(**words))  # [1, E]
        seen = _features(self.model.get_image_features(pixel_values=pictures.to(device)))  # [N, E]
        return float((F.normalize(seen, dim=-1) @ F.normalize(text, dim=-1).T).mean())

    def pictures(self, frames: Tensor) -> Tensor:
        """Return frames uint8 [N, H, W, 3] as the model takes them, float [N, 3, size, size]."""
        x = frames.permute(0, 3, 1, 2).float() / 255  # [N, 3, H, W]
        height, width = x.shape[2:]
        scale = self.size / min(height, width)
        scaled = [max(self.size, round(side * scale)) for side in (height, width)]
        x = F.interpolate(x, size=scaled, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.size) // 2 for side in scaled)
        x = x[:, :, top : top + self.size, left : left + self.size]
        return (x - self.mean) / self.std


def _size(picture: dict[str, Any]) -> int:
    size = picture.get("crop_size") or picture.get("size") or 224
    return int(size) if isinstance(size, int) else int(size.get("height") or size["shortest_edge"])


def _features(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.pooler_output
