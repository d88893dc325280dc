"""Convolutions of the causal VAE: the same sums as the checkpoint's layers, taken in a cheaper order.

Everything is channels-last, `[B, T, H, W, C]`: a run of frames is then a batch of images without a copy, a 1x1x1
convolution is a plain matrix product, and padding in time is two frames in front. Besides the direct form:

- `winograd4`, `winograd2`: 3 taps in time with 6 products for 4 frames instead of 12, or 4 for 2 instead of 6. Lavin
  & Gray, "Fast algorithms for convolutional neural networks" (arXiv 1509.09308); products are image convolutions.
- `doubled`: input frames that come in equal pairs (they were just upsampled in time) need 3 products for 2 frames.
- `subpixel`: nearest 2x upsampling and a 3x3 convolution is four 2x2 convolutions of the small image, 16 products
  instead of 36. Each output pixel's 3x3 window covers only 2x2 different small pixels (Shi et al., arXiv 1609.07009).
- `still`: a single frame, whose causal padding is the frame itself, needs one product.

Half-precision kernels are rearranged in float32 and rounded once. `padding` says how many rows and columns of zeros
surround a picture: one of each, or no rows where the input brings the row above and the row below with it.
"""

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

# Legend: B batch, T frames of a chunk, H W height and width, I O input and output channels.

ALL_AROUND = (1, 1)
"""Padding in height and width of a whole picture."""

LARGEST = 2**30
"""Input elements one 3-D convolution may take; libraries index with 32 bits, and their workspace grows with it."""

_WORKING_SET = 2**20
"""Elements that `winograd` transforms at a time, so that intermediate results stay in the CPU's caches."""


def conv_frames(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] = ALL_AROUND,
) -> Tensor:
    """Convolve each frame of `x` [B, T, H, W, I] with `weight` [O, I, k, k]; return [B, T, H', W', O]."""
    images = x.flatten(0, 1).permute(0, 3, 1, 2)  # [B*T, I, H, W], channels-last in memory
    out = F.conv2d(images, weight, bias, stride=stride, padding=padding)
    return out.permute(0, 2, 3, 1).unflatten(0, x.shape[:2])  # [B, T, H', W', O]


