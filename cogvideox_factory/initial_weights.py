"""What a transformer's weights start from when no checkpoint gives them: the same on every engine and device.

Linears are normal with variance 1 / inputs; norms are 1 and biases 0. Two exceptions: gates start at 1 / sqrt(2
num_layers), so that the stream keeps its size through any depth, with small shifts, scales and time dependence around
that; and the last projection is a fifth of its usual size, so that the first predictions are near the mean, 0. Neither
is zero, as they would be in DiT: a LoRA on drawn weights must have something to turn.
"""

import math

import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.diffusion.positions import sincos_table
from cogvideox_factory.models import TransformerConfig


def initial_weight(config: TransformerConfig, name: str, shape: tuple[int, ...], *, seed: int) -> np.ndarray:
    """Return the float32 values of the tensor that a diffusers checkpoint calls `name`."""
    if name.endswith("pos_embedding"):
        native = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        table = sincos_table(config, native, config.sample_height, config.sample_width)
        return np.pad(table, ((config.max_text_seq_length, 0), (0, 0)))[None]
    if len(shape) == 1:
        is_gain = "norm" in name.split(".")[-2] and name.endswith("weight")
        values = np.full(shape, 1.0 if is_gain else 0.0, np.float32)
        if ".linear.bias" in name and name.startswith("transformer_blocks"):  # shift, scale, gate; twice
            values.reshape(2, 3, config.width)[:, 2] = (2 * config.num_layers) ** -0.5
        return values
    size = {"proj_out.weight": 0.2}.get(name, 0.1 if ".linear.weight" in name else 1.0)
    drawn = draws.normal(seed, "initial weight", name, shape=shape)
    return drawn * np.float32(size * math.prod(shape[1:]) ** -0.5)
