"""How much arithmetic the transformer is: exact counts of its matrix products, by shape.

Model FLOPs, the convention behind MFU (Chowdhery et al. 2022, PaLM, arXiv 2204.02311, appendix B): a multiply-add is 2,
a backward pass does each product twice more (for the input's gradient and for the weight's), and what a run computes
again to save memory (checkpointing, scores inside flash attention) counts nothing. So the same model on the same clips
has the same figure under every setting, and a faster run has a higher rate.

T text tokens, N video tokens, S = T + N, D width, L layers.
"""

from cogvideox_factory.models import TransformerConfig


def forward_flops(config: TransformerConfig, *, video_tokens: int, text_length: int) -> int:
    """Return the FLOPs of one sample's forward pass: 24 S D^2 L for the linears of blocks, 4 S^2 D L for attention,
    and the few of embeddings, modulation and output. The last block owes its text rows nothing behind attention, which
    is 18 T D^2 less."""
    return sum(_forward_parts(config, video_tokens, text_length).values())


def training_flops(
    config: TransformerConfig, *, video_tokens: int, text_length: int, method: str, adapter_weights: int = 0
) -> int:
    """Return the model FLOPs of one sample's forward and backward pass.

    Full fine-tuning is three forward passes, short of the gradients of what comes in (latents, embeddings, times),
    which nobody asks for. A LoRA trains no base weight, which saves a third of every linear and nothing of attention;
    gradients are taken to flow through all blocks.

    Args:
        config: of the transformer.
        video_tokens: N of the sample.
        text_length: T.
        method: "full" or "lora".
        adapter_weights: elements of all LoRA factors; each is taken to act on every token.
    """
    parts = _forward_parts(config, video_tokens, text_length)
    inputs, times, outputs = parts["inputs"], parts["times"], parts["outputs"]
    linears, attention, modulation = parts["linears"], parts["attention"], parts["modulation"]
    if method == "full":
        return 2 * inputs + 2 * times + 3 * (parts["second times"] + modulation + linears + attention + outputs)
    assert method == "lora", method
    frozen = inputs + times + parts["second times"] + modulation
    adapters = 2 * (video_tokens + text_length) * adapter_weights
    return frozen + 2 * (linears + outputs) + 3 * (attention + adapters)


def recomputed_flops(
    config: TransformerConfig, *, video_tokens: int, text_length: int, checkpointing: str, layers: int
) -> int:
    """Return the FLOPs that one sample's backward pass does again in `layers` blocks: their linears, and with "full"
    attention too. Outside the model's own, and so outside MFU."""
    if checkpointing == "none" or not layers:
        return 0
    parts = _forward_parts(config, video_tokens, text_length)
    again = parts["linears"] + (parts["attention"] if checkpointing == "full" else 0)
    return again * layers // config.num_layers


def _forward_parts(config: TransformerConfig, video_tokens: int, text_length: int) -> dict[str, int]:
    """Return forward FLOPs by part of the model."""
    d, t, layers, tokens = config.width, config.time_embed_dim, config.num_layers, video_tokens + text_length
    patch = config.patch_size**2 * (config.patch_size_t or 1)
    ofs = config.ofs_embed_dim or 0
    return {
        "inputs": 2 * d * (video_tokens * config.in_channels * patch + text_length * config.text_embed_dim),
        "times": 2 * (d * t + ofs * ofs),
        "second times": 2 * (t * t + ofs * ofs),
        "modulation": 2 * t * d * (12 * layers + 2),  # two halves of six vectors a block; the output's shift and scale
        "linears": 24 * tokens * d * d * layers - 18 * text_length * d * d,
        "attention": 4 * tokens * tokens * d * layers,
        "outputs": 2 * video_tokens * d * patch * config.out_channels,
    }
