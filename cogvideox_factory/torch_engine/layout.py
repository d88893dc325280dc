"""Which rows of which of our parameters hold a tensor of a diffusers checkpoint.

Ours differ where it pays: q, k and v are one projection, the adaptive norms of all blocks one (see
`block.Modulation`), and the patch convolution of CogVideoX 1.0 is the matrix product it is.
"""

from dataclasses import dataclass

from cogvideox_factory.models import TransformerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Slot:
    """Rows `start` to `stop` of the parameter or buffer `name`; `shape` is the checkpoint's, of as many elements."""

    name: str
    start: int
    stop: int
    shape: tuple[int, ...]


def diffusers_names(config: TransformerConfig) -> dict[str, Slot]:
    """Return {name in a diffusers checkpoint: its place in a `CogVideoXTransformer`} for all tensors of a model."""
    slots: dict[str, Slot] = {}

    def put(theirs: str, ours: str, *shape: int, start: int = 0, rows: int | None = None) -> None:
        slots[theirs] = Slot(name=ours, start=start, stop=start + (rows or shape[0]), shape=shape)

    def put_linear(theirs: str, ours: str, rows: int, columns: int, *, bias: bool = True, start: int = 0) -> None:
        put(f"{theirs}.weight", f"{ours}.weight", rows, columns, start=start)
        if bias:
            put(f"{theirs}.bias", f"{ours}.bias", rows, start=start)

    def put_norm(theirs: str, ours: str, size: int) -> None:
        put(f"{theirs}.weight", f"{ours}.weight", size)
        put(f"{theirs}.bias", f"{ours}.bias", size)

    d, t, p = config.width, config.time_embed_dim, config.patch_size
    if config.patch_size_t is None:
        put("patch_embed.proj.weight", "patch_embed.proj.weight", d, config.in_channels, p, p)
        if config.patch_bias:
            put("patch_embed.proj.bias", "patch_embed.proj.bias", d)
    else:
        put_linear("patch_embed.proj", "patch_embed.proj", d, config.in_channels * p * p * config.patch_size_t)
    put_linear("patch_embed.text_proj", "patch_embed.text_proj", d, config.text_embed_dim)
    if config.use_learned_positional_embeddings:
        tokens = config.max_text_seq_length + num_native_tokens(config)
        put("patch_embed.pos_embedding", "patch_embed.pos_embedding", 1, tokens, d)
    put_linear("time_embedding.linear_1", "time_embedding.linear_1", t, d)
    put_linear("time_embedding.linear_2", "time_embedding.linear_2", t, t)
    if config.ofs_embed_dim:
        put_linear("ofs_embedding.linear_1", "ofs_embedding.linear_1", config.ofs_embed_dim, config.ofs_embed_dim)
        put_linear("ofs_embedding.linear_2", "ofs_embedding.linear_2", config.ofs_embed_dim, config.ofs_embed_dim)

    for index in range(config.num_layers):
        block = f"transformer_blocks.{index}"
        for half in (0, 1):
            norm, row = f"{block}.norm{half + 1}", 2 * index + half
            put_linear(f"{norm}.linear", "modulation.linear", 6 * d, t, start=row * 6 * d)
            if config.norm_elementwise_affine:
                put(f"{norm}.norm.weight", "modulation.weight", d, start=row, rows=1)
                put(f"{norm}.norm.bias", "modulation.bias", d, start=row, rows=1)
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            put_linear(f"{block}.attn1.{name}", f"{block}.attn.qkv", d, d, bias=config.attention_bias, start=part * d)
        put_norm(f"{block}.attn1.norm_q", f"{block}.attn.norm_q", config.attention_head_dim)
        put_norm(f"{block}.attn1.norm_k", f"{block}.attn.norm_k", config.attention_head_dim)
        put_linear(f"{block}.attn1.to_out.0", f"{block}.attn.out", d, d)
        put_linear(f"{block}.ff.net.0.proj", f"{block}.ff.up", 4 * d, d)
        put_linear(f"{block}.ff.net.2", f"{block}.ff.down", d, 4 * d)

    if config.norm_elementwise_affine:
        put_norm("norm_final", "norm_final", d)
        put_norm("norm_out.norm", "norm_out.norm", d)
    put_linear("norm_out.linear", "norm_out.linear", 2 * d, t)
    put_linear("proj_out", "proj_out", config.out_channels * p * p * (config.patch_size_t or 1), d)
    return slots


def num_native_tokens(config: TransformerConfig) -> int:
    """Return the number of video tokens at the size and frame count the config names."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return frames * (config.sample_height // config.patch_size) * (config.sample_width // config.patch_size)
