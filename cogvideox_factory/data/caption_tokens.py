"""How many tokens a caption takes, by a model's own tokenizer and without a framework.

A `tokenizer.json` is read by `tokenizers`, the SentencePiece file of the published models by `sentencepiece`; both
give the counts that transformers gives, the end-of-text token included, and both are imported only when asked for.
"""

from collections.abc import Callable
from pathlib import Path

from cogvideox_factory.errors import UnfitError

TokenCounter = Callable[[str], int]


def token_counter(model_folder: Path) -> TokenCounter | None:
    """Return what counts the tokens of a caption, or None where `model_folder` holds no tokenizer.

    Raises:
        UnfitError: the tokenizer's file cannot be read.
    """
    folder = Path(model_folder) / "tokenizer"
    try:
        if (folder / "tokenizer.json").is_file():
            return _from_json(folder / "tokenizer.json")
        if (folder / "spiece.model").is_file():
            return _from_pieces(folder / "spiece.model")
    except Exception as error:  # both libraries raise bare Exceptions of their own
        raise UnfitError(f"{folder} cannot be read as a tokenizer: {error}. Download it again.") from error
    return None


def _from_json(file: Path) -> TokenCounter:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return lambda caption: len(tokenizer.encode(caption).ids)


def _from_pieces(file: Path) -> TokenCounter:
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(model_file=str(file))
    return lambda caption: len(pieces.encode(caption)) + 1  # T5 ends every text with </s>
