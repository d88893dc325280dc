"""How a VAE takes a video apart: in tiles or whole, videos together or one by one, so many latent frames at once."""

from cogvideox_factory.diffusion.tiles import TileAxis, tile_axes
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import VaeConfig


class Coding:
    """The choices of a run, of an autoencoder that is one of these; none is part of its weights."""

    config: VaeConfig
    tiles: tuple[TileAxis, TileAxis] | None = None
    """None: frames are coded whole."""
    use_slicing: bool = False
    frame_batch: int = 2
    """Latent frames at once."""

    def enable_tiling(
        self,
        tile_sample_min_height: int | None = None,
        tile_sample_min_width: int | None = None,
        tile_overlap_factor_height: float | None = None,
        tile_overlap_factor_width: float | None = None,
    ) -> None:
        """Code frames larger than a tile tile by tile; sizes in pixels, overlaps as fractions of a tile.

        Defaults are diffusers': half of the config's sample size, sharing 1/6 of its height and 1/5 of its width.

        Raises:
            FactoryError: a size that is no multiple of 8, an overlap above one half.
        """
        self.tiles = tile_axes(
            self.config, tile_sample_min_height, tile_sample_min_width, tile_overlap_factor_height,
            tile_overlap_factor_width,
        )  # fmt: skip

    def disable_tiling(self) -> None:
        """Code frames whole."""
        self.tiles = None

    def enable_slicing(self) -> None:
        """Code the videos of a batch one after the other: less memory, the same numbers."""
        self.use_slicing = True

    def disable_slicing(self) -> None:
        """Code the videos of a batch together."""
        self.use_slicing = False

    def set_frame_batch(self, latent_frames: int) -> None:
        """Code `latent_frames` (and 4 times as many frames) at once; the weights were trained with 2.

        More are faster on a large device and need more memory. Group norm then averages over more frames, so the
        result differs a little from diffusers'.

        Raises:
            FactoryError: an odd number; only the first frame batch may hold a single frame of its own.
        """
        if latent_frames < 2 or latent_frames % 2:
            raise FactoryError(f"frame batch of {latent_frames} latents: it must be even and at least 2. Use 2 or 4.")
        self.frame_batch = latent_frames
