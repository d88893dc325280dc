"""One block of the transformer on the joint token stream, and the vectors that modulate all of them.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): adaptive LayerNorm. CogVideoX
(arXiv 2408.06072, section 2.2) gives text and video rows of one stream their own shift, scale and gate.

Legend: B batch, S joint tokens (text first), D width, L heads, N layers, E size of the time embedding.
"""

import torch
from torch import Tensor, nn

from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.torch_engine import checkpointing
from cogvideox_factory.torch_engine.feed_forward import FeedForward
from cogvideox_factory.torch_engine.fused import gated_linear, modulated_norm
from cogvideox_factory.torch_engine.linear import Linear
from cogvideox_factory.torch_engine.offload import Shelf
from cogvideox_factory.torch_engine.rotary import norm_rotate, norm_rotate_attention
from cogvideox_factory.torch_engine.sequence_parallel import Share, sequence_attention

QK_NORM_EPS = 1e-6
"""Of the LayerNorms of q and k in every checkpoint; no config says it."""

VECTORS_PER_BLOCK = 12
"""Two norms, video and text rows, scale, shift and gate."""


class Modulation(nn.Module):
    """The adaptive part of all norms of all blocks: one matrix product a step instead of two a block.

    Rows of `linear` are ordered by block, norm, video or text, and (shift, scale, gate), as in a checkpoint's
    `transformer_blocks.{i}.norm{1,2}.linear`. The norms' own weights are here too, one row a norm, because they are
    folded into the vectors: LayerNorm(x) * w * (1 + scale) + (b * (1 + scale) + shift).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.num_norms = 2 * config.num_layers
        self.linear = Linear(config.time_embed_dim, self.num_norms * 6 * config.width)
        self.weight = self.bias = None
        if config.norm_elementwise_affine:
            self.weight = nn.Parameter(torch.empty(self.num_norms, config.width))
            self.bias = nn.Parameter(torch.empty(self.num_norms, config.width))

    def forward(self, conditioning: Tensor) -> Tensor:
        """Return the vectors of all blocks [B, 12N, D] from `conditioning` [B, E], the activated time embedding.

        `VECTORS_PER_BLOCK` for each block: norm 1 then 2; video then text; scale, shift, gate.
        """
        rows = self.linear(conditioning).unflatten(1, (self.num_norms, 2, 3, -1))  # [B, 2N, 2, 3, D]
        shift, scale, gate = rows.unbind(3)  # [B, 2N, 2, D]
        scale = 1 + scale
        if self.weight is not None and self.bias is not None:
            shift = torch.addcmul(shift, scale, self.bias.unsqueeze(1))
            scale = scale * self.weight.unsqueeze(1)
        return torch.stack([scale, shift, gate], dim=3).flatten(1, 3)  # [B, 12N, D]


def split_vectors(vectors: Tensor) -> tuple[Tensor, ...]:
    """Return `Modulation`'s vectors [B, 12N, D] one by one: each [D] for one sample, [B, 1, D] for several."""
    return vectors[0].unbind(0) if len(vectors) == 1 else vectors.transpose(0, 1).unsqueeze(2).unbind(0)


class Attention(nn.Module):
    """Joint self-attention up to, but without, its output projection `out`, which the block fuses with the gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.num_heads = config.num_attention_heads
        self.qkv = Linear(width, 3 * width, bias=config.attention_bias)
        self.norm_q = nn.LayerNorm(head_dim, eps=QK_NORM_EPS)
        self.norm_k = nn.LayerNorm(head_dim, eps=QK_NORM_EPS)
        self.out = Linear(width, width)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, share: Share | None = None) -> Tensor:
        """Return what every token attends to, heads joined: [B, S, D] from `x` [B, S, D] (rows of a `share`)."""
        weights = (self.norm_q.weight, self.norm_q.bias, self.norm_k.weight, self.norm_k.bias)
        if share is None:
            return norm_rotate_attention(self.qkv(x), weights, rotary, num_heads=self.num_heads, eps=QK_NORM_EPS)
        q, k, v = norm_rotate(self.qkv(x), weights, rotary, num_heads=self.num_heads, eps=QK_NORM_EPS)
        return sequence_attention(q, k, v, share)


class Block(nn.Module):
    """Attention and feed-forward, each behind a modulated norm and a gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.eps = config.norm_eps
        self.attn = Attention(config)
        self.ff = FeedForward(config.width, eps=config.norm_eps)
        self.checkpointing: checkpointing.Checkpointing = "none"
        self.shelf: Shelf | None = None
        """Where what is kept for the backward pass waits, if not on the device."""

    def set_checkpointing(self, mode: str) -> None:
        """Choose what is kept for the backward pass, see `checkpointing`.

        Raises:
            FactoryError: no such mode.
        """
        self.checkpointing = checkpointing.check_mode(mode)
        self.ff.checkpointed = mode != "none"

    def forward(
        self,
        x: Tensor,
        vectors: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor] | None,
        text_length: int,
        share: Share | None = None,
        video_only: bool = False,
    ) -> Tensor:
        """Return the stream after this block, [B, S, D] or its video rows.

        Args:
            x: [B, S, D], its first `text_length` rows text.
            vectors: this block's part of `Modulation`'s.
            rotary: (cos, sin), each float32 [S, 1, head_dim / 2], or None.
            text_length: number of text rows.
            share: which rows of the stream `x`, `rotary` and `text_length` are of, where ranks divide it.
            video_only: leave out the text rows, and all work on them behind attention; not with a `share`.
        """
        # Checkpointing is inside the module, so that hooks on it (sharding, compilation) see one call, not two.
        args = x, vectors, rotary, text_length, share, video_only
        if self.shelf is None or not torch.is_grad_enabled():
            return checkpointing.run(self.checkpointing, self._forward, *args)
        with self.shelf.keeping(self, (*vectors, *(rotary or ()))):
            return checkpointing.run(self.checkpointing, self._forward, *args, shelf=self.shelf)

    def _forward(
        self,
        x: Tensor,
        vectors: tuple[Tensor, ...],
        rotary: tuple[Tensor, Tensor] | None,
        text_length: int,
        share: Share | None,
        video_only: bool,
    ) -> Tensor:
        scale, shift, gate, text_scale, text_shift, text_gate, *of_feed_forward = vectors
        attended = self.attn(
            modulated_norm(x, scale, shift, text_scale, text_shift, text_length=text_length, eps=self.eps),
            rotary,
            share,
        )
        if video_only:
            x, attended, text_length = x[:, text_length:], attended[:, text_length:], 0
        x = gated_linear(x, attended, self.attn.out, gate, text_gate, text_length=text_length)
        del attended  # like the other, it would only wait here for the end of the feed-forward
        return self.ff(x, tuple(of_feed_forward), text_length)
