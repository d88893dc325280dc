"""Prompts to embeddings for `generate`: each once, and those that were encoded before without a text encoder."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from cogvideox_factory.entries import report_cut_captions
from cogvideox_factory.metrics import say
from cogvideox_factory.prompt_cache import PromptCache
from cogvideox_factory.torch_engine.border import to_array, to_tensor
from cogvideox_factory.torch_engine.loading import AS_IT_IS, Keeping, load_text_encoder


def encode_prompts(
    prompts: Sequence[str],
    model: Path,
    *,
    length: int,
    device: torch.device,
    dtype: torch.dtype,
    cache: Path | None = None,
    keeping: Keeping = AS_IT_IS,
) -> Tensor:
    """Return the embeddings [B, S, E] of `prompts` in host memory; the encoder, if one was needed, is gone.

    Each is encoded by itself: the last bits of a batch depend on its size, and a video must not depend on the others.

    Args:
        prompts: any number, equal ones too.
        model: folder with `text_encoder` and `tokenizer`.
        length: tokens of each, S.
        device: where they are encoded.
        dtype: of the encoder and the embeddings.
        cache: folder of those made before; None makes all.
        keeping: how the encoder's weights are kept.

    Raises:
        MissingError, UnfitError: as `TextEncoder.from_folder`.
        StorageError: the cache cannot be written.
    """
    known: dict[str, Tensor] = {}
    kept = None
    if cache is not None:
        made_with = {"dtype": str(dtype), "length": length, "device": device.type}
        kept = PromptCache(cache, model, made_with | {name: version(name) for name in ("torch", "transformers")})
        found = {prompt: kept.find(prompt) for prompt in dict.fromkeys(prompts)}
        known = {prompt: to_tensor(embeds) for prompt, embeds in found.items() if embeds is not None}
    missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
    if cache is not None:
        say(f"{len(known)} of {len(known) + len(missing)} prompt(s) were encoded before, in {cache}")
    if missing:
        encoder = load_text_encoder(model, dtype=dtype, device=device, keeping=keeping)
        report_cut_captions(encoder.truncated_tokens, missing, length, strict=False, called="prompts")
        for prompt in missing:
            known[prompt] = encoder.encode([prompt], length)[0].to("cpu", dtype)
            if kept is not None:
                kept.keep(prompt, to_array(known[prompt]))
    return torch.stack([known[prompt] for prompt in prompts])
