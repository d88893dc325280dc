"""Captions to embeddings: the checkpoint's own T5 encoder and tokenizer, through transformers.

Unusual about CogVideoX: the text is always padded to one fixed length and the padding is attended, in T5 and
again in the transformer (no attention mask anywhere). So every row of the result matters and all of them are
kept, and the length is part of what a cache must remember.

The weights go from the files straight into the target dtype. T5-XXL's encoder is 9.5 GB in 16 bits; loading
it in float32 first, as the original trainers did, peaks at 19 GB.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.plan.generation import TextModel
from cogvideox_factory.text_encoder_files import (
    Tokens,
    read_text_encoder_config,
    require_text_encoder,
    require_tokenizer,
)

# Legend: B captions, T text tokens (max_sequence_length), E embedding width


class TextEncoder(Tokens):
    """A T5 encoder with its tokenizer, frozen and in evaluation mode."""

    def __init__(self, model: torch.nn.Module, tokenizer: Any) -> None:
        self.model = model.requires_grad_(False).eval()
        self.tokenizer = tokenizer

    @classmethod
    def from_folder(cls, model_folder: Path | str, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Self:
        """Load `text_encoder/` and `tokenizer/` of a model folder; nothing is downloaded or executed.

        Raises:
            MissingError: a folder, or a library its tokenizer file needs, is not there.
            UnfitError: the files are not a T5 encoder and its tokenizer.
        """
        folder = Path(model_folder)
        tokenizer = load_tokenizer(folder)
        return cls(_load_model(folder / "text_encoder", dtype=dtype).to(device), tokenizer)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embeddings (T5 itself keeps a few float32 weights when loaded in float16)."""
        return self.model.get_input_embeddings().weight.dtype  # pyright: ignore[reportCallIssue]

    @property
    def device(self) -> torch.device:
        """Where the encoder lives."""
        return self.model.get_input_embeddings().weight.device  # pyright: ignore[reportCallIssue]

    @property
    def width(self) -> int:
        """The embedding width E, a transformer's `text_embed_dim`."""
        return self.model.config.d_model  # pyright: ignore[reportAttributeAccessIssue, reportReturnType]

    @property
    def blocks(self) -> list[torch.nn.Module]:
        """The layers of the encoder, in order."""
        return list(self.model.encoder.block)  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]

    @torch.no_grad()
    def encode(self, captions: Sequence[str], max_sequence_length: int) -> torch.Tensor:
        """Return the embeddings of `captions`, padded and cut to `max_sequence_length` tokens: [B, T, E].

        The same numbers as diffusers' CogVideoX pipelines feed their transformer. What is cut is counted by
        `truncated_tokens`.
        """
        ids = torch.from_numpy(self.token_ids(captions, max_sequence_length))  # [B, T]
        output = self.model(ids.to(self.device), return_dict=False)
        return output[0].to(self.dtype)  # [B, T, E]


_T5_SIZES = ("vocab_size", "d_model", "d_kv", "num_heads", "d_ff", "num_layers")


def text_model(model_folder: Path | str) -> TextModel:
    """Return the size of a model folder's text encoder.

    Raises:
        MissingError, UnfitError: no such folder, or not a T5 encoder's.
    """
    path = Path(model_folder) / "text_encoder" / "config.json"
    config = read_text_encoder_config(path)
    try:
        sizes = {name: int(config[name]) for name in _T5_SIZES}
    except KeyError as error:
        raise UnfitError(f"{path} has no {error}; every T5 encoder's has. Download it again.") from error
    return TextModel.t5(**sizes)


def load_tokenizer(model_folder: Path | str) -> Any:
    """Load `model_folder/tokenizer` from its `tokenizer.json` or SentencePiece `spiece.model`.

    Raises:
        MissingError: the folder, its files or the SentencePiece libraries are not there.
        UnfitError: transformers cannot read it.
    """
    folder = require_tokenizer(Path(model_folder))
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (ValueError, OSError, TypeError, KeyError) as error:
        raise UnfitError(f"{folder} cannot be read as a tokenizer: {error}. Download it again.") from error
    if tokenizer.pad_token_id is None:
        raise UnfitError(f"{folder} names no pad token; CogVideoX pads every caption. Is tokenizer_config.json T5's?")
    return tokenizer


def _load_model(folder: Path, *, dtype: torch.dtype) -> torch.nn.Module:
    """Load the T5 encoder of `folder` in `dtype`, refusing pickled weights and stray or missing keys."""
    require_text_encoder(folder)
    from safetensors import SafetensorError
    from transformers import T5EncoderModel

    try:
        with _quiet_transformers():
            loaded: Any = T5EncoderModel.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
            )
    except (ValueError, OSError, RuntimeError, KeyError, SafetensorError) as error:
        raise UnfitError(f"{folder} cannot be loaded as a T5 encoder: {error}. Download it again.") from error
    model, info = loaded
    mismatched = {key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"]}
    strays = sorted({*info["missing_keys"], *mismatched})
    if strays:
        raise UnfitError(
            f"{folder}: {len(strays)} tensors of the T5 encoder are missing or of another shape, the first: "
            f"{', '.join(strays[:5])}. The download is incomplete or config.json belongs to another size."
        )
    return model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep its progress bar and its table of strays off the terminal; both are said better by us."""
    from transformers.utils import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
