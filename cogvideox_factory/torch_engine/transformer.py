"""The CogVideoX diffusion transformer (Yang et al. 2024, arXiv 2408.06072): all published variants, any size by config.

Same mathematics and, at its borders, the same tensors as diffusers' `CogVideoXTransformer3DModel`; inside, one joint
token stream instead of two that are joined and split in every block (see `block`, `fused`, `rotary`, `feed_forward`).

```python
model = CogVideoXTransformer.from_folder(folder / "transformer", dtype=torch.bfloat16, device="cuda")
model.set_checkpointing("save_attention")
positions = model.positions(latent_frames=13, latent_height=60, latent_width=90, text_length=226, ...)
v = model(latents, prompt_embeds, timesteps, positions=positions)
```

Legend: B batch, F latent frames, C channels, H W latent height and width, N video tokens, T text tokens,
S = T + N joint tokens, D width, E size of the time embedding, P elements of a patch.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cogvideox_factory import weights
from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.initial_weights import initial_weight
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.network_input import check_ofs, check_transformer_input
from cogvideox_factory.tensors import StoredTensor
from cogvideox_factory.torch_engine.block import VECTORS_PER_BLOCK, Block, Modulation, split_vectors
from cogvideox_factory.torch_engine.border import local, rows_of, to_array, to_tensor, whole
from cogvideox_factory.torch_engine.checkpointing import Checkpointing
from cogvideox_factory.torch_engine.layout import Slot, diffusers_names, num_native_tokens
from cogvideox_factory.torch_engine.linear import Linear
from cogvideox_factory.torch_engine.positions import Positions, make_positions
from cogvideox_factory.torch_engine.reuse import Shortcut
from cogvideox_factory.torch_engine.sequence_parallel import SequenceGroup, Share, gather_rows
from cogvideox_factory.torch_engine.time_embedding import Instant, TimeEmbedding, sinusoids

__all__ = ["CogVideoXTransformer", "Positions", "diffusers_names", "make_positions"]


class CogVideoXTransformer(nn.Module):
    """Predicts v from noisy latents, a prompt and a time step.

    Built directly, its weights are drawn (`initialize`); build it under `torch.device("meta")` to load some, as
    `from_folder` does.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.sequence: SequenceGroup | None = None
        """The ranks that divide the token stream; every one is called with the same input and returns all of v."""
        self.patch_embed = _PatchEmbed(config)
        self.time_embedding = TimeEmbedding(config.width, config.time_embed_dim)
        self.ofs_embedding = None
        if config.ofs_embed_dim:
            self.ofs_embedding = TimeEmbedding(config.ofs_embed_dim, config.ofs_embed_dim)
        self.modulation = Modulation(config)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_final = nn.LayerNorm(
            config.width, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine
        )
        self.norm_out = _OutputNorm(config)
        patch = config.patch_size**2 * (config.patch_size_t or 1)
        self.proj_out = Linear(config.width, config.out_channels * patch)
        if not self.proj_out.weight.is_meta:
            self.initialize()

    def forward(
        self,
        latents: Tensor,
        prompt_embeds: Tensor,
        timesteps: Tensor | Instant,
        *,
        positions: Positions | None,
        ofs: Tensor | None = None,
        shortcut: Shortcut | None = None,
    ) -> Tensor:
        """Return the v prediction [B, F, out_channels, H, W].

        Args:
            latents: [B, F, C, H, W], in the model's dtype; the image's channels after the video's where there is one.
            prompt_embeds: [B, T, text_embed_dim]; all rows are attended to, there is no mask.
            timesteps: [B], any number type; or one of `instants`, for samples of one time.
            positions: of this shape, from `positions` or `make_positions`.
            ofs: [1] or [B], for CogVideoX1.5-I2V only (always 2.0 there); an instant knows it.
            shortcut: what may leave out blocks, when a video is made.

        Raises:
            FactoryError: positions or `ofs` that are missing or of another shape; a size the model cannot take.
        """
        check_transformer_input(
            self.config, tuple(latents.shape), text_length=prompt_embeds.shape[1],
            tokens=None if positions is None else (positions.text_length, positions.num_video_tokens),
        )  # fmt: skip
        assert positions is not None
        if isinstance(timesteps, Instant):
            now = timesteps
        else:
            conditioning = F.silu(self._embed_time(timesteps, ofs, latents.dtype))
            now = Instant(
                blocks=split_vectors(self.modulation(conditioning)), output=self.norm_out.vectors(conditioning)
            )
        text_length, rotary, share = positions.text_length, positions.rotary, None
        if self.sequence is not None:
            share = Share(sequence=self.sequence, num_tokens=text_length + positions.num_video_tokens)
            text_length, rotary = share.num_text_rows(text_length), positions.rotary_of(share)

        def block(x: Tensor, index: int) -> Tensor:
            own = now.blocks[index * VECTORS_PER_BLOCK : (index + 1) * VECTORS_PER_BLOCK]
            # Nobody reads the text behind the last attention. But ranks that divide the stream keep equal numbers of
            # rows to the end, text and all: few, and then one all-gather does.
            video_only = share is None and index == len(self.transformer_blocks) - 1
            return self.transformer_blocks[index](x, own, rotary, text_length, share, video_only)

        def through(x: Tensor, first: int, last: int) -> Tensor:
            for index in range(first, last):
                x = block(x, index)
            return x

        x = self.patch_embed(latents, prompt_embeds, positions, share)  # [B, S, D]
        count = len(self.transformer_blocks)
        if shortcut is None:  # not `through`, whose caller would hold the first stream to the end
            for index in range(count):
                x = block(x, index)
        else:
            x = shortcut(x, through, count, x.shape[1] if share is None else share.num_token_rows)
        x = self.proj_out(self.norm_out(self.norm_final(x), *now.output))  # [B, N, P]
        x = x if share is None else gather_rows(x, share)[:, positions.text_length :]
        return self._unpatchify(x, latents.shape)

    def positions(
        self,
        *,
        latent_frames: int,
        latent_height: int,
        latent_width: int,
        text_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> Positions:
        """Return `make_positions` for this model."""
        return make_positions(
            self.config, latent_frames, latent_height, latent_width, text_length, torch.device(device), dtype
        )

    def set_checkpointing(self, mode: str, num_layers: int | None = None) -> None:
        """Choose what a block keeps for its backward pass: "none", "full" or "save_attention" (see `checkpointing`).

        With `num_layers` the first so many do, and the rest keep everything. The first, because the backward pass
        begins at the end: what the last layers kept is gone before the first recompute of another.

        Raises:
            FactoryError: no such mode, or not so many layers.
        """
        count = len(self.blocks)
        if num_layers is not None and not 1 <= num_layers <= count:
            raise FactoryError(
                f"checkpointing_layers={num_layers}: this model has {count} layers. Use 1 to {count}, or none for all."
            )
        for index, block in enumerate(self.blocks):
            block.set_checkpointing(mode if index < (num_layers or count) else "none")

    @property
    def checkpointing(self) -> Checkpointing:
        """What the blocks keep, the first at least."""
        return self.blocks[0].checkpointing

    @property
    def blocks(self) -> list[Block]:
        """All blocks, in order."""
        return cast(list[Block], list(self.transformer_blocks))

    def embed_time(self, timesteps: Tensor, ofs: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Return the embedding of `timesteps` [B] (and ofs) in `dtype`: [B, E]. It is all that the norms need to know.

        Raises:
            FactoryError: `ofs` where the model has none, or the reverse.
        """
        return self._embed_time(timesteps, ofs, dtype)

    def _embed_time(self, timesteps: Tensor, ofs: Tensor | None, dtype: torch.dtype) -> Tensor:
        # Apart, because sharding wraps the public method as it does `forward`, which calls this one.
        config = self.config
        check_ofs(config, is_given=ofs is not None)
        embedding = self.time_embedding(sinusoids(timesteps, config.width, config).to(dtype))
        if self.ofs_embedding is not None and ofs is not None:
            assert config.ofs_embed_dim is not None
            embedding = embedding + self.ofs_embedding(sinusoids(ofs, config.ofs_embed_dim, config).to(dtype))
        return embedding

    def instants(self, embeddings: Tensor) -> list[Instant]:
        """Return what `forward` needs to know of each of T times, from their `embed_time` [T, E].

        One product with the modulation's weights, a sixth of the model's, for all of them, and none in the steps.
        """
        conditioning = F.silu(embeddings)
        vectors = self.modulation(conditioning)  # [T, 12N, D]
        shifts, scales = self.norm_out.vectors(conditioning)  # each [T, 1, D]
        return [
            Instant(blocks=own.unbind(0), output=(shifts[i : i + 1], scales[i : i + 1]))
            for i, own in enumerate(vectors.unbind(0))
        ]

    def _unpatchify(self, tokens: Tensor, shape: torch.Size) -> Tensor:
        """Return [B, F, C, H, W] of the `shape` of the latents, but with out_channels, from `tokens` [B, N, P]."""
        batch, frames, _, height, width = shape
        p, p_t, channels = self.config.patch_size, self.config.patch_size_t or 1, self.config.out_channels
        x = tokens.view(batch, frames // p_t, height // p, width // p, channels, p_t, p, p)
        return x.permute(0, 1, 5, 4, 2, 6, 3, 7).reshape(batch, frames, channels, height, width)

    @torch.no_grad()
    def initialize(self, seed: int = 0) -> None:
        """Draw all weights anew from `seed`, see `initial_weights`."""
        own = self.state_dict()
        for name, slot in diffusers_names(self.config).items():
            held = _held(own[slot.name], slot)
            if held:
                target, rows = held
                values = initial_weight(self.config, name, slot.shape, seed=seed)
                target.copy_(to_tensor(values[rows]).reshape(target.shape))

    def load_arrays(self, arrays: Iterable[tuple[str, np.ndarray | StoredTensor]], *, strict: bool = True) -> None:
        """Copy arrays under their diffusers names into the model, one at a time, in the model's dtype.

        Args:
            arrays: (name, array) pairs; a generator is read once and never held. Of what lies in a file, a process that
                holds some rows of a weight reads those alone.
            strict: every tensor of the model must come.

        Raises:
            UnfitError: names that are missing, unknown or double, or shapes that differ; the model is then unusable.
        """
        own, slots = self.state_dict(), diffusers_names(self.config)
        missing, wrong = dict.fromkeys(slots), []
        for name, array in arrays:
            slot = slots.get(name)
            if slot is None:
                wrong.append(f"{name} is not in this model")
            elif tuple(array.shape) != slot.shape:
                wrong.append(f"{name} is {list(array.shape)}, expected {list(slot.shape)}")
            elif name not in missing:
                wrong.append(f"{name} comes twice")
            else:
                held = _held(own[slot.name], slot)
                if held:
                    target, rows = held
                    target.copy_(to_tensor(array[rows]).reshape(target.shape))
            missing.pop(name, None)
        if strict:
            wrong += [f"{name} is missing" for name in missing]
        if wrong:
            raise UnfitError(
                f"these weights do not fit the model of their config in {len(wrong)} places: {'; '.join(wrong[:5])}"
                f"{'; …' if len(wrong) > 5 else ''}. Weights and config.json must be of one model."
            )

    def iterate_arrays(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (diffusers name, array) of all weights; on a CPU they share the model's memory.

        Weights that processes divide are gathered one parameter at a time; all of them must come to the end.
        """
        own = self.state_dict()
        slots: dict[str, list[str]] = {}
        names = diffusers_names(self.config)
        for name, slot in names.items():
            slots.setdefault(slot.name, []).append(name)
        for parameter, parts in slots.items():
            tensor = whole(own[parameter])
            for name in parts:
                slot = names[name]
                yield name, to_array(tensor[slot.start : slot.stop]).reshape(slot.shape)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Return `iterate_arrays` as a dict."""
        return dict(self.iterate_arrays())

    @classmethod
    def from_folder(
        cls,
        folder: Path | str,
        *,
        config: TransformerConfig | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        verify: bool = True,
    ) -> Self:
        """Load a `transformer` folder in the diffusers layout; no more than one tensor is held twice.

        A folder of weights alone needs their `config`. Without `verify` the digests of files are not looked at.

        Raises:
            MissingError, UnfitError: no weights, damaged ones, or ones of another shape than the config's.
        """
        folder = Path(folder)
        with torch.device("meta"):
            model = cls(config or TransformerConfig.from_folder(folder))
        model = model.to(dtype).to_empty(device=device)
        model.load_folder(folder, verify=verify)
        return model

    @torch.no_grad()
    def load_folder(self, folder: Path, *, verify: bool = True) -> None:
        """Fill the model, or what this process holds of it, from a `transformer` folder.

        Raises:
            MissingError, UnfitError: as `from_folder`.
        """
        self.load_arrays(weights.stored_tensors(folder, weights.MODEL_STEM, verify=verify))

    def save(self, folder: Path | str) -> None:
        """Write config and weights so that diffusers and `from_folder` load them; complete or not at all.

        Raises:
            StorageError: the disk is full, read-only or failing.
        """
        weights.save_folder(Path(folder), self.iterate_arrays(), config=self.config.to_dict(), stem=weights.MODEL_STEM)


def _held(parameter: Tensor, slot: Slot) -> tuple[Tensor, slice] | None:
    """Return what this process holds of the rows of `slot`, and which rows of the checkpoint's tensor these are."""
    first, last = rows_of(parameter)
    low, high = max(first, slot.start), min(last, slot.stop)
    if low >= high:
        return None
    target = local(parameter.detach())[low - first : high - first]
    is_by_rows = slot.shape[0] == slot.stop - slot.start  # or it is one row
    return target, slice(low - slot.start, high - slot.start) if is_by_rows else slice(None)


class _PatchEmbed(nn.Module):
    """Cuts latents into patches and joins their tokens behind the text's."""

    pos_embedding: Tensor

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.patch_size, self.patch_size_t = config.patch_size, config.patch_size_t or 1
        patch = config.in_channels * config.patch_size**2 * self.patch_size_t
        # In 1.5 files `patch_bias` is false and yet there is a bias.
        self.proj = Linear(patch, config.width, bias=config.patch_bias or config.patch_size_t is not None)
        self.text_proj = Linear(config.text_embed_dim, config.width)
        if config.use_learned_positional_embeddings:
            tokens = config.max_text_seq_length + num_native_tokens(config)
            self.register_buffer("pos_embedding", torch.empty(1, tokens, config.width))

    def forward(
        self, latents: Tensor, prompt_embeds: Tensor, positions: Positions, share: Share | None = None
    ) -> Tensor:
        """Return [B, S, D], or the rows of `share`, from `latents` [B, F, C, H, W] and `prompt_embeds` [B, T, ...]."""
        batch, frames, channels, height, width = latents.shape
        p, p_t = self.patch_size, self.patch_size_t
        x = latents.reshape(batch, frames // p_t, p_t, channels, height // p, p, width // p, p)
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)  # [B, N, C * p_t * p * p]
        text, added = prompt_embeds, positions.added
        learned = self.pos_embedding if positions.learned else None
        if share is not None:
            behind = text.shape[1]
            text, x = share.cut(text, dim=1), share.cut(x, dim=1, start=behind)
            added = None if added is None else share.cut(added, dim=0, start=behind)
            learned = None if learned is None else share.cut(learned, dim=1)
        x = self.proj(x)
        if added is not None:
            x = x + added
        x = torch.cat([self.text_proj(text), x], dim=1)  # [B, S, D]
        x = x if learned is None else x + learned
        return x if share is None else share.fill(x, dim=1)


class _OutputNorm(nn.Module):
    """The last adaptive norm, over video tokens only; it has no gate."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.linear = Linear(config.time_embed_dim, 2 * config.width)
        self.norm = nn.LayerNorm(config.width, eps=config.norm_eps, elementwise_affine=config.norm_elementwise_affine)

    def vectors(self, conditioning: Tensor) -> tuple[Tensor, Tensor]:
        """Return shift and scale, each [B, 1, D], from `conditioning` [B, E], the activated time embedding."""
        shift, scale = self.linear(conditioning).unsqueeze(1).chunk(2, dim=-1)
        return shift, 1 + scale

    def forward(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Return `x` [B, N, D] normalised, scaled and shifted."""
        return torch.addcmul(shift, self.norm(x), scale)
