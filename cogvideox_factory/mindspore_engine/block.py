"""One block of the transformer: attention over text and video together, feed-forward, each behind an adaptive norm.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (arXiv 2212.09748): adaptive LayerNorm. CogVideoX
(arXiv 2408.06072, section 2.2) gives text and video rows their own shift, scale and gate.

Legend: B batch, T text tokens, N video tokens, S = T + N joint ones (text first), D width, L heads, K head size,
E size of the time embedding.
"""

import mindspore as ms
from mindspore import Tensor, nn, ops

from cogvideox_factory.mindspore_engine.attention import AttentionKernel
from cogvideox_factory.mindspore_engine.device import inlined_once
from cogvideox_factory.mindspore_engine.feed_forward import FeedForward
from cogvideox_factory.mindspore_engine.linear import LayerNorm, Linear
from cogvideox_factory.mindspore_engine.rotary import rotate
from cogvideox_factory.mindspore_engine.sequence_parallel import HeadsForRows, Tokens
from cogvideox_factory.models import TransformerConfig

QK_NORM_EPS = 1e-6
"""Of the LayerNorms of q and k in every checkpoint; no config says it."""


class AdaptiveNorm(nn.Cell):
    """LayerNorm of both streams, scaled and shifted by what the time embedding says; the gates come along."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.time_embed_dim, 6 * config.width)
        self.norm = LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)

    def construct(self, video: Tensor, text: Tensor, conditioning: Tensor) -> tuple[Tensor, ...]:
        """Return both streams normalised and their gates [B, 1, D], video first, from `conditioning` [B, E]."""
        shift, scale, gate, text_shift, text_scale, text_gate = ops.chunk(self.linear(conditioning)[:, None], 6, axis=2)
        normed = self.norm(video) * (1 + scale) + shift
        text_normed = self.norm(text) * (1 + text_scale) + text_shift
        return normed, text_normed, gate, text_gate


class Attention(nn.Cell):
    """Joint self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width, head_dim = config.width, config.attention_head_dim
        self.num_heads, self.head_dim = config.num_attention_heads, head_dim
        self.to_q = Linear(width, width, bias=config.attention_bias)
        self.to_k = Linear(width, width, bias=config.attention_bias)
        self.to_v = Linear(width, width, bias=config.attention_bias)
        self.norm_q, self.norm_k = LayerNorm(head_dim, eps=QK_NORM_EPS), LayerNorm(head_dim, eps=QK_NORM_EPS)
        self.kernel = AttentionKernel()
        self.exchange: HeadsForRows | None = None
        """Of rows for heads, where processes divide the stream."""
        self.to_out = nn.CellList([Linear(width, width)])  # the checkpoint counts a dropout behind it

    def construct(self, x: Tensor, cos: Tensor | None, sin: Tensor | None, num_tokens: Tokens) -> Tensor:
        """Return what every token attends to: [B, S, D] from `x` [B, S, D], or this process' rows of both."""
        batch, rows = x.shape[:2]
        heads = (batch, rows, self.num_heads, self.head_dim)
        q, k = self.norm_q(self.to_q(x).reshape(heads)), self.norm_k(self.to_k(x).reshape(heads))
        v = self.to_v(x).reshape(heads)
        if self.exchange is not None:
            q, k, v = self.exchange.to_heads(q, k, v, num_tokens)
        if cos is not None:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q, k, v = q.transpose(0, 2, 1, 3), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)  # [B, L, S, K]
        out = self.kernel(q, k, v).transpose(0, 2, 1, 3)  # [B, S, L, K]
        if self.exchange is not None:
            out = self.exchange.to_rows(out, num_tokens)
        return self.to_out[0](out.reshape(x.shape))


class Block(nn.Cell):
    """Attention and feed-forward, each behind an adaptive norm and a gate."""

    @inlined_once
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = AdaptiveNorm(config), AdaptiveNorm(config)
        self.attn1 = Attention(config)
        self.ff = FeedForward(config.width)

    def construct(
        self,
        video: Tensor,
        text: Tensor,
        conditioning: Tensor,
        cos: Tensor | None,
        sin: Tensor | None,
        num_tokens: Tokens,
    ) -> tuple[Tensor, Tensor]:
        """Return both streams after this block, [B, N, D] and [B, T, D].

        Args:
            video: [B, N, D], or this process' rows.
            text: [B, T, D], or this process' rows.
            conditioning: the activated time embedding [B, E].
            cos: of rotary positions, float32 [S, 1, K / 2], or None.
            sin: as `cos`.
            num_tokens: (T, N).
        """
        length = text.shape[1]
        normed, text_normed, gate, text_gate = self.norm1(video, text, conditioning)
        out = self.attn1(ops.concat((text_normed, normed), axis=1), cos, sin, num_tokens)
        video, text = video + gate * out[:, length:], text + text_gate * out[:, :length]
        normed, text_normed, gate, text_gate = self.norm2(video, text, conditioning)
        out = self.ff(ops.concat((text_normed, normed), axis=1))
        return video + gate * out[:, length:], text + text_gate * out[:, :length]


class TimeEmbedding(nn.Cell):
    """Two Linears with SiLU between."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.linear_1 = Linear(in_features, out_features)
        self.linear_2 = Linear(out_features, out_features)

    def construct(self, x: Tensor) -> Tensor:
        """Map [B, in] to [B, out]."""
        return self.linear_2(ops.silu(self.linear_1(x)))


class OutputNorm(nn.Cell):
    """The last adaptive norm, over video tokens only; it has no gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.time_embed_dim, 2 * config.width)
        self.norm = LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)

    def construct(self, x: Tensor, conditioning: Tensor) -> Tensor:
        """Return `x` [B, N, D] normalised, scaled and shifted by what `conditioning` [B, E] says."""
        shift, scale = ops.chunk(self.linear(conditioning)[:, None], 2, axis=2)  # each [B, 1, D]
        return self.norm(x) * (1 + scale) + shift


def sinusoids(values: Tensor, frequencies: Tensor, *, cosines_first: bool) -> Tensor:
    """Return sines and cosines of `values` [B] at `frequencies` [dim / 2]: float32 [B, dim]."""
    angles = values.astype(ms.float32)[:, None] * frequencies
    parts = (ops.cos(angles), ops.sin(angles)) if cosines_first else (ops.sin(angles), ops.cos(angles))
    return ops.concat(parts, axis=-1)
