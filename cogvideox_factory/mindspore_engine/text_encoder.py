"""Captions to embeddings: the checkpoint's own T5 encoder (see `t5`), and its tokenizer through transformers.

Unusual about CogVideoX: the text is always padded to one fixed length and the padding is attended, in T5 and
again in the transformer (no attention mask anywhere). So every row of the result matters and all of them are
kept, and the length is part of what a cache must remember.

Legend: B captions, T text tokens (max_sequence_length), E embedding width.
"""

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import mindspore as ms
import numpy as np
from mindspore import Tensor

from cogvideox_factory import weights
from cogvideox_factory.errors import UnfitError
from cogvideox_factory.mindspore_engine.border import load_parameters, to_tensor
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.linear import weights_in
from cogvideox_factory.mindspore_engine.t5 import T5Encoder
from cogvideox_factory.text_encoder_files import Tokens, require_text_encoder, require_tokenizer

_TIED = "encoder.embed_tokens.weight"
"""The embedding under its second name, in files of older versions of transformers."""


class TextEncoder(Tokens):
    """A T5 encoder with its tokenizer, frozen."""

    def __init__(self, model: T5Encoder, tokenizer: Any, *, mode: Mode = PYNATIVE) -> None:
        self.model, self.tokenizer = model, tokenizer
        for parameter in model.get_parameters():
            parameter.requires_grad = False

        def encode(ids: Tensor, buckets: Tensor) -> Tensor:  # a graph can be made of this, not of a lambda
            return model(ids, buckets)

        self._encode = mode.compiled(encode)
        self._buckets = cache(model.buckets)

    @classmethod
    def from_folder(cls, model_folder: Path | str, *, dtype: Any = ms.float32, mode: Mode = PYNATIVE) -> Self:
        """Load `text_encoder/` and `tokenizer/` of a model folder; nothing is downloaded or executed.

        Raises:
            MissingError: a folder, or a library its tokenizer file needs, is not there.
            UnfitError: the files are not a T5 encoder and its tokenizer.
        """
        folder = Path(model_folder)
        tokenizer = load_tokenizer(folder)
        return cls(_load_model(folder / "text_encoder", dtype=dtype), tokenizer, mode=mode)

    @property
    def dtype(self) -> Any:
        """The dtype of the embeddings."""
        return self.model.shared.weight.dtype

    @property
    def width(self) -> int:
        """The embedding width E, a transformer's `text_embed_dim`."""
        return self.model.shared.weight.shape[1]

    def encode(self, captions: Sequence[str], max_sequence_length: int) -> Tensor:
        """Return the embeddings of `captions`, padded and cut to `max_sequence_length` tokens: [B, T, E].

        What is cut is counted by `truncated_tokens`.
        """
        ids = self.token_ids(captions, max_sequence_length).astype(np.int32)  # [B, T]
        return self._encode(to_tensor(ids), self._buckets(max_sequence_length))


def load_tokenizer(model_folder: Path | str) -> Any:
    """Load `model_folder/tokenizer` from its `tokenizer.json` or SentencePiece `spiece.model`.

    Raises:
        MissingError: the folder, its files or the SentencePiece libraries are not there.
        UnfitError: transformers cannot read it.
    """
    folder = require_tokenizer(Path(model_folder))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UnfitError(f"{folder} cannot be read as a tokenizer: {error}. Download it again.") from error
    if tokenizer.pad_token_id is None:
        raise UnfitError(f"{folder} names no pad token; CogVideoX pads every caption. Is tokenizer_config.json T5's?")
    return tokenizer


def _load_model(folder: Path, *, dtype: Any) -> T5Encoder:
    """Load the T5 encoder of `folder` in `dtype`, refusing pickled weights and stray or missing keys."""
    config = require_text_encoder(folder)
    try:
        with weights_in(dtype):
            model = T5Encoder(config)
    except (KeyError, TypeError) as error:
        raise UnfitError(
            f"{folder / 'config.json'}: {error} is missing or no number, so this is no T5. Download it again."
        ) from error
    stored = weights.stored_tensors(folder, weights.TEXT_ENCODER_STEM)
    load_parameters(model, ((name, tensor) for name, tensor in stored if name != _TIED), source=str(folder))
    return model
