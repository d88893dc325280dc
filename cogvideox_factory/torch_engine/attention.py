"""Attention behind one function, with every backend as an explicit pair of forward and backward.

`attention(q, k, v)` runs as one operator of our own, `cogvideox::attention_forward`, whatever kernel does the work.
So there is one name to keep under "save attention" checkpointing, one to count, and one that compilers see; lists of
kernel names miss some and then recompute attention unnoticed. The pair is explicit (output and log-sum-exp out, both
back in) so that a caller may recompute q and k in the backward pass instead of keeping them (see `fused`).

Kernels: FlashAttention-3 (`flash_attn_interface`), cuDNN, FlashAttention-2 and memory-efficient attention as torch
has them, `npu_fusion_attention` on Ascend, torch's flash kernel for CPUs, and plain matrix products anywhere. The
choice is made once for each (device, dtype, head size, mask or none): the preferred kernels are tried in order on a small
problem, forward and backward, against plain matrix products, and the first that is right is taken and logged.
`set_attention_backend(name)` or the variable COGVIDEOX_ATTENTION overrides it.

Legend: B batch, L heads, S query tokens, T key tokens, K head size.
"""

import importlib.util
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from cogvideox_factory.errors import FactoryError, MissingError, nearest
from cogvideox_factory.torch_engine.linear import emulated

logger = logging.getLogger(__name__)
aten = torch.ops.aten

ENVIRONMENT_VARIABLE = "COGVIDEOX_ATTENTION"


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + mask) v as [B, L, S, K], in memory [B, S, L, K].

    Args:
        q: [B, L, S, K]; views of a fused projection are welcome.
        k: [B, L, T, K].
        v: [B, L, T, K].
        mask: broadcastable to [B, L, S, T]; bool (True attends) or added to the scores. It gets no gradient, and
            every query must see some key.
    """
    return _Attention.apply(q, k, v, None if mask is None else additive(mask, q))  # pyright: ignore[reportReturnType]


def additive(mask: Tensor, q: Tensor) -> Tensor:
    """Return a bool or float `mask` as a term of the scores of `q`, in its dtype."""
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q, k, v, mask):
        out, lse = attention_forward(q, k, v, mask)
        ctx.save_for_backward(q, k, v, mask, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads):
        q, k, v, mask, out, lse = ctx.saved_tensors
        return *attention_backward(grads[0], q, k, v, mask, out, lse), None


# --- the operator -----------------------------------------------------------------------------------------------------


@torch.library.custom_op("cogvideox::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output [B, L, S, K] and the log-sum-exp of the scores [B, L, S] in float32."""
    out, lse = _choose(q, mask).forward(q, k, v, mask)
    return _rows_outside(out), lse.contiguous()


@attention_forward.register_fake
def _(q, k, v, mask):
    batch, heads, tokens, size = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(batch, tokens, heads, size).transpose(1, 2), lse


@torch.library.custom_op("cogvideox::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each as [B, L, tokens, K] in memory [B, tokens, L, K]."""
    grads = _choose(q, mask).backward(grad, q, k, v, mask, out, lse)
    dq, dk, dv = (_rows_outside(g) for g in grads)
    return dq, dk, dv


def _rows_outside(x: Tensor) -> Tensor:
    """Return `x` [B, L, S, K] in the one memory layout all kernels give here, [B, S, L, K]: projections read that."""
    _, heads, tokens, size = x.shape
    if x.stride() == (tokens * heads * size, size, heads * size, 1):
        return x
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@attention_backward.register_fake
def _(grad, q, k, v, mask, out, lse):
    def like(x):
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]).transpose(1, 2)

    return like(q), like(k), like(v)


SAVED_OPS = (torch.ops.cogvideox.attention_forward.default,)
"""What "save attention" checkpointing keeps."""


# --- the kernels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A kernel: forward(q, k, v, mask) -> (out, lse), backward(grad, q, k, v, mask, out, lse) -> (dq, dk, dv)."""

    name: str
    device_types: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    masks: bool = True
    half_only: bool = True
    package: str | None = None

    def fits(self, device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
        """Whether it may run there at all."""
        return (
            (not self.device_types or device_type in self.device_types)
            and (self.masks or not masked)
            and (not self.half_only or dtype in (torch.float16, torch.bfloat16))
            and (self.package is None or importlib.util.find_spec(self.package) is not None)
        )


def _cpu_forward(q, k, v, mask):
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask)


def _cpu_backward(grad, q, k, v, mask, out, lse):
    dtype = q.dtype
    if emulated(q):  # 10 times slower than in float32 without bfloat16 instructions
        grad, q, k, v, out = (x.float() for x in (grad, q, k, v, out))
        mask = mask if mask is None else mask.float()
    grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse, 0.0, False, attn_mask=mask
    )
    return tuple(g.to(dtype) for g in grads)


def _flash_forward(q, k, v, mask):
    return aten._scaled_dot_product_flash_attention(q, k, v)[:2]


