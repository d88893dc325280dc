"""Every form of a convolution in `vae_conv` is the plain 3-D convolution, up to rounding."""

import pytest
import torch
import torch.nn.functional as F

from cogvideox_factory.torch_engine import vae_conv

EXACT = 1e-12  # float64: only an error in the algebra is larger


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def conv3d(padded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return F.conv3d(padded.permute(0, 4, 1, 2, 3), weight, bias, padding=(0, 1, 1)).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize(("frames", "form"), [(2, 2), (6, 2), (4, 4), (8, 4), (12, 4)])
@pytest.mark.parametrize("add", [False, True])
def test_winograd_is_the_convolution(frames: int, form: int, add: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_conv, "_WORKING_SET", 2 * 6 * 5 * 4 * 2)  # two windows at a time, the last one alone
    padded, weight, bias = draw(2, frames + 2, 6, 5, 3), draw(4, 3, 3, 3, 3), draw(4)
    out = draw(2, frames, 6, 5, 4)
    expected = conv3d(padded, weight, bias) + (out if add else 0)
    if form == 4:
        vae_conv.winograd4(padded, vae_conv.winograd4_kernels(weight), bias, out, add=add)
    else:
        vae_conv.winograd2(padded, vae_conv.winograd2_kernels(weight), bias, out, add=add)
    torch.testing.assert_close(out, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("single", [False, True])
def test_doubled_frames_are_told_apart(single: bool) -> None:
    count = 5 if single else 4
    padded, weight, bias = draw(2, 1 + count, 6, 5, 3), draw(4, 3, 3, 3, 3), draw(4)
    if single:  # the very first frame: what lies before it is itself
        padded[:, 0] = padded[:, 1]
        full = torch.cat([padded[:, :1], padded[:, :1], padded[:, 1:2], padded[:, 2:].repeat_interleave(2, 1)], 1)
    else:
        full = torch.cat([padded.repeat_interleave(2, 1)], 1)
    expected = conv3d(full, weight, bias)
    out = torch.empty_like(expected)
    vae_conv.doubled(padded, vae_conv.doubled_kernels(weight), bias, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=EXACT)


def test_subpixel_is_upsampling_then_convolution() -> None:
    x, weight, bias = draw(2, 3, 6, 5, 3), draw(4, 3, 3, 3), draw(4)
    large = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = vae_conv.conv_frames(large, weight, bias)
    out = torch.empty_like(expected)
    vae_conv.subpixel(x, vae_conv.subpixel_kernels(weight), bias, out)
    torch.testing.assert_close(out, expected, rtol=0, atol=EXACT)


def test_still_frame_needs_one_product() -> None:
    x, weight, bias = draw(2, 1, 6, 5, 3), draw(4, 3, 3, 3, 3), draw(4)
    out = vae_conv.conv_frames(x, vae_conv.still_kernel(weight), bias)
    torch.testing.assert_close(out, conv3d(x.expand(-1, 3, -1, -1, -1), weight, bias), rtol=0, atol=EXACT)


@pytest.mark.parametrize("largest", [100, 700, 10**9])
def test_direct_splits_time_without_a_seam(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae_conv, "LARGEST", largest)
    padded, weight, bias = draw(1, 9, 6, 5, 3), draw(4, 3, 3, 3, 3), draw(4)
    out = vae_conv.direct(padded, weight, bias)
    torch.testing.assert_close(out, conv3d(padded, weight, bias), rtol=0, atol=EXACT)


def test_half_precision_kernels_are_rounded_once() -> None:
    weight = draw(2, 2, 3, 3, 3).to(torch.bfloat16)
    exact = weight.double().sum(2)
    assert (vae_conv.still_kernel(weight).double() - exact).abs().max() <= exact.abs().max() * 2**-9
