"""What a video needs in memory while it is made, phase by phase, from numbers alone.

Three models work one after the other: the text encoder, gone before the others are loaded; the transformer; the VAE's
decoder. What denoising takes beside weights is counted in units of the transformer's stream, tokens x width of both
predictions; the decoder is walked through layer by layer (`decoding`).

`tests/plan/test_generation.py` holds all of it to runs that are traced.
"""

from dataclasses import dataclass
from typing import Literal

from cogvideox_factory.models import TransformerConfig, VaeConfig
from cogvideox_factory.plan import decoding
from cogvideox_factory.plan.memory import MATRIX_BYTES

Mode = Literal["none", "model", "block", "group"]

_STREAM = 8
"""Units of the stream at the peak. In attention: the block's input, normed, q, k and v as projected, q and k as normed,
what comes out. A feed-forward takes as many."""

_TURNING = {4: 1, 2: 2}
"""Units more while k is turned by rotary positions, in float32, by the bytes of a value."""

_HERE = 2
"""Blocks, or groups of them, that are on the device at a time when others wait."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextModel:
    """The text encoder's size."""

    num_parameters: int
    block_parameters: int
    num_blocks: int
    width: int
    hidden: int

    @classmethod
    def t5(cls, *, vocab_size: int, d_model: int, d_kv: int, num_heads: int, d_ff: int, num_layers: int) -> "TextModel":
        """Return that of a gated T5 encoder, by the names of its config; the defaults of no field are guessed."""
        inner = num_heads * d_kv
        block = 4 * d_model * inner + 3 * d_model * d_ff + 2 * d_model
        return cls(
            num_parameters=num_layers * block + vocab_size * d_model + 32 * num_heads + d_model,
            block_parameters=block, num_blocks=num_layers, width=d_model, hidden=d_ff,
        )  # fmt: skip


T5_XXL = TextModel.t5(vocab_size=32128, d_model=4096, d_kv=64, num_heads=64, d_ff=10240, num_layers=24)
"""Of every published model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Generation:
    """One video to be made, as numbers."""

    model: TransformerConfig
    vae: VaeConfig
    text: TextModel | None = T5_XXL
    """None: no prompt is left to be encoded."""
    num_frames: int
    height: int
    width: int
    latent_frames: int
    """As the transformer sees them, front padding included."""
    text_tokens: int
    item_bytes: int
    guided: bool = True
    """Whether the negative prompt's prediction is made as well."""
    tiling: bool = True
    """The VAE decodes in tiles."""
    offload: Mode = "none"
    group: int = 1
    """Blocks that come at a time with offload=group."""
    base: str = "model"
    adapter_bytes: int = 0
    """Of live LoRAs."""
    shards: int = 1
    """Processes that divide the weights."""
    sequence: int = 1
    """Processes that divide the tokens."""
    guidance: int = 1
    """Processes that divide the two predictions."""

    @property
    def pixels(self) -> int:
        """Of a picture."""
        return self.height * self.width


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """Bytes on the device of one process in each phase, and in host memory."""

    text: int
    denoise: int
    decode: int
    host: int
    weights: int
    """Of `denoise`: the transformer's, and those of models that stay beside it."""

    @property
    def device(self) -> int:
        """The most of all phases."""
        return max(self.text, self.denoise, self.decode)


