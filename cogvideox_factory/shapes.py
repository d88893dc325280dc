"""What a model can take: task, frames, size, frame rate, checked before anything is loaded."""

from collections.abc import Mapping
from dataclasses import dataclass

from cogvideox_factory.data.buckets import Bucket
from cogvideox_factory.diffusion.frames import check_num_frames, check_size, latent_frames_for_model
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import TransformerConfig, facts_for

VAE_STRIDE = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipShape:
    """Size of a clip in pixels and as the transformer sees it."""

    num_frames: int
    height: int
    width: int
    fps: float
    latent_frames: int
    """Latent frames of the VAE."""
    num_front_padding: int
    """Latent frames added in front so that the count fills whole temporal patches (1.5 models)."""

    @property
    def latent_height(self) -> int:
        """Rows of the latent picture."""
        return self.height // VAE_STRIDE

    @property
    def latent_width(self) -> int:
        """Columns of the latent picture."""
        return self.width // VAE_STRIDE


def num_video_tokens(config: TransformerConfig, shape: ClipShape) -> int:
    """Return the video tokens of one clip."""
    frames = (shape.latent_frames + shape.num_front_padding) // (config.patch_size_t or 1)
    return frames * (shape.latent_height // config.patch_size) * (shape.latent_width // config.patch_size)


def clip_shape(
    config: TransformerConfig,
    *,
    num_frames: int | None = None,
    height: int | None = None,
    width: int | None = None,
    fps: float | None = None,
) -> ClipShape:
    """Fill in what the model was made for where a value is None, and check the rest.

    Raises:
        FactoryError: a frame count or size the model cannot take, with the nearest that it can.
    """
    facts = facts_for(config)
    # The 1.5 configs state a sample size of 300 x 300 latents, which is a limit, not what they were trained at.
    own = config.sample_height * VAE_STRIDE <= facts.height
    num_frames = num_frames or (config.sample_frames if own else facts.num_frames)
    height = height or (config.sample_height * VAE_STRIDE if own else facts.height)
    width = width or (config.sample_width * VAE_STRIDE if own else facts.width)
    check_num_frames(num_frames, patch_size_t=config.patch_size_t)
    check_size(height, width)
    _check_positions(config, height, width)
    total, padding = latent_frames_for_model(num_frames, config.patch_size_t)
    return ClipShape(
        num_frames=num_frames, height=height, width=width, fps=fps or facts.fps,
        latent_frames=total - padding, num_front_padding=padding,
    )  # fmt: skip


def _check_positions(config: TransformerConfig, height: int, width: int) -> None:
    limit_height, limit_width = config.sample_height * VAE_STRIDE, config.sample_width * VAE_STRIDE
    if config.use_learned_positional_embeddings and (height, width) != (limit_height, limit_width):
        raise FactoryError(
            f"size {height}x{width}: this model has learned positions for {limit_height}x{limit_width} only. "
            "Use that size, or a model without learned positions (CogVideoX1.5-5B-I2V)."
        )
    if config.patch_size_t is not None and (height > limit_height or width > limit_width):
        raise FactoryError(
            f"size {height}x{width}: this model has rotary positions up to {limit_height}x{limit_width}. "
            "Use a smaller size."
        )


def check_buckets(counts: Mapping[Bucket, int], config: TransformerConfig) -> None:
    """Refuse buckets that the model cannot take; `counts` are the clips of each.

    Raises:
        FactoryError: naming the shape, how many clips have it, and what the model takes.
    """
    for bucket, count in counts.items():
        try:
            clip_shape(config, num_frames=bucket.num_frames, height=bucket.height, width=bucket.width)
        except FactoryError as error:
            raise FactoryError(f"bucket {bucket.key} ({count} clips): {error}") from error


def check_task(task: str, config: TransformerConfig, *, source: str) -> None:
    """Refuse a model made for the other task.

    Raises:
        FactoryError: naming the model's own task and the models that fit.
    """
    own = "i2v" if config.is_image_to_video else "t2v"
    if task != own:
        fitting = "CogVideoX-5b-I2V or CogVideoX1.5-5B-I2V" if task == "i2v" else "CogVideoX-2b, -5b or CogVideoX1.5-5B"
        raise FactoryError(
            f"task={task}, but {source} has in_channels={config.in_channels}, which is a model for {own}. "
            f"Set task={own}, or use a model for {task}: {fitting}."
        )
