"""Position tables: structure and symmetries first, then equality with diffusers at native and other sizes."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cogvideox_factory.diffusion.positions import added_positions, rotary_table, sincos_table, token_grid
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED

calm = settings(deadline=None, derandomize=True)

T_2B = replace(PUBLISHED["cogvideox-2b"].transformer, num_attention_heads=2)
T_5B = PUBLISHED["cogvideox-5b"].transformer
T_I2V = PUBLISHED["cogvideox-5b-i2v"].transformer
T_15 = PUBLISHED["cogvideox1.5-5b"].transformer
HEAD_DIMS = (64, 96, 128)

frames = st.integers(1, 9)
sides = st.integers(1, 24).map(lambda n: 2 * n)


@settings(calm, max_examples=30)
@given(st.sampled_from([T_5B, T_15]), st.sampled_from(HEAD_DIMS), frames, sides, sides)
def test_rotary_table_is_a_rotation_per_token(config, head_dim, num_frames, height, width):
    config = replace(config, attention_head_dim=head_dim)
    cos, sin = rotary_table(config, num_frames, height, width)
    tokens = int(np.prod(token_grid(config, num_frames, height, width)))
    assert cos.shape == sin.shape == (tokens, head_dim // 2)
    assert cos.dtype == sin.dtype == np.float32
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=3e-7)


@settings(calm, max_examples=30)
@given(st.sampled_from([T_5B, T_15]), frames, sides, sides)
def test_rotary_axes_are_separate(config, num_frames, height, width):
    """The time columns depend on the frame only, the next on the row only, the last on the column only."""
    grid = token_grid(config, num_frames, height, width)
    for table in rotary_table(config, num_frames, height, width):
        table = table.reshape(*grid, 32)
        time, rows, columns = table[..., :8], table[..., 8:20], table[..., 20:]
        np.testing.assert_array_equal(time, np.broadcast_to(time[:, :1, :1], time.shape))
        np.testing.assert_array_equal(rows, np.broadcast_to(rows[:1, :, :1], rows.shape))
        np.testing.assert_array_equal(columns, np.broadcast_to(columns[:1, :1], columns.shape))


def test_slice_tables_are_cut_from_one():
    """With integer positions a smaller video has the corner of a larger one's table."""
    large = rotary_table(T_15, 8, 40, 60)[0].reshape(4, 20, 30, 32)
    small = rotary_table(T_15, 4, 16, 24)[0].reshape(2, 8, 12, 32)
    np.testing.assert_array_equal(small, large[:2, :8, :12])


def test_native_linspace_is_integers():
    """At its own size a 1.0 model and a model with integer positions agree bit for bit."""
    sliced = replace(T_5B, patch_size_t=1)
    for ours, other in zip(rotary_table(T_5B, 13, 60, 90), rotary_table(sliced, 13, 60, 90)):
        np.testing.assert_array_equal(ours, other)


def test_first_token_of_the_native_grid_is_unrotated():
    cos, sin = rotary_table(T_5B, 13, 60, 90)
    np.testing.assert_array_equal(cos[0], 1)
    np.testing.assert_array_equal(sin[0], 0)


def diffusers_rotary(config, num_frames, height, width):
    """Call diffusers as its pipelines do; every second column, because it stores each angle twice."""
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import get_3d_rotary_pos_embed
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    p, p_t = config.patch_size, config.patch_size_t
    grid, base = (height // p, width // p), (config.sample_height // p, config.sample_width // p)
    if p_t is None:
        crops = get_resize_crop_region_for_grid(grid, base[1], base[0])
        table = get_3d_rotary_pos_embed(config.attention_head_dim, crops, grid, num_frames)
    else:
        table = get_3d_rotary_pos_embed(
            config.attention_head_dim,
            None,
            grid,
            (num_frames + p_t - 1) // p_t,
            grid_type="slice",
            max_size=base,
        )
    for part in table:
        np.testing.assert_array_equal(part[:, ::2], part[:, 1::2])
    return [part[:, ::2].numpy() for part in table]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "size", [(13, 60, 90), (13, 32, 48), (5, 96, 60), (2, 16, 160), (7, 62, 94), (1, 2, 2), (3, 2, 160)]
)
def test_rotary_1_0_equals_diffusers(head_dim, size):
    config = replace(T_5B, attention_head_dim=head_dim)
    for ours, theirs in zip(rotary_table(config, *size), diffusers_rotary(config, *size)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-7)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("size", [(22, 96, 170), (21, 40, 60), (4, 300, 20), (1, 2, 2)])
def test_rotary_1_5_equals_diffusers(head_dim, size):
    """1e-6: at position 149 one float32 ulp of a frequency moves the angle by that much."""
    config = replace(T_15, attention_head_dim=head_dim)
    for ours, theirs in zip(rotary_table(config, *size), diffusers_rotary(config, *size)):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)


