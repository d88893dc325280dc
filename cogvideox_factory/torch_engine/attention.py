"""Attention behind one function, with every backend as an explicit pair of forward and backward.

`attention(q, k, v)` runs as one operator of our own, `cogvideox::attention_forward`, whatever kernel does the work.
So there is one name to keep under "save attention" checkpointing, one to count, and one that compilers see; lists of
kernel names miss some and then recompute attention unnoticed. The pair is explicit (output and log-sum-exp out, both
back in) so that a caller may recompute q and k in the backward pass instead of keeping them (see `rotary`).

Kernels: FlashAttention-3 (`flash_attn_interface`), cuDNN, FlashAttention-2 and memory-efficient attention as torch
has them, `npu_fusion_attention` on Ascend, torch's flash kernel for CPUs, and plain matrix products anywhere. The
choice is made once for each (device, dtype, head size, mask or none): the preferred kernels are tried in order on a
small problem, forward and backward, against plain matrix products, and the first that is right is taken and logged.
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
from cogvideox_factory.torch_engine import attention_math
from cogvideox_factory.torch_engine.linear import emulated

logger = logging.getLogger(__name__)
aten = torch.ops.aten

ENVIRONMENT_VARIABLE = "COGVIDEOX_ATTENTION"


def attention(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return softmax(q k^T / sqrt(K) + mask) v as [B, L, S, K], in memory [B, S, L, K] as projections read it.

    Args:
        q: [B, L, S, K]; views of a fused projection are welcome.
        k: [B, L, T, K].
        v: [B, L, T, K].
        mask: broadcastable to [B, L, S, T]; bool (True attends) or added to the scores. It gets no gradient, and
            every query must see some key.
    """
    rows = _swap(q, k, v)
    out = _Attention.apply(*rows, None if mask is None else additive(mask, q))
    return out.transpose(1, 2)  # pyright: ignore[reportOptionalMemberAccess]


def additive(mask: Tensor, q: Tensor) -> Tensor:
    """Return a bool or float `mask` as a term of the scores of `q`, in its dtype and with four axes."""
    mask = mask.view((1,) * (4 - mask.dim()) + mask.shape)
    if mask.dtype != torch.bool:
        return mask.to(q.dtype)
    return torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, float("-inf"))


def _swap(*tensors: Tensor) -> list[Tensor]:
    """Exchange the axes of heads and tokens."""
    return [x.transpose(1, 2) for x in tensors]


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


# --- the operator: tokens before heads, as projections give and take them ---------------------------------------------


@torch.library.custom_op("cogvideox::attention_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the output [B, S, L, K] and the log-sum-exp of the scores [B, L, S], at least float32.

    `q` is [B, S, L, K], `k` and `v` are [B, T, L, K], `mask` is additive or None.
    """
    out, lse = _choose(q, mask).run_forward(q, k, v, mask)
    return out.contiguous(), lse.contiguous()


@torch.library.register_fake("cogvideox::attention_forward")
def _(q, k, v, mask):
    batch, tokens, heads, _ = q.shape
    lse = q.new_empty(batch, heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


@torch.library.custom_op("cogvideox::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, each of its shape, contiguous, from that of the output [B, S, L, K]."""
    dq, dk, dv = _choose(q, mask).run_backward(grad, q, k, v, mask, out, lse)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()


@torch.library.register_fake("cogvideox::attention_backward")
def _(grad, q, k, v, mask, out, lse):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


SAVED_OPS = (torch.ops.cogvideox.attention_forward.default,)
"""What "save attention" checkpointing keeps."""


# --- the kernels ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class Backend:
    """A kernel: forward(q, k, v, mask) -> (out, lse), backward(grad, q, k, v, mask, out, lse) -> (dq, dk, dv).

    It takes tensors as [B, L, tokens, K], or as [B, tokens, L, K] with `tokens_first`; `lse` is [B, L, S] either way.
    """

    name: str
    device_types: tuple[str, ...]
    forward: Callable[..., tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, ...]]
    masks: bool = True
    half_only: bool = True
    tokens_first: bool = False
    package: str | None = None

    def fits(self, device_type: str, dtype: torch.dtype, *, masked: bool) -> bool:
        """Whether it may run there at all."""
        return (
            (not self.device_types or device_type in self.device_types)
            and (self.masks or not masked)
            and (not self.half_only or dtype in (torch.float16, torch.bfloat16))
            and (self.package is None or importlib.util.find_spec(self.package) is not None)
        )

    def run_forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Call `forward` with tensors [B, tokens, L, K]."""
        if self.tokens_first:
            return self.forward(q, k, v, mask)
        out, lse = self.forward(*_swap(q, k, v), mask)
        return out.transpose(1, 2), lse

    def run_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, out: Tensor, lse: Tensor
    ) -> tuple[Tensor, ...]:
        """Call `backward` with tensors [B, tokens, L, K]."""
        if self.tokens_first:
            return self.backward(grad, q, k, v, mask, out, lse)
        return tuple(_swap(*self.backward(*_swap(grad, q, k, v), mask, out.transpose(1, 2), lse)))


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

    out, lse, *_ = _flash_attn_forward(q, k, v, softmax_scale=q.shape[-1] ** -0.5)
    return out, lse


def _flash3_backward(grad, q, k, v, mask, out, lse):
    from flash_attn_interface import _flash_attn_backward  # pyright: ignore[reportMissingImports]

    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    _flash_attn_backward(
        grad, q, k, v, out, lse, dq=dq, dk=dk, dv=dv, softmax_scale=q.shape[-1] ** -0.5,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return dq, dk, dv


def _npu_forward(q, k, v, mask):
    import torch_npu  # pyright: ignore[reportMissingImports]

    out, top, total, *_ = torch_npu.npu_fusion_attention(
        q, k, v, q.shape[2], "BSND", atten_mask=_hidden(mask, q, k), scale=q.shape[-1] ** -0.5
    )
    # Maximum and sum come eight times over, [B, L, S, 8]; their log-sum-exp once is a sixteenth of that.
    return out, top[..., 0] + total[..., 0].log()


def _npu_backward(grad, q, k, v, mask, out, lse):
    import torch_npu  # pyright: ignore[reportMissingImports]

    top = lse.unsqueeze(-1).expand(*lse.shape, 8).contiguous()  # exp(s - lse) / 1 is the same softmax
    return torch_npu.npu_fusion_attention_grad(
        q, k, v, grad, q.shape[2], "BSND", atten_mask=_hidden(mask, q, k), softmax_max=top,
        softmax_sum=torch.ones_like(top), attention_in=out, scale_value=q.shape[-1] ** -0.5,
    )[:3]  # fmt: skip


def _hidden(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what Ascend's kernel must not see, bool [B, 1, S, T]; it has no additive masks."""
    return None if mask is None else (mask < 0)[:, :1].expand(q.shape[0], 1, q.shape[1], k.shape[1])


