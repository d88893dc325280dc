"""The VAE against the golden files of the other engine, in PyNative and in graphs, and what it promises beyond."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from dataclasses import replace

import mindspore as ms
import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError, MissingError, UnfitError
from cogvideox_factory.mindspore_engine.border import load_parameters, to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.vae import (
    CogVideoXVAE,
    pixels_from_uint8,
    sample_posterior,
    uint8_from_pixels,
)
from cogvideox_factory.tiny.layout import vae_shapes
from cogvideox_factory.weights import load_folder
from tests.golden import cases
from tests.mindspore_engine import parity


@pytest.fixture(scope="module")
def vae() -> CogVideoXVAE:
    return CogVideoXVAE.from_folder(cases.vae_folder())


@pytest.fixture
def own_vae() -> CogVideoXVAE:
    """One whose settings a test may change."""
    return CogVideoXVAE.from_folder(cases.vae_folder())


@pytest.fixture(scope="module")
def compiled_vae() -> CogVideoXVAE:
    return CogVideoXVAE.from_folder(cases.vae_folder(), mode=Mode(graph=True))


@pytest.mark.parametrize("frames", cases.VIDEO_FRAMES)
def test_every_frame_count(vae, frames):
    parity.hold(parity.frames(vae, frames))


@pytest.mark.parametrize("frames", cases.VIDEO_FRAMES)
def test_every_frame_count_in_graphs(compiled_vae, frames):
    parity.hold(parity.frames(compiled_vae, frames))


def test_so_it_is_in_graphs_of_level_1():
    parity.hold(parity.frames(CogVideoXVAE.from_folder(cases.vae_folder(), mode=parity.MODES["O1"]), 9))


def test_later_frame_batches_share_one_graph(compiled_vae, caplog):
    """81 frames are ten frame batches; MindSpore warns where it takes what went before for constants."""
    made = []
    coder = compiled_vae._encode_batch

    def counting(x, tails):
        made.append((x.shape, len(tails), isinstance(tails, tuple)))
        return coder(x, tails)

    compiled_vae._encode_batch = counting
    compiled_vae.encode(to_tensor(cases.pixels(81)))
    compiled_vae._encode_batch = coder
    assert len(made) == 10
    assert len(set(made)) == 2


def test_tiles(own_vae):
    frames, height, width, tiles = cases.TILED
    own_vae.enable_tiling(**tiles)
    parity.hold(parity.videos(own_vae, "tiled", cases.pixels(frames, height, width, 2), cases.latents(3, 6, 8, 2)))


def test_small_frames_are_not_tiled_and_tiling_can_be_switched_off(own_vae):
    pixels = to_tensor(cases.pixels(1))
    whole = to_array(own_vae.encode(pixels)[0])
    own_vae.enable_tiling()
    assert np.array_equal(whole, to_array(own_vae.encode(pixels)[0]))
    own_vae.enable_tiling(16, 16)
    assert not np.array_equal(whole, to_array(own_vae.encode(pixels)[0]))
    own_vae.disable_tiling()
    assert np.array_equal(whole, to_array(own_vae.encode(pixels)[0]))
    with pytest.raises(FactoryError, match="Use 96"):
        own_vae.enable_tiling(100)


def test_slicing_changes_nothing_but_what_is_coded_at_once(own_vae):
    pixels, latents = to_tensor(cases.pixels(5, batch=3)), to_tensor(cases.latents(2, batch=3))
    together = to_array(own_vae.encode(pixels)[0]), to_array(own_vae.decode(latents))
    own_vae.enable_slicing()
    sizes = []
    coder = own_vae._encode_batch
    own_vae._encode_batch = lambda x, tails: sizes.append(x.shape[0]) or coder(x, tails)
    apart = to_array(own_vae.encode(pixels)[0]), to_array(own_vae.decode(latents))
    assert set(sizes) == {1}
    for one, other in zip(together, apart):
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-5)


def test_larger_frame_batches(own_vae):
    """A still video has the same statistics in any batch of frames, so only rounding differs."""
    still = np.repeat(cases.pixels(1), 17, axis=2)
    expected = to_array(own_vae.encode(to_tensor(still))[0])
    own_vae.set_frame_batch(4)
    np.testing.assert_allclose(to_array(own_vae.encode(to_tensor(still))[0]), expected, rtol=0, atol=1e-5)
    moving = to_tensor(cases.pixels(17))
    larger = to_array(own_vae.encode(moving)[0])
    own_vae.set_frame_batch(2)
    assert np.abs(larger - to_array(own_vae.encode(moving)[0])).max() > 1e-4
    with pytest.raises(FactoryError, match="Use 2 or 4"):
        own_vae.set_frame_batch(3)


def test_quant_convolutions_are_products_of_channels(vae):
    """Identities change nothing; an exchange of mean and logvar exchanges them."""
    config = replace(vae.config, use_quant_conv=True, use_post_quant_conv=True)
    model, channels = CogVideoXVAE(config), config.latent_channels
    swap = np.roll(np.eye(2 * channels, dtype=np.float32), channels, axis=0)[..., None, None, None]
    extra = {
        "quant_conv.weight": swap, "quant_conv.bias": np.zeros(2 * channels, np.float32),
        "post_quant_conv.weight": 2 * np.eye(channels, dtype=np.float32)[..., None, None, None],
        "post_quant_conv.bias": np.ones(channels, np.float32),
    }  # fmt: skip
    load_parameters(model, (vae.to_arrays() | extra).items(), source="test")
    pixels, latents = to_tensor(cases.pixels(1)), cases.latents(1)
    for one, other in zip(model.encode(pixels), vae.encode(pixels)[::-1]):
        np.testing.assert_allclose(to_array(one), to_array(other), rtol=0, atol=1e-6)
    doubled = to_array(vae.decode(to_tensor(2 * latents + 1)))
    np.testing.assert_allclose(to_array(model.decode(to_tensor(latents))), doubled, rtol=0, atol=1e-6)


def test_names_and_folders_are_the_checkpoints(vae, tmp_path):
    assert {name: tuple(p.shape) for name, p in vae.parameters_and_names()} == vae_shapes(vae.config)
    assert not vae.trainable_params()
    vae.save(tmp_path / "vae")
    ours, theirs = load_folder(tmp_path / "vae"), load_folder(cases.vae_folder())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)


def test_float16_is_near(vae):
    half = CogVideoXVAE.from_folder(cases.vae_folder(), dtype=ms.float16)
    pixels = to_tensor(cases.pixels(9))
    mean, _ = half.encode(pixels)
    expected = to_array(vae.encode(pixels)[0])
    assert mean.dtype == ms.float16
    assert np.abs(to_array(mean) - expected).max() <= 1e-2 * np.abs(expected).max()


def test_pixels_and_samples():
    frames = draws.generator(0, "pixels").integers(0, 256, (1, 2, 8, 8, 3), dtype=np.uint8)
    pixels = pixels_from_uint8(to_tensor(frames))
    expected = frames.transpose(0, 4, 1, 2, 3).astype(np.float64) / 127.5 - 1
    np.testing.assert_allclose(to_array(pixels), expected, rtol=0, atol=1e-6)
    assert np.array_equal(to_array(uint8_from_pixels(pixels)), frames)
    assert to_array(uint8_from_pixels(to_tensor(np.full((1, 3, 1, 1, 1), 9.0, np.float32)))).max() == 255
    mean, noise = np.float32([1, 2, 3]), np.float32([1, -1, 2])
    logvar = np.float32([0, -100, np.log(4)])
    sampled = to_array(sample_posterior(*map(to_tensor, (mean, logvar, noise))))
    np.testing.assert_allclose(sampled, [2, 2 - np.exp(-15), 7], rtol=1e-6)


def test_wrong_input_and_wrong_folders_are_said(vae, tmp_path):
    with pytest.raises(FactoryError, match="Resize or crop to 16x24"):
        vae.encode(to_tensor(np.zeros((1, 3, 1, 17, 24), np.float32)))
    with pytest.raises(FactoryError, match="pixels_from_uint8"):
        vae.encode(to_tensor(np.zeros((1, 3, 1, 16, 24), np.uint8)))
    with pytest.raises(FactoryError, match="16 channels"):
        vae.decode(to_tensor(np.zeros((1, 16, 1, 2, 3), np.float32)))
    with pytest.raises(UnfitError, match="act_fn"):
        CogVideoXVAE(replace(vae.config, act_fn="gelu"))
    vae.save(tmp_path / "vae")
    (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(MissingError):
        CogVideoXVAE.from_folder(tmp_path / "vae")
