"""Settings of what is trained on: clips, captions, and the cache made of them."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from cogvideox_factory.config.section import FrameRate, NotNegative, Positive, Section, Share


class DataSet(Section):
    """One of several data sets that are mixed; what is None is as `data` has it."""

    root: str
    """Folder that holds the clips; see `data.root`."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """How often an epoch sees each clip of the set: 2 is twice, 0.25 a quarter of the clips, another one each epoch."""
    name: str | None = None
    """What reports call it. Default: the last part of `root`."""
    table: str | None = None
    """See `data.table`."""
    captions: str | None = None
    """See `data.captions`."""
    videos: str | None = None
    """See `data.videos`."""
    caption_column: str | None = None
    """See `data.caption_column`."""
    video_column: str | None = None
    """See `data.video_column`."""
    image_column: str | None = None
    """See `data.image_column`."""

    @property
    def called(self) -> str:
        """The name, given or not."""
        return self.name or Path(self.root).name or self.root

    def problems(self) -> list[str]:
        """Return what contradicts itself."""
        found = []
        if (self.captions is None) != (self.videos is None):
            found.append(f"data.sets {self.called!r}: captions and videos belong together; give both or neither")
        if self.table and self.captions:
            found.append(f"data.sets {self.called!r}: table and captions both name the captions; give one of them")
        return found


class Data(Section):
    """Clips and captions, and how frames are taken from them."""

    root: str = ""
    """Folder that holds the clips; every path in a list is relative to it and must stay inside."""
    sets: list[DataSet] = []
    """Several data sets in place of `root`, mixed by weights, each with `root`, `weight` and lists of its own."""
    table: str | None = None
    """CSV, TSV, JSONL or Parquet file (relative to root) with one row a clip."""
    caption_column: str = "caption"
    """Column of the table that holds the caption."""
    video_column: str = "video"
    """Column of the table that holds the clip's path; where there is none, `file_name` (Hugging Face) is taken."""
    image_column: str = "image"
    """Image-to-video: column of the table that names the picture a clip starts from, in place of the clip's own first
    frame. A table without the column, or a row without a name in it, starts from the first frame."""
    captions: str | None = None
    """Text file with one caption a line; needs `videos`."""
    videos: str | None = None
    """Text file with one clip path a line, paired with `captions` line by line."""
    trigger_word: str | None = None
    """Put in front of every caption, so the word comes to mean what the clips show."""
    num_frames: Positive | None = None
    """Frames a clip; 8k+1 survives the VAE unchanged. Default: the model's."""
    height: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    width: Positive | None = None
    """Pixels, a multiple of 16. Default: the model's."""
    fps: FrameRate | None = None
    """Frames per second, 0.01 to 1000, the clips are resampled to. Default: the model's (8, or 16 for 1.5)."""
    fps_policy: Literal["resample", "stretch"] = "resample"
    """resample: keep the speed of the source. stretch: spread the frames over the whole clip."""
    crop: Literal["center", "random", "smart", "stretch"] = "center"
    """center, random, smart: resize to cover, then crop; smart puts the crop where most moves and stands out, one place
    a clip. stretch: distort to the asked size."""
    short_clips: Literal["reject", "repeat_last", "slow"] = "reject"
    """What to do with a clip that has too few frames. slow: play it slower, so that it just fills them."""
    max_slowdown: Annotated[float, Field(ge=1, le=100)] = 2.0
    """short_clips=slow: how many times slower a clip may become; a shorter one is rejected."""
    windows: Literal["first", "uniform", "all", "scenes"] = "first"
    """What is taken of a long video. first: its start. all: one window after another, each a clip of its own. uniform:
    at most max_windows of those, spread over it. scenes: as all in each scene, never across a cut (needs the extra
    `scenes`)."""
    max_windows: Positive = 4
    """windows=uniform: most clips that are made of one video."""
    window_stride: Positive | None = None
    """windows=all or scenes: frames at `fps` from one window's start to the next. Default: a window's length, so that
    they do not overlap."""
    buckets: str | None = None
    """Train at more than one size and length: a bucket file (recipes/buckets/), or `auto` for the shapes the clips
    have. num_frames, height and width are then the largest that auto makes."""
    max_buckets: Positive = 8
    """Most shapes that `buckets: auto` makes."""
    flip_probability: Share = 0.0
    """Chance of a horizontal flip, drawn once a clip (training from raw clips, without a cache)."""
    vae_tiling: bool = False
    """Encode in overlapping tiles: much less memory, slightly other latents."""
    allow_outside_root: bool = False
    """Accept clip paths that lead out of `root`."""
    strict: bool = False
    """Turn the loss of any clip into an error."""
    max_bad: Share = 0.01
    """Stop when a larger share of the rows than this cannot be used (a few are let pass in a small set)."""


class Cache(Section):
    """Prepared latents and text embeddings."""

    dir: str | None = None
    """Cache folder. `train` without one encodes raw clips on the fly."""
    image_noise_variants: NotNegative = 4
    """Image-to-video: noised copies of the first frame to keep a clip (0: only the clean frame)."""


class Text(Section):
    """Captions to embeddings."""

    max_sequence_length: Positive | None = None
    """Tokens every caption is padded or cut to. Default: the model's (226)."""
