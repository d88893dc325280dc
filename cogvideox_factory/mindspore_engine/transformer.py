"""The CogVideoX diffusion transformer (Yang et al. 2024, arXiv 2408.06072): all published variants, any size by config.

Parameters have the names and shapes of a diffusers checkpoint. `forward` checks its input and computes at once; inside
compiled functions call the cell itself with the tensors of `Positions`, and `check_transformer_input` before.

```python
model = CogVideoXTransformer.from_folder(folder / "transformer")
positions = model.positions(latent_frames=13, latent_height=60, latent_width=90, text_length=226)
v = model.forward(latents, prompt_embeds, timesteps, positions=positions)
```

Legend: B batch, F latent frames, C channels, H W latent height and width, N video tokens, T text tokens,
D width, E size of the time embedding, P elements of a patch.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops

from cogvideox_factory import weights
from cogvideox_factory.initial_weights import initial_weight
from cogvideox_factory.mindspore_engine.block import Block, OutputNorm, TimeEmbedding, sinusoids
from cogvideox_factory.mindspore_engine.border import load_parameters, put_own, rows_of, whole_array, whole_shape
from cogvideox_factory.mindspore_engine.collectives import GatherRows, Group
from cogvideox_factory.mindspore_engine.linear import LayerNorm, Linear, empty, weights_in
from cogvideox_factory.mindspore_engine.positions import Positions, make_positions
from cogvideox_factory.mindspore_engine.sequence_parallel import Cut, HeadsForRows
from cogvideox_factory.mindspore_engine.sharding import Shards
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.network_input import check_ofs, check_transformer_input
from cogvideox_factory.tiny.layout import transformer_shapes


class CogVideoXTransformer(nn.Cell):
    """Predicts v from noisy latents, a prompt and a time step. Its weights are zero until loaded or drawn."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.num_changes = 0
        """Counts changes of its layers (adapters, sequences), so that graphs of before are not used again."""
        self.gather_rows: GatherRows | None = None
        self.patch_embed = _PatchEmbed(config)
        self.time_embedding = TimeEmbedding(config.width, config.time_embed_dim)
        self.time_frequencies = _frequencies(config.width, config.freq_shift)
        self.ofs_embedding = self.ofs_frequencies = None
        if config.ofs_embed_dim:
            self.ofs_embedding = TimeEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
            self.ofs_frequencies = _frequencies(config.ofs_embed_dim, config.freq_shift)
        self.transformer_blocks = nn.CellList([Block(config) for _ in range(config.num_layers)])
        self.norm_final = LayerNorm(
            config.width, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine
        )
        self.norm_out = OutputNorm(config)
        patch = config.patch_size**2 * (config.patch_size_t or 1)
        self.proj_out = Linear(config.width, config.out_channels * patch)

    def construct(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timesteps: Tensor,
        cos: Tensor | None = None,
        sin: Tensor | None = None,
        added: Tensor | None = None,
        ofs: Tensor | None = None,
    ) -> Tensor:
        """Return what `forward` does, from the tensors of `Positions`."""
        flip, dtype = self.config.flip_sin_to_cos, latents.dtype
        conditioning = self.time_embedding(
            sinusoids(timesteps, self.time_frequencies, cosines_first=flip).astype(dtype)
        )
        if self.ofs_embedding is not None:
            of_ofs = sinusoids(ofs, self.ofs_frequencies, cosines_first=flip).astype(dtype)
            conditioning = conditioning + self.ofs_embedding(of_ofs)
        conditioning = ops.silu(conditioning)  # [B, E]
        video, text = self.patch_embed(latents, prompt_embeds, added)
        num_tokens = prompt_embeds.shape[1], self._num_video_tokens(latents.shape)
        for block in self.transformer_blocks:
            video, text = block(video, text, conditioning, cos, sin, num_tokens)
        tokens = self.proj_out(self.norm_out(self.norm_final(video), conditioning))  # [B, N, P]
        if self.gather_rows is not None:
            tokens = self.gather_rows(tokens)[:, : num_tokens[1]]
        return self._unpatchify(tokens, latents.shape)

    def forward(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timesteps: Tensor,
        *,
        positions: Positions | None,
        ofs: Tensor | None = None,
    ) -> Tensor:
        """Return the v prediction [B, F, out_channels, H, W].

        Args:
            latents: [B, F, C, H, W], in the dtype to compute in; the image's channels after the video's where there is
                one.
            prompt_embeds: [B, T, text_embed_dim]; all rows are attended to, there is no mask.
            timesteps: [B], any number type.
            positions: of this shape, from `positions` or `make_positions`.
            ofs: [1] or [B], for CogVideoX1.5-I2V only (always 2.0 there).

        Raises:
            FactoryError: positions or `ofs` that are missing or of another shape; a size the model cannot take.
        """
        tokens = None if positions is None else (positions.text_length, positions.num_video_tokens)
        check_transformer_input(self.config, latents.shape, text_length=prompt_embeds.shape[1], tokens=tokens)
        check_ofs(self.config, is_given=ofs is not None)
        assert positions is not None
        return self(latents, prompt_embeds, timesteps, positions.cos, positions.sin, positions.added, ofs)

    def positions(
        self, *, latent_frames: int, latent_height: int, latent_width: int, text_length: int, dtype: Any = ms.float32
    ) -> Positions:
        """Return `make_positions` for this model."""
        return make_positions(self.config, latent_frames, latent_height, latent_width, text_length, dtype)

    def divide(self, sequence: Group) -> None:
        """Hold only this process' share of every token stream, and exchange rows with the others of `sequence`.

        They must call the model at the same points with the same input, and get the same output.
        """
        self.gather_rows, self.patch_embed.cut = GatherRows(sequence), Cut(sequence)
        for block in self.transformer_blocks:
            block.attn1.exchange = HeadsForRows(sequence)
        self.num_changes += 1

    def _num_video_tokens(self, shape: tuple[int, ...]) -> int:
        p, p_t = self.config.patch_size, self.config.patch_size_t or 1
        return (shape[1] // p_t) * (shape[3] // p) * (shape[4] // p)

    def _unpatchify(self, tokens: Tensor, shape: tuple[int, ...]) -> Tensor:
        """Return [B, F, C, H, W] of the `shape` of the latents, but with out_channels, from `tokens` [B, N, P]."""
        batch, frames, _, height, width = shape
        p, p_t, channels = self.config.patch_size, self.config.patch_size_t or 1, self.config.out_channels
        x = tokens.reshape(batch, frames // p_t, height // p, width // p, channels, p_t, p, p)
        return x.transpose(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, channels, height, width)

    def initialize(self, seed: int = 0) -> None:
        """Draw all weights anew from `seed`, see `initial_weights`."""
        for name, parameter in self.parameters_and_names():
            drawn = initial_weight(self.config, name, whole_shape(parameter), seed=seed)
            put_own(parameter, drawn, rows_of(parameter))

    def iterate_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (diffusers name, array) of all weights, adapters left out, one copied at a time.

        The processes that divide them iterate to the end at the same point.
        """
        own = dict(self.parameters_and_names())
        for name in transformer_shapes(self.config):
            yield name, whole_array(own[name], rows_of(own[name]))

    @classmethod
    def from_folder(
        cls, folder: Path | str, *, config: TransformerConfig | None = None, dtype: Any = ms.float32,
        shards: Shards | None = None,
    ) -> Self:  # fmt: skip
        """Load a `transformer` folder in the diffusers layout, its weights kept in `dtype`, divided among `shards`.

        A folder of weights alone needs their `config`.

        Raises:
            MissingError, UnfitError: no weights, damaged ones, or ones of another shape than the config's.
        """
        folder = Path(folder)
        with weights_in(dtype, shards):
            model = cls(config or TransformerConfig.from_folder(folder))
        load_parameters(model, weights.stored_tensors(folder, weights.MODEL_STEM), source=str(folder))
        return model

    def save(self, folder: Path | str) -> None:
        """Write config and weights so that diffusers and `from_folder` load them; complete or not at all.

        Raises:
            StorageError: the disk is full, read-only or failing.
        """
        weights.save_folder(Path(folder), self.iterate_arrays(), config=self.config.to_dict(), stem=weights.MODEL_STEM)


class _PatchEmbed(nn.Cell):
    """Cuts latents into patches; tokens of the video and of the text."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        p, p_t = config.patch_size, config.patch_size_t or 1
        self.patch_size, self.patch_size_t = p, p_t
        patch = config.in_channels * p * p * p_t
        # CogVideoX 1.0 keeps it as a convolution. In 1.5 files `patch_bias` is false and yet there is a bias.
        shape = (config.in_channels, p, p) if config.patch_size_t is None else ()
        self.proj = Linear(patch, config.width, bias=config.patch_bias or config.patch_size_t is not None, shape=shape)
        self.text_proj = Linear(config.text_embed_dim, config.width)
        self.text_rows = config.max_text_seq_length
        self.pos_embedding = None
        self.cut: Cut | None = None
        if config.use_learned_positional_embeddings:
            frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
            tokens = self.text_rows + frames * (config.sample_height // p) * (config.sample_width // p)
            self.pos_embedding = empty(1, tokens, config.width, requires_grad=False)

    def construct(self, latents: Tensor, prompt_embeds: Tensor, added: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return [B, N, D] and [B, T, D], or own rows, of `latents` [B, F, C, H, W], `prompt_embeds` [B, T, ...]."""
        batch, frames, channels, height, width = latents.shape
        p, p_t = self.patch_size, self.patch_size_t
        x = latents.reshape(batch, frames // p_t, p_t, channels, height // p, p, width // p, p)
        x = x.transpose(0, 1, 4, 6, 3, 2, 5, 7).reshape(batch, -1, channels * p_t * p * p)  # [B, N, ...]
        video, text = self.proj(self._own(x)), self.text_proj(self._own(prompt_embeds))
        if added is not None:
            return video + self._own(added[None]), text
        if self.pos_embedding is None:
            return video, text
        learned = self.pos_embedding.astype(video.dtype)
        return video + self._own(learned[:, self.text_rows :]), text + self._own(learned[:, : self.text_rows])

    def _own(self, x: Tensor) -> Tensor:
        """Return the rows of `x` [B, N, ...] that are this process': all, unless several divide the stream."""
        return x if self.cut is None else self.cut(x)


def _frequencies(dim: int, freq_shift: int) -> Tensor:
    """Return the float32 frequencies [dim / 2] of `sinusoids`, from 1 down to 1 / 10,000."""
    half = dim // 2
    exponents = np.arange(half, dtype=np.float32) / np.float32(half - freq_shift)
    return Tensor(np.exp(exponents * np.float32(-math.log(10_000))))
