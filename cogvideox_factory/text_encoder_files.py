"""The tokenizer and text encoder of a model folder, checked before an engine opens them."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.errors import FactoryError, MissingError, UnfitError

_PIECE_LIBRARIES = {"sentencepiece": "sentencepiece", "protobuf": "google.protobuf"}


def check_captions(captions: Sequence[str], max_sequence_length: int) -> None:
    """Refuse what no text encoder can encode.

    Raises:
        FactoryError: one caption that is not in a list, none at all, or no room for a token.
    """
    if isinstance(captions, str):
        raise FactoryError("encode takes a list of captions; put a single one in brackets: [caption].")
    if max_sequence_length < 1:
        raise FactoryError(f"max_sequence_length={max_sequence_length}: at least 1 token; CogVideoX uses 226.")
    if not captions:
        raise FactoryError("encode was given no caption; it takes at least one.")


class Tokens:
    """Captions as a tokenizer of transformers cuts them; a text encoder is one of these."""

    tokenizer: Any

    def count_tokens(self, caption: str) -> int:
        """Return how many tokens `caption` needs, the end-of-text token included."""
        return len(self.tokenizer(caption, truncation=False).input_ids)

    def truncated_tokens(self, caption: str, max_sequence_length: int) -> int:
        """Return how many tokens of `caption` do not fit into `max_sequence_length`; 0 when all do."""
        return max(0, self.count_tokens(caption) - max_sequence_length)

    def token_ids(self, captions: Sequence[str], max_sequence_length: int) -> np.ndarray:
        """Return the ids [B, T] of `captions`, padded and cut to T = `max_sequence_length`.

        Raises:
            FactoryError: as `check_captions`.
        """
        check_captions(captions, max_sequence_length)
        tokens = self.tokenizer(
            list(captions), padding="max_length", max_length=max_sequence_length, truncation=True,
            add_special_tokens=True, return_tensors="np",
        )  # fmt: skip
        return tokens.input_ids


def require_tokenizer(model_folder: Path) -> Path:
    """Return `model_folder/tokenizer`, which holds a tokenizer.json or a SentencePiece spiece.model.

    Raises:
        MissingError: the folder, its files or the SentencePiece libraries are not there.
    """
    folder = model_folder / "tokenizer"
    _require_folder(folder, holds="the tokenizer (tokenizer_config.json with spiece.model or tokenizer.json)")
    has_json, has_pieces = (folder / "tokenizer.json").is_file(), (folder / "spiece.model").is_file()
    if not has_json and not has_pieces:
        raise MissingError(
            f"{folder} holds neither tokenizer.json nor spiece.model. Download the tokenizer/ folder again."
        )
    if not has_json:
        absent = [pip for pip, module in _PIECE_LIBRARIES.items() if not _is_installed(module)]
        if absent:
            raise MissingError(
                f"{folder} is a SentencePiece tokenizer; reading it needs {' and '.join(_PIECE_LIBRARIES)}. "
                f"Install: pip install {' '.join(absent)}"
            )
    return folder


def require_text_encoder(folder: Path) -> dict[str, Any]:
    """Return the config of the T5 encoder in `folder`.

    Raises:
        MissingError: the folder or its files are not there.
        UnfitError: it is no T5.
    """
    _require_folder(folder, holds="the T5 text encoder (config.json and *.safetensors)")
    config = read_text_encoder_config(folder / "config.json")
    if config.get("model_type") != "t5":
        raise UnfitError(
            f"{folder / 'config.json'} says model_type={config.get('model_type')!r}; the text encoder "
            "of CogVideoX is 't5'. Point to a CogVideoX model's root folder."
        )
    if not any(folder.glob("*.safetensors")):
        raise MissingError(
            f"{folder} holds no *.safetensors. Download the text encoder again; pickled weights (*.bin) are "
            "not read, because loading them can run code: convert them first."
        )
    return config


def read_text_encoder_config(path: Path) -> dict[str, Any]:
    """Return a text encoder's config.json.

    Raises:
        MissingError: it is not there.
        UnfitError: it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise MissingError(f"{path} is missing. Download the model's text_encoder/ folder again.") from error
    except ValueError as error:
        raise UnfitError(f"{path} is not valid JSON: {error}. Download it again.") from error


def _is_installed(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # its parent package is absent too
        return False


def _require_folder(folder: Path, *, holds: str) -> None:
    if not folder.is_dir():
        raise MissingError(
            f"{folder} is missing; it holds {holds}. Point to a complete model folder in the diffusers "
            "layout (transformer/, vae/, text_encoder/, tokenizer/, scheduler/)."
        )