def direct(padded: Tensor, weight: Tensor, bias: Tensor, *, padding: tuple[int, int] = ALL_AROUND) -> Tensor:
    """Convolve `padded` [B, 2 + T, H, W, I] with `weight` [O, I, 3, 3, 3]; return [B, T, H, W, O]."""
    frames = padded.shape[1] - 2
    parts = -(-padded.numel() // LARGEST)
    if parts == 1:
        return _conv3d(padded, weight, bias, padding)
    step = -(-frames // parts)
    outs = [_conv3d(padded[:, t : t + step + 2], weight, bias, padding) for t in range(0, frames, step)]
    return torch.cat(outs, dim=1)


def _conv3d(padded: Tensor, weight: Tensor, bias: Tensor, padding: tuple[int, int]) -> Tensor:
    out = F.conv3d(padded.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, *padding))
    return out.permute(0, 2, 3, 4, 1)  # [B, T, H, W, O]


def still_kernel(weight: Tensor) -> Tensor:
    """Return the 3x3 kernel [O, I, 3, 3] that `weight` [O, I, 3, 3, 3] is for a frame repeated in time."""
    return _store(_wide(weight).sum(2), weight)


def winograd2_kernels(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the four 3x3 kernels [O, I, 3, 3] of `winograd2` for `weight` [O, I, 3, 3, 3]."""
    g0, g1, g2 = _wide(weight).unbind(2)
    ends = g0 + g2
    return tuple(_store(k, weight) for k in (g0, (ends + g1) / 2, (ends - g1) / 2, g2))


def winograd2(
    padded: Tensor,
    kernels: tuple[Tensor, ...],
    bias: Tensor,
    out: Tensor,
    *,
    add: bool,
    padding: tuple[int, int] = ALL_AROUND,
) -> None:
    """Convolve `padded` [B, 2 + T, H, W, I], T even, into `out` [B, T, H, W, O], or add to what is there.

    F(2, 3): with input frames d0..d3, taps g0..g2 and outputs y0 = d0 g0 + d1 g1 + d2 g2, y1 one frame later,
    m0 = (d0 - d2) g0, m1 = (d1 + d2) (g0 + g1 + g2) / 2, m2 = (d2 - d1) (g0 - g1 + g2) / 2, m3 = (d1 - d3) g2,
    y0 = m0 + m1 + m2, y1 = m1 - m2 - m3.
    """
    conv = partial(conv_frames, padding=padding)
    for (d0, d1, d2, d3), (y0, y1) in _windows(padded, out, 2):
        m1 = conv(d1 + d2, kernels[1], bias)
        m2 = conv(d2 - d1, kernels[2])
        sum12, difference12 = m1 + m2, m1.sub_(m2)
        _deliver(sum12, conv(d0 - d2, kernels[0]), y0, add=add)
        _deliver(difference12, conv(d3 - d1, kernels[3]), y1, add=add)


def winograd4_kernels(weight: Tensor) -> tuple[Tensor, ...]:
    """Return the six 3x3 kernels [O, I, 3, 3] of `winograd4` for `weight` [O, I, 3, 3, 3]."""
    g0, g1, g2 = _wide(weight).unbind(2)
    ends, far = g0 + g2, g0 + 4 * g2
    middle = ((ends + g1) / -6, (ends - g1) / -6, (far + 2 * g1) / 24, (far - 2 * g1) / 24)
    return tuple(_store(k, weight) for k in (g0 / 4, *middle, g2))


def winograd4(
    padded: Tensor,
    kernels: tuple[Tensor, ...],
    bias: Tensor,
    out: Tensor,
    *,
    add: bool,
    padding: tuple[int, int] = ALL_AROUND,
) -> None:
    """Do as `winograd2` for T a multiple of 4, with F(4, 3): six products for four frames.

    Lavin & Gray, section 4.3; terms that rows of their transforms share are computed once. The rounding error is
    about three times that of the direct sum.
    """
    conv = partial(conv_frames, padding=padding)
    for (d0, d1, d2, d3, d4, d5), (y0, y1, y2, y3) in _windows(padded, out, 4):
        even, odd = torch.sub(d4, d2, alpha=4), torch.sub(d3, d1, alpha=4)
        m1 = conv(even + odd, kernels[1], bias)
        m2 = conv(even.sub_(odd), kernels[2])
        sum12, difference12 = m1 + m2, m1.sub_(m2)
        torch.sub(d4, d2, out=even)
        torch.sub(d3, d1, out=odd)
        m3 = conv(torch.add(even, odd, alpha=2), kernels[3])
        m4 = conv(torch.sub(even, odd, alpha=2), kernels[4])
        sum34, difference34 = torch.add(m3, m4, out=m2), m3.sub_(m4)
        _deliver(difference12, difference34, y1, add=add, alpha=2)
        _deliver(sum12, sum34, y2, add=add, alpha=4)
        m0 = conv(even.add_(d0, alpha=4).sub_(d2, alpha=4), kernels[0])
        _deliver(m0, sum12.add_(sum34), y0, add=add)
        m5 = conv(torch.sub(d5, d3).sub_(odd, alpha=4), kernels[5])
        _deliver(m5, difference12.add_(difference34, alpha=8), y3, add=add)


def _windows(padded: Tensor, out: Tensor, size: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield the input frames d0, d1, … and output frames y0, y1, … of some outputs' windows of `size` at a time."""
    assert out.shape[1] % size == 0
    assert padded.shape[1] == out.shape[1] + 2
    image = max(padded[:, 0].numel(), out[:, 0].numel())
    step = size * max(1, _WORKING_SET // image)
    for start in range(0, out.shape[1], step):
        stop = min(start + step, out.shape[1])
        inputs = [padded[:, start + i : stop + max(0, i + 1 - size) : size] for i in range(size + 2)]
        yield inputs, [out[:, start + i : stop : size] for i in range(size)]


def _deliver(a: Tensor, b: Tensor, target: Tensor, *, add: bool, alpha: float = 1) -> None:
    """Write a + alpha * b into `target`, or add it to what is there."""
    if add:
        target.add_(a).add_(b, alpha=alpha)
    else:
        torch.add(a, b, alpha=alpha, out=target)


def doubled_kernels(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return the kernels of `doubled` for `weight` [O, I, 3, 3, 3]: [O, I, 3, 3] and [2 * O, I, 3, 3]."""
    first, middle, last = _wide(weight).unbind(2)
    return _store(first + middle + last, weight), _store(torch.cat([first + middle, first]), weight)


def doubled(
    padded: Tensor,
    kernels: tuple[Tensor, Tensor],
    bias: Tensor,
    out: Tensor,
    *,
    padding: tuple[int, int] = ALL_AROUND,
) -> None:
    """Convolve frames that stand for two equal ones each: `padded` [B, 1 + n, H, W, I] into `out` [B, T, H, W, O].

    T is 2 n, or 2 n - 1 when the very first frame stands for itself. With frames u, their differences
    e[i] = u[i] - u[i - 1] and taps g0..g2, the pair of outputs i is u[i] (g0 + g1 + g2) - e[i] (g0 + g1) and
    u[i] (g0 + g1 + g2) - e[i] g0.
    """
    single = out.shape[1] % 2
    steady = conv_frames(padded[:, 1:], kernels[0], bias, padding=padding)  # [B, n, H, W, O]
    if single:
        out[:, 0] = steady[:, 0]
        steady = steady[:, 1:]
    change = conv_frames(padded[:, 1 + single :] - padded[:, single:-1], kernels[1], padding=padding)
    early, late = change.chunk(2, dim=-1)  # [B, n - single, H, W, O] each
    pairs = out[:, single:].unflatten(1, (-1, 2))  # [B, n - single, 2, H, W, O]
    torch.sub(steady, early, out=pairs[:, :, 0])
    torch.sub(steady, late, out=pairs[:, :, 1])


def subpixel_kernels(weight: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the 2x2 kernels [O, I, 2, 2] by parity of output row and column for `weight` [O, I, 3, 3]."""

    def halves(kernel: Tensor, dim: int) -> tuple[Tensor, Tensor]:
        a, b, c = kernel.unbind(dim)
        return torch.stack([a, b + c], dim), torch.stack([a + b, c], dim)

    upper, lower = halves(_wide(weight), 2)
    (a, b), (c, d) = halves(upper, 3), halves(lower, 3)
    return (_store(a, weight), _store(b, weight)), (_store(c, weight), _store(d, weight))


def subpixel(
    x: Tensor,
    kernels: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
    bias: Tensor,
    out: Tensor,
    *,
    padding: tuple[int, int] = ALL_AROUND,
) -> None:
    """Upsample `x` [B, T, H, W, I] two times (nearest) and convolve it 3x3 into `out` [B, T, 2 H, 2 W, O]."""
    height, width = out.shape[2] // 2, out.shape[3] // 2
    pixels = out.unflatten(3, (width, 2)).unflatten(2, (height, 2))  # [B, T, H, 2, W, 2, O]
    for row in range(2):
        for column in range(2):
            part = conv_frames(x, kernels[row][column], bias, padding=padding)  # [B, T, H + 1, W + 1, O]
            pixels[:, :, :, row, :, column] = part[:, :, row : row + height, column : column + width]


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def _store(kernel: Tensor, like: Tensor) -> Tensor:
    return kernel.to(like.dtype).contiguous(memory_format=torch.channels_last)
