"""The CogVideoX family as tables of facts, and the configs that describe one model.

The field names and defaults are those of the `config.json` files the checkpoints ship with (diffusers layout), so
a checkpoint's own config is read by name and the tables below serve only where there is none: tests, `plan`, and
models built from scratch. Sizes are latent sizes (pixels / 8) where the config's are.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from math import log2
from pathlib import Path
from typing import Any, Literal, Self

from cogvideox_factory.errors import UnfitError, nearest
from cogvideox_factory.json_object import read_object
from cogvideox_factory.strict_yaml import read_yaml


@dataclass(frozen=True, kw_only=True, slots=True)
class _Config:
    """Reading from and writing to a diffusers `config.json`."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], *, source: str) -> Self:
        """Build from a parsed config file, ignoring private keys (`_class_name`, `_diffusers_version`, …).

        Raises:
            UnfitError: a key this model family does not have; silently dropping one changes the model.
        """
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in values.items() if not key.startswith("_")}
        for key in given:
            if key not in known:
                raise UnfitError(
                    f"{source}: unknown key {key!r}{nearest(key, sorted(known))}. "
                    f"A {cls.class_name()} has: {', '.join(sorted(known))}."
                )
        for field in fields(cls):
            _check_type(field.name, given.get(field.name, field.default), field.default, source=source)
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in given.items()})

    @classmethod
    def from_folder(cls, folder: Path, *, filename: str = "config.json") -> Self:
        """Read `folder/filename`."""
        path = Path(folder) / filename
        if not path.is_file():
            raise UnfitError(
                f"{path} is missing, so {folder} is no {cls.class_name()} folder in the diffusers layout. "
                "Give the model's root folder, the one that holds transformer/, vae/, text_encoder/ and tokenizer/."
            )
        return cls.from_dict(read_object(path, way_out="Download the model again."), source=str(path))

    @classmethod
    def class_name(cls) -> str:
        raise AssertionError("set by each config")

    def to_dict(self) -> dict[str, Any]:
        """Return what `config.json` holds, `_class_name` included."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return {"_class_name": self.class_name(), **values}


def _check_type(name: str, value: Any, default: Any, *, source: str) -> None:
    """Refuse a value of another kind than the default's; a field that may be absent takes numbers and lists."""
    kinds: tuple[type, ...] = (int, float, list, type(None)) if default is None else (type(default),)
    kinds += (int,) if float in kinds else ()
    kinds += (float,) if isinstance(default, int) and not isinstance(default, bool) and isinstance(value, float) else ()
    kinds += (list,) if tuple in kinds else ()
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise UnfitError(f"{source}: {name}={value!r} is no {kinds[0].__name__}. Download the model again.")


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig(_Config):
    """Shape of a CogVideoX transformer; `sample_*` are latent sizes, `sample_frames` pixel frames."""

    num_attention_heads: int = 30
    attention_head_dim: int = 64
    in_channels: int = 16
    out_channels: int = 16
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    time_embed_dim: int = 512
    ofs_embed_dim: int | None = None
    text_embed_dim: int = 4096
    num_layers: int = 30
    dropout: float = 0.0
    attention_bias: bool = True
    sample_width: int = 90
    sample_height: int = 60
    sample_frames: int = 49
    patch_size: int = 2
    patch_size_t: int | None = None
    temporal_compression_ratio: int = 4
    max_text_seq_length: int = 226
    activation_fn: str = "gelu-approximate"
    timestep_activation_fn: str = "silu"
    norm_elementwise_affine: bool = True
    norm_eps: float = 1e-5
    spatial_interpolation_scale: float = 1.875
    temporal_interpolation_scale: float = 1.0
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    patch_bias: bool = True

    def __post_init__(self) -> None:
        for name, allowed in (
            ("activation_fn", "gelu-approximate"),
            ("timestep_activation_fn", "silu"),
            ("dropout", 0.0),
        ):
            if getattr(self, name) != allowed:
                raise UnfitError(
                    f"{name}={getattr(self, name)!r}: every CogVideoX checkpoint has {allowed!r}, "
                    "and this model knows no other."
                )
        if self.use_learned_positional_embeddings and not self.use_rotary_positional_embeddings:
            raise UnfitError(
                "use_learned_positional_embeddings needs use_rotary_positional_embeddings; "
                "no CogVideoX checkpoint has learned positions alone."
            )

    @classmethod
    def from_file(cls, path: Path) -> Self:
        """Read a `config.json`, or a YAML file with the same keys under `transformer`.

        Raises:
            UnfitError: missing, not readable as its name says, or with keys and values this family does not have.
        """
        if path.suffix not in (".yaml", ".yml"):
            return cls.from_folder(path.parent, filename=path.name)
        values = read_yaml(path)
        if set(values) != {"transformer"} or not isinstance(values["transformer"], dict):
            raise UnfitError(
                f"{path} must hold one mapping, `transformer:`, not {sorted(values)}. "
                "recipes/transformers/ has files to copy."
            )
        return cls.from_dict(values["transformer"], source=str(path))

    @classmethod
    def class_name(cls) -> str:
        """Return the diffusers class."""
        return "CogVideoXTransformer3DModel"

    @property
    def width(self) -> int:
        """Channels of the residual stream."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def is_image_to_video(self) -> bool:
        """Whether half of the input channels carry the conditioning image."""
        return self.in_channels == 2 * self.out_channels

    @property
    def num_parameters(self) -> int:
        """Exact parameter count (position buffers excluded), counted from the shapes."""
        d, t = self.width, self.time_embed_dim
        patch = self.patch_size**2 * (self.patch_size_t or 1)
        affine = 2 * d if self.norm_elementwise_affine else 0
        qkv = 3 * (d * d + (d if self.attention_bias else 0))
        qk_norm = 4 * self.attention_head_dim
        adaln = 2 * (t * 6 * d + 6 * d + affine)
        block = qkv + (d * d + d) + qk_norm + (4 * d * d + 4 * d) + (4 * d * d + d) + adaln
        patch_has_bias = self.patch_bias or self.patch_size_t is not None
        embed = self.in_channels * patch * d + (d if patch_has_bias else 0) + self.text_embed_dim * d + d
        time = d * t + t + t * t + t
        ofs = 2 * (self.ofs_embed_dim**2 + self.ofs_embed_dim) if self.ofs_embed_dim else 0
        head = affine + (t * 2 * d + 2 * d + affine) + d * patch * self.out_channels + patch * self.out_channels
        return self.num_layers * block + embed + time + ofs + head


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig(_Config):
    """Shape of the 3-D causal VAE; `sample_*` are pixels and only set the default tile."""

    in_channels: int = 3
    out_channels: int = 3
    down_block_types: tuple[str, ...] = ("CogVideoXDownBlock3D",) * 4
    up_block_types: tuple[str, ...] = ("CogVideoXUpBlock3D",) * 4
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    latent_channels: int = 16
    layers_per_block: int = 3
    act_fn: str = "silu"
    norm_eps: float = 1e-6
    norm_num_groups: int = 32
    temporal_compression_ratio: float = 4
    sample_height: int = 480
    sample_width: int = 720
    scaling_factor: float = 1.15258426
    shift_factor: float | None = None
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    force_upcast: bool = True
    use_quant_conv: bool = False
    use_post_quant_conv: bool = False
    invert_scale_latents: bool = False

    @classmethod
    def class_name(cls) -> str:
        """Return the diffusers class."""
        return "AutoencoderKLCogVideoX"

    @property
    def spatial_scale(self) -> int:
        """Pixels a latent covers in height and width: 8."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def num_time_levels(self) -> int:
        """How many changes of size also change the frame count."""
        return int(log2(self.temporal_compression_ratio))

    @property
    def image_scale(self) -> float:
        """What the sampling pipeline multiplies image latents by (1.5-I2V divides by the scaling factor)."""
        return 1 / self.scaling_factor if self.invert_scale_latents else self.scaling_factor


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig(_Config):
    """Noise schedule of the family. Defaults are the published files', not the scheduler class's."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = False
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "v_prediction"
    clip_sample_range: float = 1.0
    sample_max_value: float = 1.0
    timestep_spacing: Literal["linspace", "leading", "trailing"] = "trailing"
    rescale_betas_zero_snr: bool = True
    snr_shift_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.prediction_type != "v_prediction" or self.beta_schedule != "scaled_linear" or self.clip_sample:
            raise UnfitError(
                f"prediction_type={self.prediction_type!r}, beta_schedule={self.beta_schedule!r}, "
                f"clip_sample={self.clip_sample}: the CogVideoX family predicts v on a scaled_linear schedule "
                "without clipping. Check scheduler/scheduler_config.json of the model folder."
            )

    @classmethod
    def class_name(cls) -> str:
        """Return the diffusers class."""
        return "CogVideoXDDIMScheduler"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelFacts:
    """One model: its configs, and what its authors trained it for."""

    name: str
    hub_id: str | None
    transformer: TransformerConfig
    vae: VaeConfig
    scheduler: SchedulerConfig
    dtype: Literal["float16", "bfloat16"]
    fps: int
    num_frames: int
    height: int
    width: int


_T_2B = TransformerConfig()
_T_5B = replace(_T_2B, num_attention_heads=48, num_layers=42, use_rotary_positional_embeddings=True)
_T_5B_I2V = replace(_T_5B, in_channels=32, use_learned_positional_embeddings=True)
_T_15 = replace(_T_5B, patch_size_t=2, sample_height=300, sample_width=300, sample_frames=81, patch_bias=False)
_T_15_I2V = replace(_T_15, in_channels=32, ofs_embed_dim=512)
_VAE_2B = VaeConfig()
_VAE_5B = VaeConfig(scaling_factor=0.7)
_VAE_15 = VaeConfig(scaling_factor=0.7, invert_scale_latents=True)
_SHAPE_10 = {"fps": 8, "num_frames": 49, "height": 480, "width": 720}
_SHAPE_15 = {"fps": 16, "num_frames": 81, "height": 768, "width": 1360}
_S = SchedulerConfig()

PUBLISHED: dict[str, ModelFacts] = {
    facts.name: facts
    for facts in (
        ModelFacts(
            name="cogvideox-2b", hub_id="THUDM/CogVideoX-2b", transformer=_T_2B, vae=_VAE_2B,
            scheduler=SchedulerConfig(snr_shift_scale=3.0), dtype="float16", **_SHAPE_10,
        ),
        ModelFacts(
            name="cogvideox-5b", hub_id="THUDM/CogVideoX-5b", transformer=_T_5B, vae=_VAE_5B,
            scheduler=_S, dtype="bfloat16", **_SHAPE_10,
        ),
        ModelFacts(
            name="cogvideox-5b-i2v", hub_id="THUDM/CogVideoX-5b-I2V", transformer=_T_5B_I2V, vae=_VAE_5B,
            scheduler=_S, dtype="bfloat16", **_SHAPE_10,
        ),
        ModelFacts(
            name="cogvideox1.5-5b", hub_id="THUDM/CogVideoX1.5-5B", transformer=_T_15, vae=_VAE_15,
            scheduler=_S, dtype="bfloat16", **_SHAPE_15,
        ),
        ModelFacts(
            name="cogvideox1.5-5b-i2v", hub_id="THUDM/CogVideoX1.5-5B-I2V", transformer=_T_15_I2V, vae=_VAE_15,
            scheduler=_S, dtype="bfloat16", **_SHAPE_15,
        ),
    )
}  # fmt: skip

# 1.5-style models of other sizes; only head_dim and depth change (the names understate the real counts).
LARGER: dict[str, TransformerConfig] = {
    "10b": replace(_T_15, attention_head_dim=96, num_layers=48),
    "20b": replace(_T_15, attention_head_dim=128, num_layers=48),
    "30b": replace(_T_15, attention_head_dim=128, num_layers=64),
}


def tiny_facts(variant: str) -> ModelFacts:
    """Return a model with the architecture of a published `variant` that a CPU steps in milliseconds.

    Two layers and two heads; the head size, and with it the rotary split, stays the real one.
    """
    facts = PUBLISHED[variant]
    transformer = replace(
        facts.transformer, num_attention_heads=2, num_layers=2, time_embed_dim=32, text_embed_dim=32,
        ofs_embed_dim=32 if facts.transformer.ofs_embed_dim else None, max_text_seq_length=16,
        sample_height=8, sample_width=12, sample_frames=9,
    )  # fmt: skip
    vae = replace(
        facts.vae, block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1,
        sample_height=64, sample_width=96,
    )  # fmt: skip
    return replace(
        facts, name=f"tiny-{variant}", hub_id=None, transformer=transformer, vae=vae,
        num_frames=9, height=64, width=96, fps=8,
    )  # fmt: skip


def facts_for(config: TransformerConfig) -> ModelFacts:
    """Return the published model a transformer `config` is closest to: same family, task and task extras.

    It supplies what a checkpoint's own files do not say: the native fps and the dtype to run in.
    """
    is_15 = config.patch_size_t is not None
    if is_15:
        name = "cogvideox1.5-5b-i2v" if config.is_image_to_video else "cogvideox1.5-5b"
    elif config.is_image_to_video:
        name = "cogvideox-5b-i2v"
    else:
        name = "cogvideox-5b" if config.use_rotary_positional_embeddings else "cogvideox-2b"
    return PUBLISHED[name]
