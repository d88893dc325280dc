"""Frame arithmetic: properties first, then the published table, then a real (tiny) diffusers VAE."""

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.diffusion.frames import (
    check_num_frames,
    check_size,
    decode_chunks,
    encode_chunks,
    latent_frames_for_model,
    num_decoded_frames,
    num_latent_frames,
)
from cogvideox_factory.errors import FactoryError

calm = settings(deadline=None, derandomize=True)

TABLE = {
    1: (1, 1), 2: (1, 1), 3: (1, 1), 4: (1, 1), 5: (2, 8), 8: (2, 8), 9: (3, 9), 13: (4, 16), 16: (4, 16),
    17: (5, 17), 49: (13, 49), 53: (14, 56), 77: (20, 80), 80: (20, 80), 81: (21, 81), 85: (22, 88),
    161: (41, 161),
}  # fmt: skip


@pytest.mark.parametrize(("frames", "expected"), TABLE.items())
def test_table(frames, expected):
    latents = num_latent_frames(frames)
    assert (latents, num_decoded_frames(latents)) == expected


@calm
@given(st.integers(1, 2000))
def test_only_8k_and_8k_plus_1_round_trip(frames):
    comes_back = num_decoded_frames(num_latent_frames(frames)) == frames
    assert comes_back == (frames % 8 in (0, 1))


@calm
@given(st.integers(1, 2000))
def test_chunks_cover_everything_once(frames):
    for chunks, size in ((encode_chunks(frames), 8), (decode_chunks(frames), 2)):
        assert chunks[0][0] == 0
        assert chunks[-1][1] == frames
        assert all(before[1] == after[0] for before, after in pairwise(chunks))
        assert all(stop - start == size for start, stop in chunks[1:])
        assert chunks[0][1] < 2 * size


@calm
@given(st.integers(1, 2000))
def test_chunks_and_closed_forms_agree(frames):
    """Each chunk halves (doubles) time twice, an odd count keeps its first frame; one frame stays one."""

    def double(count):
        if count == 1:
            return 1
        return 2 * count if count % 2 == 0 else 2 * count - 1

    halved = sum(math.ceil(math.ceil((stop - start) / 2) / 2) for start, stop in encode_chunks(frames))
    assert halved == num_latent_frames(frames)
    assert sum(double(double(stop - start)) for start, stop in decode_chunks(frames)) == num_decoded_frames(frames)


@calm
@given(st.integers(1, 2000), st.sampled_from([None, 1, 2, 3]))
def test_padding_is_the_least_that_fits(frames, patch_size_t):
    latents, padding = latent_frames_for_model(frames, patch_size_t)
    assert latents % (patch_size_t or 1) == 0
    assert latents - padding == num_latent_frames(frames)
    assert 0 <= padding < (patch_size_t or 1)


def test_padding_of_the_usual_counts():
    assert latent_frames_for_model(49, None) == (13, 0)
    assert latent_frames_for_model(81, 2) == (22, 1)
    assert latent_frames_for_model(161, 2) == (42, 1)
    assert latent_frames_for_model(77, 2) == (20, 0)


@calm
@given(st.integers(-3, 500), st.sampled_from([None, 2]))
def test_check_num_frames_suggests_what_it_accepts(frames, patch_size_t):
    try:
        check_num_frames(frames, patch_size_t=patch_size_t)
    except FactoryError as error:
        assert frames < 1 or (frames % 4 != 1 and frames % 8)
        text = str(error)
        assert f"num_frames={frames} " in text
        numbers = [int(word) for word in text.split("Use ")[1].split(" (")[0].split(" or ")]
        assert all(number % 8 == 1 for number in numbers)
        for number in numbers:
            check_num_frames(number, patch_size_t=patch_size_t)
        if frames > 0:
            assert numbers[0] < frames < numbers[-1]
    else:
        assert num_latent_frames(frames) == (frames + 3) // 4


@pytest.mark.parametrize("frames", [1, 5, 8, 9, 16, 49, 53, 77, 80, 81, 85, 161])
def test_usual_counts_are_accepted(frames):
    check_num_frames(frames, patch_size_t=None)
    check_num_frames(frames, patch_size_t=2)


def test_check_size():
    check_size(480, 720)
    check_size(768, 1360)
    check_size(16, 16)
    with pytest.raises(FactoryError, match=r"size 481x720 .*multiples of 16.*Nearest: 480x720"):
        check_size(481, 720)
    with pytest.raises(FactoryError, match="Nearest: 304x304"):
        check_size(300, 300)
    with pytest.raises(FactoryError, match="Nearest: 16x64"):
        check_size(0, 64)


def test_same_as_the_diffusers_vae():
    """A tiny VAE with random weights is run on the counts where the rule is surprising."""
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4), layers_per_block=1, norm_num_groups=2, latent_channels=2
    ).eval()
    with torch.no_grad():
        for frames in (1, 2, 4, 5, 8, 9, 13, 16, 17, 25):
            latents = vae.encode(torch.zeros(1, 3, frames, 8, 8)).latent_dist.mode()
            assert latents.shape[2] == num_latent_frames(frames), frames
        for latents in (1, 2, 3, 4, 5):
            video = vae.decode(torch.zeros(1, 2, latents, 1, 1)).sample
            assert video.shape[2] == num_decoded_frames(latents), latents