def need(video: Generation) -> Need:
    """Return what one process takes to make `video`."""
    outside, block = _transformer_bytes(video)
    encoder, decoder = decoding.parameters(video.vae)
    vae = (encoder + decoder) * video.item_bytes
    layers = video.model.num_layers
    everything = outside + layers * block
    here = everything
    if video.shards > 1:
        here = everything // video.shards + outside + min(_HERE, layers) * block
    elif video.offload in ("block", "group"):
        here = outside + min(_HERE * _at_once(video), layers) * block
    beside = vae if video.offload == "none" else 0
    resident = (everything // video.shards + vae) if video.offload == "none" else decoder * video.item_bytes
    text, text_host = _text(video)
    return Need(
        text=text,
        weights=here + beside,
        denoise=here + beside + _denoising(video),
        decode=resident + _decoding(video),
        host=0 if video.offload == "none" else max(text_host, everything + vae),
    )


# --- weights ----------------------------------------------------------------------------------------------------------


def _at_once(video: Generation) -> int:
    return video.group if video.offload == "group" else 1


def _transformer_bytes(video: Generation) -> tuple[int, int]:
    """Return the bytes (outside the blocks, of one block), adapters included."""
    model = video.model
    weights, rows = 12 * model.width**2, 9 * model.width
    if not model.attention_bias:
        rows -= 3 * model.width
    vectors = rows + 4 * model.attention_head_dim  # biases; norms of q and k
    outside = model.num_parameters - model.num_layers * (weights + vectors)
    if model.use_learned_positional_embeddings:
        frames = (model.sample_frames - 1) // model.temporal_compression_ratio + 1
        native = frames * (model.sample_height // model.patch_size) * (model.sample_width // model.patch_size)
        outside += (model.max_text_seq_length + native) * model.width
    each, a_row = (video.item_bytes, 0) if video.base == "model" else MATRIX_BYTES[video.base]
    matrices = weights * each + 9 * model.width * a_row
    adapters = video.adapter_bytes // model.num_layers
    return outside * video.item_bytes, round(matrices + vectors * video.item_bytes) + adapters


# --- work -------------------------------------------------------------------------------------------------------------


def _text(video: Generation) -> tuple[int, int]:
    """Return (bytes on the device, on the host) while the prompts are encoded, one at a time."""
    text = video.text
    if text is None:
        return 0, 0
    here = text.num_parameters
    by_blocks = video.offload in ("block", "group")
    if by_blocks:
        here -= max(text.num_blocks - _HERE * _at_once(video), 0) * text.block_parameters
    work = video.text_tokens * (6 * text.width + 3 * text.hidden)
    return (here + work) * video.item_bytes, text.num_parameters * video.item_bytes if by_blocks else 0


def _denoising(video: Generation) -> int:
    """Return what a step takes beside weights."""
    model, item = video.model, video.item_bytes
    patch = model.patch_size**2 * (model.patch_size_t or 1)
    latents = video.latent_frames * (video.height // 8) * (video.width // 8)
    tokens = latents // patch + video.text_tokens
    batch = 2 if video.guided and video.guidance == 1 else 1
    unit = batch * -(-tokens // video.sequence) * model.width * item
    whole = 0 if video.base == "model" else 4 * model.width**2 * (2 * item + 8)  # a matrix while it is made
    if model.use_rotary_positional_embeddings:
        positions = 4 * 4 * model.attention_head_dim * tokens
    else:
        positions = model.width * tokens * item
    prompts = batch * video.text_tokens * model.text_embed_dim * item
    copies = latents * (model.in_channels * (12 + batch * 2 * item) + model.out_channels * batch * 2 * (4 + item))
    stream = _STREAM + (_TURNING[item] if model.use_rotary_positional_embeddings else 0)
    return stream * unit + whole + positions + prompts + copies


def _decoding(video: Generation) -> int:
    """Return what the decoder takes beside weights."""
    vae, item = video.vae, video.item_bytes
    height, width, latent_frames = video.height // 8, video.width // 8, -(-(video.num_frames - 1) // 4) + 1
    of_video = 3 * (4 * (latent_frames - 1) + 1)
    output, tiles = of_video * video.height * video.width, 0
    if video.tiling:
        rows, columns = min(vae.sample_height // 16, height), min(vae.sample_width // 16, width)
        tiles = 64 * of_video * (rows * columns + rows // 6 * width * 5 // 4 + columns // 5 * rows)  # one; its edges
        height, width = rows, columns
    else:
        height = -(-height // (video.sequence * video.guidance))
    # A second copy of the weights, in the order that convolutions like; a single frame does without.
    kernels = decoding.parameters(vae)[1] if latent_frames > 1 else 0
    at_work = (decoding.Walk(vae, height, width).run(latent_frames) + output + tiles + kernels) * item
    return max(at_work, output * (item + 4 + 1))  # behind it: in the model's dtype, in float32, in bytes
