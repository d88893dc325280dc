"""A complete CogVideoX model folder, small enough that a CPU runs it in milliseconds, with random weights.

Everything is there that a published folder has (diffusers layout: transformer, VAE, T5 encoder, tokenizer,
scheduler, pipeline index) with the architecture of the variant asked for, so whatever loads this folder loads
the real one. It predicts noise; it serves tests and dry runs.
"""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from cogvideox_factory import draws
from cogvideox_factory.errors import FactoryError, nearest
from cogvideox_factory.models import PUBLISHED, ModelFacts, tiny_facts
from cogvideox_factory.publish import publish_folder
from cogvideox_factory.tiny import tokenizer
from cogvideox_factory.tiny.layout import Shapes, text_encoder_shapes, transformer_shapes, vae_shapes
from cogvideox_factory.weights import load_folder, read_config, save_folder

DTYPES: dict[str, Any] = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
"""Dtypes a folder can be stored in."""


def build_tiny_model(folder: Path | str, variant: str, seed: int = 0, dtype: str = "float32") -> Path:
    """Write the tiny model folder of a published `variant` and return its path.

    The same seed gives the same bytes.

    Args:
        folder: where; it must not exist yet, and appears only when complete.
        variant: a key of `models.PUBLISHED`, say `cogvideox-2b`.
        seed: of the random weights.
        dtype: what the weights are stored in, a key of `DTYPES`.

    Raises:
        FactoryError: no such variant or dtype.
        StorageError: `folder` exists or cannot be written.
    """
    if variant not in PUBLISHED:
        raise FactoryError(
            f"variant={variant!r} is no published CogVideoX{nearest(variant, list(PUBLISHED))}. "
            f"Choose one of: {', '.join(PUBLISHED)}."
        )
    if dtype not in DTYPES:
        raise FactoryError(f"dtype={dtype!r}: choose one of {', '.join(DTYPES)}.")
    facts, text_config = tiny_facts(variant), text_encoder_config(dtype=dtype)
    parts = (
        ("transformer", transformer_shapes(facts.transformer), facts.transformer.to_dict()),
        ("vae", vae_shapes(facts.vae), facts.vae.to_dict()),
        ("text_encoder", text_encoder_shapes(text_config), text_config),
    )
    with publish_folder(Path(folder)) as root:
        for part, shapes, config in parts:
            stem = "model" if part == "text_encoder" else "diffusion_pytorch_model"
            save_folder(root / part, _random_arrays(part, shapes, seed, dtype), config=config, stem=stem)
        tokenizer.save(root / "tokenizer")
        scheduler = {**facts.scheduler.to_dict(), "_class_name": _scheduler_class(variant)}
        _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(root / "model_index.json", _pipeline_index(facts, scheduler["_class_name"]))
    return Path(folder)


def assemble_model(
    folder: Path | str, task: str, *, vae: Path, transformer: Path | None = None, dtype: str = "float32", seed: int = 0
) -> Path:
    """Write a CogVideoX1.5-style model folder from trained parts and return its path.

    The text encoder is drawn from `seed` and stays as it is: its embeddings tell words and their neighbours apart,
    which is all that a small world asks of them.

    Args:
        folder: where; it must not exist yet.
        task: "t2v" or "i2v".
        vae: folder of a VAE.
        transformer: folder of a transformer; without one the model is there for one to be trained.
        dtype: what all weights are stored in.

    Raises:
        StorageError: `folder` exists or cannot be written.
        MissingError, UnfitError: a part that is not there or damaged.
    """
    facts = PUBLISHED["cogvideox1.5-5b" if task == "t2v" else "cogvideox1.5-5b-i2v"]
    text_config = text_encoder_config(width=64, dtype=dtype)
    with publish_folder(Path(folder)) as root:
        for part, source in (("vae", vae), ("transformer", transformer)):
            if source is not None:
                arrays = {name: array.astype(DTYPES[dtype]) for name, array in load_folder(source).items()}
                save_folder(root / part, arrays, config=read_config(source))
        text = _random_arrays("text_encoder", text_encoder_shapes(text_config), seed, dtype)
        name = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        text[name] = _neighbourly_bias(text_config).astype(DTYPES[dtype])
        save_folder(root / "text_encoder", text, config=text_config, stem="model")
        tokenizer.save(root / "tokenizer")
        scheduler = {**facts.scheduler.to_dict(), "_class_name": "CogVideoXDPMScheduler"}
        _write_json(root / "scheduler" / "scheduler_config.json", scheduler)
        _write_json(root / "model_index.json", _pipeline_index(facts, scheduler["_class_name"]))
    return Path(folder)


