"""Names and shapes of every tensor in a CogVideoX model folder, as arithmetic on its configs.

No framework builds the networks here, so a random model can be written on a machine that has none, and both
engines start from the same bytes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cogvideox_factory.models import TransformerConfig, VaeConfig

Shapes = dict[str, tuple[int, ...]]
"""Tensor name in the checkpoint to its shape."""


def transformer_shapes(config: TransformerConfig) -> Shapes:
    """Return the tensors of `transformer/`, the learned position buffer included where there is one."""
    d, t, patch = config.width, config.time_embed_dim, config.patch_size**2 * (config.patch_size_t or 1)
    if config.patch_size_t is None:
        shapes: Shapes = {"patch_embed.proj.weight": (d, config.in_channels, config.patch_size, config.patch_size)}
    else:
        shapes = {"patch_embed.proj.weight": (d, config.in_channels * patch)}
    if config.patch_bias or config.patch_size_t is not None:
        shapes["patch_embed.proj.bias"] = (d,)
    if config.use_learned_positional_embeddings:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        grid = frames * (config.sample_height // config.patch_size) * (config.sample_width // config.patch_size)
        shapes["patch_embed.pos_embedding"] = (1, config.max_text_seq_length + grid, d)
    shapes |= _linear("patch_embed.text_proj", config.text_embed_dim, d)
    shapes |= _linear("time_embedding.linear_1", d, t) | _linear("time_embedding.linear_2", t, t)
    if config.ofs_embed_dim:
        o = config.ofs_embed_dim
        shapes |= _linear("ofs_embedding.linear_1", o, o) | _linear("ofs_embedding.linear_2", o, o)
    for index in range(config.num_layers):
        shapes |= _transformer_block(f"transformer_blocks.{index}", config)
    affine = _norm("norm_out.norm", d) | _norm("norm_final", d) if config.norm_elementwise_affine else {}
    return shapes | affine | _linear("norm_out.linear", t, 2 * d) | _linear("proj_out", d, patch * config.out_channels)


def vae_shapes(config: VaeConfig) -> Shapes:
    """Return the tensors of `vae/`: encoder, then decoder."""
    widths, depth, z = config.block_out_channels, config.layers_per_block, config.latent_channels
    shapes = _conv("encoder.conv_in", config.in_channels, widths[0])
    previous = widths[0]
    for index, width in enumerate(widths):
        block = f"encoder.down_blocks.{index}"
        for layer in range(depth):
            shapes |= _resnet(f"{block}.resnets.{layer}", previous if layer == 0 else width, width, None)
        if index < len(widths) - 1:
            shapes |= _conv2d(f"{block}.downsamplers.0.conv", width)
        previous = width
    for layer in range(2):
        shapes |= _resnet(f"encoder.mid_block.resnets.{layer}", previous, previous, None)
    shapes |= _norm("encoder.norm_out", previous) | _conv("encoder.conv_out", previous, 2 * z)

    shapes |= _conv("decoder.conv_in", z, previous)
    for layer in range(2):
        shapes |= _resnet(f"decoder.mid_block.resnets.{layer}", previous, previous, z)
    for index, width in enumerate(reversed(widths)):
        block = f"decoder.up_blocks.{index}"
        for layer in range(depth + 1):
            shapes |= _resnet(f"{block}.resnets.{layer}", previous if layer == 0 else width, width, z)
        if index < len(widths) - 1:
            shapes |= _conv2d(f"{block}.upsamplers.0.conv", width)
        previous = width
    shapes |= _spatial_norm("decoder.norm_out", previous, z)
    return shapes | _conv("decoder.conv_out", previous, config.out_channels)


def text_encoder_shapes(config: Mapping[str, Any]) -> Shapes:
    """Return the tensors of a T5 v1.1 `text_encoder/` from its config.json."""
    d, inner, ff = config["d_model"], config["num_heads"] * config["d_kv"], config["d_ff"]
    shapes: Shapes = {"shared.weight": (config["vocab_size"], d)}
    for index in range(config["num_layers"]):
        attention, mlp = f"encoder.block.{index}.layer.0", f"encoder.block.{index}.layer.1"
        if index == 0:
            buckets = config["relative_attention_num_buckets"]
            shapes[f"{attention}.SelfAttention.relative_attention_bias.weight"] = (
                buckets,
                config["num_heads"],
            )
        for name in "qkv":
            shapes[f"{attention}.SelfAttention.{name}.weight"] = (inner, d)
        shapes[f"{attention}.SelfAttention.o.weight"] = (d, inner)
        shapes[f"{attention}.layer_norm.weight"] = (d,)
        shapes |= {f"{mlp}.DenseReluDense.{name}.weight": (ff, d) for name in ("wi_0", "wi_1")}
        shapes |= {f"{mlp}.DenseReluDense.wo.weight": (d, ff), f"{mlp}.layer_norm.weight": (d,)}
    return shapes | {"encoder.final_layer_norm.weight": (d,)}


def _transformer_block(block: str, config: TransformerConfig) -> Shapes:
    d, t, head = config.width, config.time_embed_dim, config.attention_head_dim
    shapes: Shapes = {}
    for norm in ("norm1", "norm2"):
        shapes |= _linear(f"{block}.{norm}.linear", t, 6 * d)
        if config.norm_elementwise_affine:
            shapes |= _norm(f"{block}.{norm}.norm", d)
    for name in ("to_q", "to_k", "to_v"):
        shapes |= _linear(f"{block}.attn1.{name}", d, d, bias=config.attention_bias)
    shapes |= _norm(f"{block}.attn1.norm_q", head) | _norm(f"{block}.attn1.norm_k", head)
    shapes |= _linear(f"{block}.attn1.to_out.0", d, d)
    return shapes | _linear(f"{block}.ff.net.0.proj", d, 4 * d) | _linear(f"{block}.ff.net.2", 4 * d, d)


def _resnet(name: str, inside: int, outside: int, latent_channels: int | None) -> Shapes:
    shapes = dict(_resnet_norms(name, inside, outside, latent_channels))
    shapes |= _conv(f"{name}.conv1", inside, outside) | _conv(f"{name}.conv2", outside, outside)
    if inside != outside:
        shapes[f"{name}.conv_shortcut.weight"] = (outside, inside, 1, 1, 1)
        shapes[f"{name}.conv_shortcut.bias"] = (outside,)
    return shapes


def _resnet_norms(
    name: str, inside: int, outside: int, latent_channels: int | None
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for norm, channels in (("norm1", inside), ("norm2", outside)):
        if latent_channels is None:
            yield from _norm(f"{name}.{norm}", channels).items()
        else:
            yield from _spatial_norm(f"{name}.{norm}", channels, latent_channels).items()


def _spatial_norm(name: str, channels: int, latent_channels: int) -> Shapes:
    shapes = _norm(f"{name}.norm_layer", channels)
    for conv in ("conv_y", "conv_b"):
        shapes |= _conv(f"{name}.{conv}", latent_channels, channels, kernel=1)
    return shapes


def _conv(name: str, inside: int, outside: int, *, kernel: int = 3) -> Shapes:
    """A causal 3-D convolution; the checkpoint wraps the real one in a module called `conv`."""
    return {f"{name}.conv.weight": (outside, inside, kernel, kernel, kernel), f"{name}.conv.bias": (outside,)}


def _conv2d(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels, channels, 3, 3), f"{name}.bias": (channels,)}


def _linear(name: str, inside: int, outside: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outside, inside)} | ({f"{name}.bias": (outside,)} if bias else {})


def _norm(name: str, channels: int) -> Shapes:
    return {f"{name}.weight": (channels,), f"{name}.bias": (channels,)}
