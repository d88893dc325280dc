"""Prompts to embeddings for `generate`: each once, and those that were encoded before without a text encoder."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from mindspore import Tensor

from cogvideox_factory.entries import report_cut_captions
from cogvideox_factory.metrics import say
from cogvideox_factory.mindspore_engine.border import to_array, to_tensor
from cogvideox_factory.mindspore_engine.start import Machine
from cogvideox_factory.mindspore_engine.text_encoder import TextEncoder
from cogvideox_factory.prompt_cache import PromptCache


def encode_prompts(
    prompts: Sequence[str], model: Path, *, length: int, machine: Machine, cache: Path | None = None
) -> dict[str, Tensor]:
    """Return the embedding [1, S, E] of each of `prompts`; the encoder, if one was needed, is gone.

    Each is encoded by itself, so that a video does not depend on the others, and one graph serves all.

    Args:
        prompts: any number, equal ones too.
        model: folder with `text_encoder` and `tokenizer`.
        length: tokens of each, S.
        machine: where they are encoded, and in what.
        cache: folder of those made before; None makes all.

    Raises:
        MissingError, UnfitError: as `TextEncoder.from_folder`.
        StorageError: the cache cannot be written.
    """
    wanted = list(dict.fromkeys(prompts))
    known: dict[str, Tensor] = {}
    kept = None
    if cache is not None:
        made_with = {"dtype": machine.dtype_name, "length": length, "device": machine.device, "mode": str(machine.mode)}
        kept = PromptCache(cache, model, made_with | {name: version(name) for name in ("mindspore", "transformers")})
        found = {prompt: kept.find(prompt) for prompt in wanted}
        known = {prompt: to_tensor(embeds)[None] for prompt, embeds in found.items() if embeds is not None}
        say(f"{len(known)} of {len(wanted)} prompt(s) were encoded before, in {cache}")
    missing = [prompt for prompt in wanted if prompt not in known]
    if missing:
        encoder = TextEncoder.from_folder(model, dtype=machine.dtype, mode=machine.mode)
        report_cut_captions(encoder.truncated_tokens, missing, length, strict=False, called="prompts")
        for prompt in missing:
            known[prompt] = encoder.encode([prompt], length)
            if kept is not None:
                kept.keep(prompt, to_array(known[prompt])[0])
    return known
