"""Samples as the originals store them: moments and text in float32, a `.pt` file each."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset


class PtFiles(Dataset):
    """Moments [2C, F, h, w] and text [S, E] of each name, written to `folder` and read one by one."""

    def __init__(self, folder: Path, samples: Iterable[tuple[str, Tensor, Tensor]]) -> None:
        self.folder, self.names = folder, []
        folder.mkdir(exist_ok=True)
        for name, moments, text in samples:
            self.names.append(name)
            torch.save(moments.float().clone(), folder / f"{name}.video.pt")
            torch.save(text.float().clone(), folder / f"{name}.text.pt")
        self.names.sort()

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        parts = {"moments": "video", "prompt_embeds": "text"}
        name = self.names[place]
        return {
            key: torch.load(self.folder / f"{name}.{part}.pt", map_location="cpu", weights_only=True)
            for key, part in parts.items()
        }