def _neighbourly_bias(config: dict[str, Any]) -> np.ndarray:
    """Return T5's position bias [buckets, heads] that lets every head look at near words: behind, or ahead.

    The first half of the buckets is for words behind and at the token itself, the second for words ahead.
    """
    half = config["relative_attention_num_buckets"] // 2
    distance = np.arange(half, dtype=np.float32)
    bias = np.zeros((2 * half, config["num_heads"]), np.float32)
    for head in range(config["num_heads"]):
        behind, ahead = (1.0, 4.0) if head % 2 == 0 else (4.0, 1.0)
        bias[:half, head], bias[half:, head] = -behind * distance, -ahead * distance
    return bias


def text_encoder_config(*, width: int = 32, dtype: str = "float32") -> dict[str, Any]:
    """Return config.json of a small T5 v1.1 encoder; `tiny_facts` expects a width of 32."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": width,
        "d_kv": 16,
        "d_ff": 2 * width,
        "num_heads": 2,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "vocab_size": len(tokenizer.vocabulary()),
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "is_encoder_decoder": True,
        "dropout_rate": 0.1,
        "initializer_factor": 1.0,
        "layer_norm_epsilon": 1e-06,
        "relative_attention_max_distance": 128,
        "relative_attention_num_buckets": 32,
        "decoder_start_token_id": tokenizer.PAD_ID,
        "pad_token_id": tokenizer.PAD_ID,
        "eos_token_id": tokenizer.EOS_ID,
        "tie_word_embeddings": False,
        "output_past": True,
        "use_cache": True,
        "dtype": dtype,
    }


def _random_arrays(part: str, shapes: Shapes, seed: int, dtype: str) -> dict[str, np.ndarray]:
    return {
        name: _random_array(name, draws.normal(seed, "tiny model", part, name, shape=shape)).astype(DTYPES[dtype])
        for name, shape in shapes.items()
    }


def _random_array(name: str, noise: np.ndarray) -> np.ndarray:
    """Scale standard normal `noise` [shape of tensor `name`] so that activations keep their size."""
    if name == "encoder.conv_out.conv.bias":  # means, then log-variances: a VAE that is sure of what it sees
        return 0.1 * noise + np.repeat(np.array([0, -4], np.float32), len(noise) // 2)
    if name.endswith("conv_y.conv.bias"):  # multiplies the normalised features
        return 1 + 0.1 * noise
    if name.endswith(".bias"):
        return 0.1 * noise
    if noise.ndim == 1:  # a norm's gain
        return 1 + 0.1 * noise
    if name == "shared.weight" or "relative_attention_bias" in name:
        return noise
    if name == "patch_embed.pos_embedding":
        return 0.5 * noise
    gain = 1.0
    if name.endswith("SelfAttention.q.weight"):  # T5 has no 1/sqrt(head size) in its attention
        gain = 16**-0.5
    elif name.endswith(
        (
            ".norm1.linear.weight",
            ".norm2.linear.weight",
            "norm_out.linear.weight",
            "decoder.conv_out.conv.weight",
        )
    ):
        gain = 0.5  # modulations near 1; pixels within [-1, 1] nearly always
    return noise * np.float32(gain * np.prod(noise.shape[1:]) ** -0.5)


def _scheduler_class(variant: str) -> str:
    return "CogVideoXDDIMScheduler" if variant == "cogvideox-2b" else "CogVideoXDPMScheduler"


def _pipeline_index(facts: ModelFacts, scheduler_class: str) -> dict[str, Any]:
    image = facts.transformer.is_image_to_video
    return {
        "_class_name": "CogVideoXImageToVideoPipeline" if image else "CogVideoXPipeline",
        "_diffusers_version": "0.31.0",
        "scheduler": ["diffusers", scheduler_class],
        "text_encoder": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "T5Tokenizer"],
        "transformer": ["diffusers", facts.transformer.class_name()],
        "vae": ["diffusers", facts.vae.class_name()],
    }


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
