"""What the networks can be built from and what they take, checked on plain numbers before an engine computes.

Legend: B batch, F frames or latent frames, C channels, H W pixel height and width, h w latent ones.
"""

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.models import TransformerConfig, VaeConfig


def check_transformer_input(
    config: TransformerConfig,
    latents: tuple[int, ...],
    *,
    text_length: int,
    tokens: tuple[int, int] | None,
) -> None:
    """Refuse what a transformer cannot take.

    Args:
        config: of the transformer.
        latents: their shape, [B, F, C, h, w].
        text_length: rows of the prompt's embeddings.
        tokens: (text tokens, video tokens) that the positions are of; None for no positions.

    Raises:
        FactoryError: positions that are missing or of another shape; a size the model cannot take.
    """
    _, frames, channels, height, width = latents
    if channels != config.in_channels:
        kind = "image-to-video" if config.is_image_to_video else "text-to-video"
        raise FactoryError(
            f"latents have {channels} channels; this {kind} model takes {config.in_channels}"
            f"{', half of them the image' if config.is_image_to_video else ''}. Check model and task."
        )
    if config.patch_size_t is not None and frames % config.patch_size_t:
        raise FactoryError(
            f"{frames} latent frames; this model cuts time into patches of {config.patch_size_t}. "
            "Pad one in front (diffusion.frames.latent_frames_for_model), or choose e.g. 77 or 85 frames of video."
        )
    if tokens is None:
        raise FactoryError(
            "positions=None: without positions this model draws noise. Pass model.positions(...) of the shape."
        )
    p, p_t = config.patch_size, config.patch_size_t or 1
    video = frames // p_t * (height // p) * (width // p)
    if tokens != (text_length, video):
        raise FactoryError(
            f"positions are of {tokens[0]} text and {tokens[1]} video tokens, "
            f"the input has {text_length} and {video}. Make them for latents {frames}x{height}x{width}."
        )


def check_ofs(config: TransformerConfig, *, is_given: bool) -> None:
    """Refuse `ofs` where a transformer has none, and the reverse.

    Raises:
        FactoryError: it is missing, or too much.
    """
    if is_given != (config.ofs_embed_dim is not None):
        raise FactoryError(
            "ofs given, but only CogVideoX1.5-I2V takes it; leave it out."
            if is_given
            else "this model needs ofs (a tensor [1] of 2.0)."
        )


def check_vae_config(config: VaeConfig) -> None:
    """Refuse a config these layers cannot build.

    Raises:
        UnfitError: other block types or activations, channels the norm groups do not divide.
    """
    channels, groups = config.block_out_channels, config.norm_num_groups
    levels = len(channels)
    if (
        config.down_block_types != ("CogVideoXDownBlock3D",) * levels
        or config.up_block_types != ("CogVideoXUpBlock3D",) * levels
    ):
        raise UnfitError(
            f"down_block_types={config.down_block_types}, up_block_types={config.up_block_types}: this VAE has one "
            f"CogVideoXDownBlock3D and one CogVideoXUpBlock3D for each of the {levels} block_out_channels."
        )
    if config.act_fn not in ("silu", "swish"):
        raise UnfitError(f"act_fn={config.act_fn!r}: every CogVideoX VAE has 'silu', and this one knows no other.")
    for count in channels:
        if count % groups:
            raise UnfitError(
                f"block_out_channels={channels} needs each divisible by norm_num_groups={groups}; {count} is not."
            )
    ratio = config.temporal_compression_ratio
    if ratio not in [2**level for level in range(levels)]:
        raise UnfitError(
            f"temporal_compression_ratio={ratio}: time is halved in some of the {levels - 1} changes of size, so it "
            f"must be a power of two up to {2 ** (levels - 1)}. Use 4."
        )


def check_pixels(config: VaeConfig, shape: tuple[int, ...], dtype: str, *, is_floating: bool) -> None:
    """Refuse what the encoder of a VAE cannot take as pixels [B, 3, F, H, W].

    Raises:
        FactoryError: other dimensions, a dtype of whole numbers, or height or width no multiple of 8.
    """
    _check_video(shape, config.in_channels, dtype, is_floating, "pixels [B, 3, F, H, W]", dim=1)
    multiple = config.spatial_scale
    height, width = shape[3:]
    if height % multiple or width % multiple:
        nearest = [max(1, round(size / multiple)) * multiple for size in (height, width)]
        raise FactoryError(
            f"frames of {height}x{width} (height x width): this VAE takes multiples of {multiple}. "
            f"Resize or crop to {nearest[0]}x{nearest[1]}."
        )


def check_latents(config: VaeConfig, shape: tuple[int, ...], dtype: str, *, is_floating: bool) -> None:
    """Refuse what the decoder of a VAE cannot take as latents [B, F, C, h, w].

    Raises:
        FactoryError: other dimensions, or a dtype of whole numbers.
    """
    _check_video(shape, config.latent_channels, dtype, is_floating, "latents [B, F, C, h, w]", dim=2)


def _check_video(shape: tuple[int, ...], channels: int, dtype: str, is_floating: bool, what: str, *, dim: int) -> None:
    if len(shape) != 5 or shape[dim] != channels or 0 in shape or not is_floating:
        raise FactoryError(
            f"expected {what} with {channels} channels, at least one frame and a floating dtype; got shape "
            f"{shape} of {dtype}. uint8 frames go through pixels_from_uint8 first."
        )