_MATH = Backend(
    name="math", device_types=(), forward=attention_math.forward, backward=attention_math.backward, half_only=False
)
_BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        Backend(
            name="fa3", device_types=("cuda",), forward=_flash3_forward, backward=_flash3_backward,
            masks=False, tokens_first=True, package="flash_attn_interface",
        ),
        Backend(name="cudnn", device_types=("cuda",), forward=_cudnn_forward, backward=_cudnn_backward),
        Backend(name="flash", device_types=("cuda",), forward=_flash_forward, backward=_flash_backward, masks=False),
        Backend(
            name="efficient", device_types=("cuda",), forward=_efficient_forward, backward=_efficient_backward,
            half_only=False,
        ),
        Backend(
            name="npu", device_types=("npu",), forward=_npu_forward, backward=_npu_backward, tokens_first=True,
            package="torch_npu",
        ),
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
                f"attention backend {wanted!r} cannot do {q.dtype} on {q.device.type}"
                f"{' with a mask' if masked else ''}. "
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
    if device.type == "cuda" and torch.are_deterministic_algorithms_enabled():
        order.remove("cudnn")  # called directly, it does not see the switch, and its backward adds in any order
    return [_BACKENDS[name] for name in order]


def _works(backend: Backend, q: Tensor, masked: bool) -> bool:
    """Try `backend` on a small problem against plain matrix products, forward and backward."""
    if backend.name == "cpu":
        return True  # always there, and held to the reference by tests
    with torch.inference_mode(False), torch.no_grad():
        # Two heads of an odd number of tokens, laid out as the model does; sines, so as not to touch any generator.
        wave = torch.arange(4 * 77 * 2 * q.shape[-1], device=q.device, dtype=torch.float32).mul(0.7).sin().to(q.dtype)
        one, two, three, grad = wave.view(4, 1, 77, 2, -1).unbind(0)
        mask = None
        if masked:
            mask = additive(torch.arange(77, device=q.device).view(1, 1, 1, 77) < 70, q)
        try:
            ours = [*backend.run_forward(one, two, three, mask)]
            ours += backend.run_backward(grad, one, two, three, mask, *ours)
        except (RuntimeError, TypeError, ImportError, AttributeError) as error:
            logger.warning("attention backend %s does not run here: %s", backend.name, str(error).split("\n")[0])
            return False
        theirs = [*_MATH.run_forward(one, two, three, mask)]
        theirs += _MATH.run_backward(grad, one, two, three, mask, *theirs)
    error = max((a.float() - b.float()).abs().max().item() for a, b in zip(ours, theirs, strict=True))
    if not error < 0.05:  # sines are at most 1; half precision leaves about 0.01
        logger.warning("attention backend %s is off by %.3g on a test problem and is not used", backend.name, error)
        return False
    return True
