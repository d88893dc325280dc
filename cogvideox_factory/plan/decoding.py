"""What the VAE's decoder takes in memory, by walking through it layer by layer on numbers alone.

The decoder works on frame batches. What it holds in the middle of one: what the layer at hand reads and writes, and of
every convolution in time the last two frames it read, for the next batch. So the peak depends on the length of a video
only until there is a batch in the middle, and on the size of a picture linearly.
"""

from math import log2

from cogvideox_factory.models import VaeConfig

_LARGEST = 2**30
"""Elements that one convolution takes; of a larger one the parts that come out are joined, which takes them twice."""


def parameters(vae: VaeConfig) -> tuple[int, int]:
    """Return the parameters of (encoder, decoder)."""
    channels, latent = vae.block_out_channels, vae.latent_channels
    widest, last = channels[-1], channels[0]

    def conv(inputs: int, outputs: int, taps: int = 27) -> int:
        return taps * inputs * outputs + outputs

    def resnet(inputs: int, outputs: int, *, steered: bool) -> int:
        shortcut = conv(inputs, outputs, 1) if inputs != outputs else 0
        norms = sum(2 * c + (2 * conv(latent, c, 1) if steered else 0) for c in (inputs, outputs))
        return conv(inputs, outputs) + conv(outputs, outputs) + norms + shortcut

    def stages(order: tuple[int, ...], layers: int, *, steered: bool) -> int:
        total = 2 * resnet(widest, widest, steered=steered)
        for level, (before, after) in enumerate(zip((order[0], *order), order)):
            total += resnet(before, after, steered=steered) + (layers - 1) * resnet(after, after, steered=steered)
            total += conv(after, after, 9) if level < len(order) - 1 else 0
        return total

    encoder = conv(vae.in_channels, last) + stages(channels, vae.layers_per_block, steered=False)
    decoder = conv(latent, widest) + stages(channels[::-1], vae.layers_per_block + 1, steered=True)
    decoder += 2 * last + 2 * conv(latent, last, 1)
    return encoder + 2 * widest + conv(widest, 2 * latent), decoder + conv(last, vae.out_channels)


def batches(latent_frames: int) -> list[int]:
    """Return the latent frames of each batch: two, and what is over in the first."""
    first = 2 + latent_frames % 2 if latent_frames > 1 else 1
    return [first] + [2] * ((latent_frames - first) // 2)


class Walk:
    """The decoder on pictures of one size: elements that are alive, and the most of them so far."""

    def __init__(self, vae: VaeConfig, height: int, width: int) -> None:
        """`height` and `width` are in latents."""
        self._vae, self._cells = vae, height * width
        self._tails = 0
        """Elements kept for the next batch."""
        self._latents = 0
        """Latent frames of the batch."""
        self._tail_sign = 0
        """1 in the first batch, -1 in the last: frames begin, and cease, to be kept; 0 in those between."""
        self.peak = 0

    def run(self, latent_frames: int) -> int:
        """Decode, and return the most elements that were alive at once beside weights and the video."""
        counts = batches(latent_frames)
        for number, count in enumerate(counts):
            self._latents = count
            self._tail_sign = (number == 0) - (number == len(counts) - 1)
            self._batch()
        return self.peak

    def _batch(self) -> None:
        vae, order = self._vae, self._vae.block_out_channels[::-1]
        frames, area, doubled = self._latents, self._cells, False
        self._keep(2 * area * vae.latent_channels)
        self._conv(vae.latent_channels, order[0], frames, area, beside=0)
        time_levels = int(log2(vae.temporal_compression_ratio))
        for _ in range(2):
            self._resnet(order[0], order[0], frames, area, doubled=False)
        for level, (before, after) in enumerate(zip((order[0], *order), order)):
            for inputs in (before, *[after] * vae.layers_per_block):
                frames = self._resnet(inputs, after, frames, area, doubled=doubled)
                doubled = False
            if level < len(order) - 1:
                part = frames * area * after
                self._see(part + 4 * part + part)  # the input, the output, one of its four parts
                area, doubled = 4 * area, level < time_levels and frames > 1
        self._norm(order[-1], frames, area, halo=2, beside=0)
        self._conv(order[-1], vae.out_channels, frames, area, beside=0)

    def _resnet(self, before: int, after: int, frames: int, area: int, *, doubled: bool) -> int:
        """Return the frames that come out; those of a `doubled` input stand for two each, but for a first odd one."""
        residual, halo = frames * area * after, 1 if doubled else 2
        self._norm(before, frames, area, halo=halo, beside=residual if before != after else 0)
        padded = (halo + frames) * area * before
        if doubled:
            pairs = frames - frames % 2
            frames += pairs
            out = frames * area * after
            work = residual + pairs * area * (before + 2 * after)  # steady; differences, and what is made of them
            self._see(padded + residual + out + work)
        else:
            self._conv(before, after, frames, area, beside=residual)
        whole = frames * area * after
        self._norm(after, frames, area, halo=2, beside=residual)
        if doubled:
            self._see((2 + frames) * area * after + residual + whole)
        self._conv(after, after, frames, area, beside=whole)
        return frames

    def _norm(self, channels: int, frames: int, area: int, *, halo: int, beside: int) -> None:
        """Normalise into a buffer with room for earlier frames; the last ones are kept for the next batch."""
        # Scale and shift of every latent row are spread along the width.
        spread = 2 * self._latents * channels * round((area * self._cells) ** 0.5)
        here = (frames + halo + frames) * area * channels + beside
        self._see(here + spread)
        self._keep(halo * area * channels)
        self._see(here)

    def _conv(self, inputs: int, outputs: int, frames: int, area: int, *, beside: int) -> None:
        padded, out = (2 + frames) * area * inputs, frames * area * outputs
        self._see(padded + beside + (2 * out if padded > _LARGEST else out))

    def _keep(self, elements: int) -> None:
        self._tails += self._tail_sign * elements

    def _see(self, elements: int) -> None:
        self.peak = max(self.peak, self._tails + elements)