def _flash_backward(grad, q, k, v, mask, out, lse):
    return aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, *_no_dropout(q)
    )


def _cudnn_forward(q, k, v, mask):
    out, lse = aten._scaled_dot_product_cudnn_attention(q, k, v, _whole(mask, q, k), True)[:2]
    return out, lse.view(q.shape[:3])  # some versions have a last axis of 1


def _cudnn_backward(grad, q, k, v, mask, out, lse):
    return aten._scaled_dot_product_cudnn_attention_backward(
        grad, q, k, v, out, lse.unsqueeze(-1), *_no_dropout(q), _whole(mask, q, k), None, None,
        q.shape[2], k.shape[2], 0.0, False,
    )  # fmt: skip


def _efficient_forward(q, k, v, mask):
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, _whole(mask, q, k), True)[:2]
    return out, lse.narrow(2, 0, q.shape[2])  # the kernel rounds the axis up to a multiple of 32


def _efficient_backward(grad, q, k, v, mask, out, lse):
    lse = F.pad(lse, (0, -lse.shape[2] % 32), value=float("inf"))
    return aten._scaled_dot_product_efficient_attention_backward(
        grad, q, k, v, _whole(mask, q, k), out, lse, *_no_dropout(q), 0.0, [True, True, True, False]
    )[:3]


def _no_dropout(q: Tensor) -> tuple[Tensor, Tensor]:
    """Return the seed and offset of a dropout that does not happen."""
    return q.new_zeros(2, dtype=torch.int64), q.new_zeros((), dtype=torch.int64)


def _whole(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Expand an additive mask to [B, L, S, T], rows starting at multiples of 16 bytes as the kernels want."""
    if mask is None:
        return None
    keys = k.shape[2]
    return F.pad(mask, (0, -keys % 16)).narrow(-1, 0, keys).expand(*q.shape[:3], keys)


def _flash3_forward(q, k, v, mask):
    from flash_attn_interface import _flash_attn_forward  # pyright: ignore[reportMissingImports]

    out, lse, *_ = _flash_attn_forward(*_rows_first(q, k, v), softmax_scale=q.shape[-1] ** -0.5)
    return out.transpose(1, 2), lse


def _flash3_backward(grad, q, k, v, mask, out, lse):
    from flash_attn_interface import _flash_attn_backward  # pyright: ignore[reportMissingImports]

    grad, q, k, v, out = _rows_first(grad, q, k, v, out)
    grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
    _flash_attn_backward(
        grad, q, k, v, out, lse, dq=grads[0], dk=grads[1], dv=grads[2], softmax_scale=q.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return tuple(g.transpose(1, 2) for g in grads)


def _rows_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]  # [B, tokens, L, K]


def _npu_forward(q, k, v, mask):
    import torch_npu  # pyright: ignore[reportMissingImports]

    out, top, total, *_ = torch_npu.npu_fusion_attention(
        *_rows_first(q, k, v), q.shape[1], "BSND", atten_mask=_hidden(mask, q, k), scale=q.shape[-1] ** -0.5
    )
    # Maximum and sum come eight times over, [B, L, S, 8]; their log-sum-exp once is a sixteenth of that.
    return out.transpose(1, 2), top[..., 0] + total[..., 0].log()


def _npu_backward(grad, q, k, v, mask, out, lse):
    import torch_npu  # pyright: ignore[reportMissingImports]

    top = lse.unsqueeze(-1).expand(*lse.shape, 8).contiguous()  # exp(s - lse) / 1 is the same softmax
    grads = torch_npu.npu_fusion_attention_grad(
        *_rows_first(q, k, v, grad), q.shape[1], "BSND", atten_mask=_hidden(mask, q, k), softmax_max=top,
        softmax_sum=torch.ones_like(top), attention_in=_rows_first(out)[0], scale_value=q.shape[-1] ** -0.5,
    )  # fmt: skip
    return tuple(g.transpose(1, 2) for g in grads[:3])


def _hidden(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what Ascend's kernel must not see, bool [B, 1, S, T]; it has no additive masks."""
    return None if mask is None else (mask < 0)[:, :1].expand(q.shape[0], 1, q.shape[2], k.shape[2])


def _math_forward(q, k, v, mask):
    scale = q.shape[-1] ** -0.5
    out, lse = torch.empty_like(q), []
    for head in range(q.shape[1]):  # one head at a time: all scores at once do not fit
        scores = _scores(q, k, mask, head, scale)
        lse.append(scores.logsumexp(-1))
        out[:, head] = (scores - lse[-1][..., None]).exp().to(v.dtype) @ v[:, head]
    return out, torch.stack(lse, dim=1)


def _math_backward(grad, q, k, v, mask, out, lse):
    """Differentiate softmax attention as in FlashAttention (arXiv 2205.14135), algorithm 4, without its tiling."""
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


_MATH = Backend(name="math", device_types=(), forward=_math_forward, backward=_math_backward, half_only=False)
_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="fa3", device_types=("cuda",), forward=_flash3_forward, backward=_flash3_backward,
            masks=False, package="flash_attn_interface",
        ),
        Backend(name="cudnn", device_types=("cuda",), forward=_cudnn_forward, backward=_cudnn_backward),
        Backend(name="flash", device_types=("cuda",), forward=_flash_forward, backward=_flash_backward, masks=False),
        Backend(
            name="efficient", device_types=("cuda",), forward=_efficient_forward, backward=_efficient_backward,
            half_only=False,
        ),
        Backend(name="npu", device_types=("npu",), forward=_npu_forward, backward=_npu_backward, package="torch_npu"),
        Backend(
            name="cpu", device_types=("cpu",), forward=_cpu_forward, backward=_cpu_backward, half_only=False,
        ),
        _MATH,
    )
}  # fmt: skip


