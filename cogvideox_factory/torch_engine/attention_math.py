"""Attention in plain matrix products, a head at a time: for devices without a kernel, and to hold kernels against.

Legend: B batch, L heads, S query tokens, T key tokens, K head size. Tensors are [B, L, tokens, K].
"""

import torch
from torch import Tensor


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output [B, L, S, K] and the log-sum-exp of the scores [B, L, S]; `mask` is additive."""
    scale = q.shape[-1] ** -0.5
    out, lse = torch.empty_like(q), []
    for head in range(q.shape[1]):  # one head at a time: all scores at once do not fit
        scores = _scores(q, k, mask, head, scale)
        lse.append(scores.logsumexp(-1))
        out[:, head] = (scores - lse[-1][..., None]).exp().to(v.dtype) @ v[:, head]
    return out, torch.stack(lse, dim=1)


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v: FlashAttention (arXiv 2205.14135), algorithm 4, without its tiling."""
    scale = q.shape[-1] ** -0.5
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    for head in range(q.shape[1]):
        p = (_scores(q, k, mask, head, scale) - lse[:, head, :, None]).exp()  # [B, S, T]
        dout = grad[:, head]
        dv[:, head] = p.to(v.dtype).mT @ dout
        delta = (dout.to(p.dtype) * out[:, head].to(p.dtype)).sum(-1, keepdim=True)  # D of the paper
        ds = (p * ((dout @ v[:, head].mT).to(p.dtype) - delta) * scale).to(q.dtype)
        dq[:, head], dk[:, head] = ds @ k[:, head], ds.mT @ q[:, head]
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, mask: Tensor | None, head: int, scale: float) -> Tensor:
    scores = (q[:, head] @ k[:, head].mT).to(torch.promote_types(q.dtype, torch.float32)) * scale
    return scores if mask is None else scores + mask.expand(-1, q.shape[1], -1, -1)[:, head]
