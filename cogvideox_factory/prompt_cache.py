"""Embeddings of prompts on disk, so that a prompt that was encoded before needs no text encoder.

An entry is named by all that decides its numbers: the prompt, its length in tokens, the arithmetic and the kind of
device, the bytes of text encoder and tokenizer, and the versions of the libraries that run them.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from cogvideox_factory.data.entry import read_entry, write_entry
from cogvideox_factory.data.fingerprint import hash_folder
from cogvideox_factory.data.memo import Memo
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.metrics import say

FORMAT = 1
_MEMO = "hashes.jsonl"
_ARRAY = "prompt_embeds"


class PromptCache:
    """Embeddings [S, E] by prompt, in a folder that several commands and processes may use at once.

    Args:
        folder: where they are kept; it need not exist.
        model: folder whose `text_encoder` and `tokenizer` make them.
        made_with: what else decides their numbers (dtype, length, device, versions), as text.

    Raises:
        StorageError: the folder cannot be written.
        UnfitError: no text encoder or tokenizer in the model.
    """

    def __init__(self, folder: Path, model: Path, made_with: Mapping[str, str | int]) -> None:
        self._folder = folder
        memo = Memo(folder / _MEMO)  # the published encoder is 9.5 GB
        parts = {name: hash_folder(model / name, hash_file=memo.sha256) for name in ("text_encoder", "tokenizer")}
        memo.save()
        self._made_with = json.dumps({"format": FORMAT, **parts, **made_with}, sort_keys=True)

    def find(self, prompt: str) -> np.ndarray | None:
        """Return the embedding [S, E] of `prompt`, or None; one that is damaged counts as none and is told."""
        path = self._path(prompt)
        if not path.exists():
            return None
        try:
            arrays, header = read_entry(path, verify=True)
        except UnfitError:
            arrays, whose = {}, ""
        else:
            whose = header.metadata.get("key")
        if whose != path.stem or list(arrays) != [_ARRAY]:
            say(f"{path} is damaged; it is made again")
            return None
        return arrays[_ARRAY]

    def keep(self, prompt: str, embeds: np.ndarray) -> None:
        """Write the embedding [S, E] of `prompt`; complete or not at all.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        path = self._path(prompt)
        write_entry(path, {_ARRAY: embeds}, {"key": path.stem, "prompt": prompt, "made_with": self._made_with})

    def _path(self, prompt: str) -> Path:
        key = hashlib.sha256(json.dumps([self._made_with, prompt]).encode()).hexdigest()
        return self._folder / key[:2] / f"{key}.safetensors"