def test_grid_larger_than_the_checkpoints():
    older = replace(T_15, sample_height=96, sample_width=170)
    rotary_table(older, 2, 96, 170)
    with pytest.raises(FactoryError, match=r"size 784x1360 .*49x85 tokens.*end at 48x85.*Use at most 768x1360"):
        rotary_table(older, 2, 98, 170)
    with pytest.raises(FactoryError, match="Use at most 2400x2400"):
        rotary_table(T_15, 2, 96, 302)


def test_size_the_patches_do_not_divide():
    for table in (rotary_table, sincos_table):
        with pytest.raises(FactoryError, match=r"latent size 61x90 \(video 488x720\).*multiples of 16"):
            table(T_2B, 2, 61, 90)


def diffusers_patch_embed(config):
    pytest.importorskip("diffusers")
    from diffusers.models.embeddings import CogVideoXPatchEmbed

    return CogVideoXPatchEmbed(
        in_channels=config.in_channels, embed_dim=config.width, text_embed_dim=4,
        sample_height=config.sample_height, sample_width=config.sample_width,
        sample_frames=config.sample_frames,
        max_text_seq_length=config.max_text_seq_length,
        spatial_interpolation_scale=config.spatial_interpolation_scale,
        temporal_interpolation_scale=config.temporal_interpolation_scale,
        use_positional_embeddings=not config.use_rotary_positional_embeddings,
        use_learned_positional_embeddings=config.use_learned_positional_embeddings,
    )  # fmt: skip


@pytest.mark.parametrize("size", [(13, 60, 90), (5, 32, 60), (1, 90, 20), (21, 4, 6)])
@pytest.mark.parametrize("scales", [(1.875, 1.0), (1.0, 1.5)])
def test_sincos_equals_diffusers(size, scales):
    """Theirs is float64; ours is that, rounded to float32 (half an ulp below 1 is 3e-8)."""
    config = replace(T_2B, spatial_interpolation_scale=scales[0], temporal_interpolation_scale=scales[1])
    num_frames, height, width = size
    theirs = diffusers_patch_embed(config)._get_positional_embeddings(height, width, (num_frames - 1) * 4 + 1)[0]
    ours = sincos_table(config, *size)
    assert ours.dtype == np.float32
    assert (theirs[:226] == 0).all()
    np.testing.assert_allclose(ours, theirs[226:], rtol=0, atol=3.1e-8)


def test_sincos_of_a_real_width_is_bounded_and_distinct():
    table = sincos_table(PUBLISHED["cogvideox-2b"].transformer, 2, 8, 12)
    assert table.shape == (48, 1920)
    assert np.abs(table).max() <= 1
    assert len(np.unique(table, axis=0)) == 48


def test_what_each_variant_adds():
    native = (13, 60, 90)
    kinds = {name: added_positions(facts.transformer, *native) for name, facts in PUBLISHED.items()}
    assert kinds == {
        "cogvideox-2b": "sincos", "cogvideox-5b": "none", "cogvideox-5b-i2v": "learned",
        "cogvideox1.5-5b": "none", "cogvideox1.5-5b-i2v": "none",
    }  # fmt: skip


def test_learned_positions_of_other_sizes():
    assert added_positions(T_I2V, 7, 60, 90) == "sincos"
    with pytest.raises(FactoryError, match=r"size 512x512 .*only at 480x720.*ignore the learned positions"):
        added_positions(T_I2V, 13, 64, 64)
    assert added_positions(replace(T_I2V, use_learned_positional_embeddings=False), 13, 64, 64) == "none"


def test_learned_positions_are_used_as_diffusers_uses_them():
    """The buffer at the native grid, sin-cos at another frame count, an error at another height or width."""
    torch = pytest.importorskip("torch")
    config = replace(
        T_I2V, num_attention_heads=2, in_channels=2, sample_height=4, sample_width=6, sample_frames=9,
        max_text_seq_length=3,
    )  # fmt: skip
    embed = diffusers_patch_embed(config).double()
    for parameter in embed.parameters():
        torch.nn.init.zeros_(parameter)
    torch.manual_seed(0)
    embed.pos_embedding.normal_()

    def added(num_frames, height, width):
        return embed(torch.zeros(1, 3, 4).double(), torch.zeros(1, num_frames, 2, height, width).double())[0]

    assert added_positions(config, 3, 4, 6) == "learned"
    torch.testing.assert_close(added(3, 4, 6), embed.pos_embedding[0], rtol=0, atol=0)
    assert added_positions(config, 2, 4, 6) == "sincos"
    np.testing.assert_allclose(added(2, 4, 6)[3:].detach(), sincos_table(config, 2, 4, 6), rtol=0, atol=3.1e-8)
    with pytest.raises(ValueError, match="different resolution"):
        added(3, 8, 6)