# --- the choice -------------------------------------------------------------------------------------------------------

_forced: str | None = None
_chosen: dict[tuple[str, torch.dtype, int, bool], Backend] = {}


def set_attention_backend(name: str | None) -> None:
    """Use the backend `name` from now on wherever it fits; None returns to the choice by trial.

    Raises:
        FactoryError: an unknown name.
        MissingError: its package is not installed.
    """
    global _forced
    if name is not None and name not in _BACKENDS:
        raise FactoryError(
            f"attention backend {name!r}{nearest(name, list(_BACKENDS))}: there are {', '.join(_BACKENDS)}."
        )
    package = _BACKENDS[name].package if name is not None else None
    if package is not None and importlib.util.find_spec(package) is None:
        raise MissingError(f"attention backend {name!r} needs the package {package}, which is not installed.")
    _forced = name
    _chosen.clear()


def backend_name(device: torch.device | None = None, dtype: torch.dtype | None = None, head_dim: int = 64) -> str:
    """Return the backend that unmasked attention uses on `device` (the accelerator, if there is one, by default)."""
    if device is None:
        device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    return _choose(torch.empty(1, 1, 1, head_dim, device=device, dtype=dtype), None).name


def _choose(q: Tensor, mask: Tensor | None) -> Backend:
    key = (q.device.type, q.dtype, q.shape[-1], mask is not None)
    if key not in _chosen:
        _chosen[key] = _pick(q, masked=mask is not None)
        logger.info("attention on %s, %s, head size %d: %s", *key[:3], _chosen[key].name)
    return _chosen[key]


def _pick(q: Tensor, *, masked: bool) -> Backend:
    wanted = _forced or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if wanted is not None:
        if wanted not in _BACKENDS:
            set_attention_backend(wanted)  # raises, and names the choices
        if not _BACKENDS[wanted].fits(q.device.type, q.dtype, masked=masked):
            raise FactoryError(
                f"attention backend {wanted!r} cannot do {q.dtype} on {q.device.type}{' with a mask' if masked else ''}. "
                f"Unset {ENVIRONMENT_VARIABLE}, or choose one of {', '.join(_BACKENDS)}."
            )
        return _BACKENDS[wanted]
    for backend in _preferred(q.device):
        if backend is _MATH or (backend.fits(q.device.type, q.dtype, masked=masked) and _works(backend, q, masked)):
            return backend
    return _MATH


def _preferred(device: torch.device) -> list[Backend]:
    """Return the backends, the fastest first: before Hopper, torch's flash kernel beats cuDNN's."""
    order = list(_BACKENDS)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        order = ["flash", "cudnn", "efficient", "math"]
    return [_BACKENDS[name] for name in order]


def _works(backend: Backend, q: Tensor, masked: bool) -> bool:
    """Try `backend` on a small problem against plain matrix products, forward and backward."""
    if backend.name == "cpu":
        return True  # always there, and held to the reference by tests
    with torch.inference_mode(False), torch.no_grad():
        # Two heads of an odd number of tokens, laid out as the model does; sines, so as not to touch any generator.
        wave = torch.arange(4 * 77 * 2 * q.shape[-1], device=q.device, dtype=torch.float32).mul(0.7).sin().to(q.dtype)
        one, two, three, grad = wave.view(4, 1, 77, 2, -1).transpose(2, 3).unbind(0)
        mask = None
        if masked:
            mask = additive(torch.arange(77, device=q.device).view(1, 1, 1, 77) < 70, q)
        try:
            ours = [*backend.forward(one, two, three, mask)]
            ours += backend.backward(grad, one, two, three, mask, *ours)
        except (RuntimeError, TypeError, ImportError, AttributeError) as error:
            logger.warning("attention backend %s does not run here: %s", backend.name, str(error).split("\n")[0])
            return False
        theirs = [*_math_forward(one, two, three, mask)]
        theirs += _math_backward(grad, one, two, three, mask, *theirs)
    error = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    if not error < 0.05:  # sines are at most 1; half precision leaves about 0.01
        logger.warning("attention backend %s is off by %.3g on a test problem and is not used", backend.name, error)
        return False
    return True
