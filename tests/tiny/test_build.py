import hashlib
import json
import subprocess
import sys

import numpy as np
import pytest

from cogvideox_factory.errors import FactoryError, StorageError
from cogvideox_factory.models import LARGER, PUBLISHED, tiny_facts
from cogvideox_factory.tiny import tokenizer
from cogvideox_factory.tiny.build import build_tiny_model
from cogvideox_factory.tiny.layout import transformer_shapes, vae_shapes
from cogvideox_factory.tiny.world import random_scene
from cogvideox_factory.weights import load_folder

VARIANTS = list(PUBLISHED)


def hashes(folder):
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_the_same_seed_gives_the_same_bytes(tmp_path):
    one = build_tiny_model(tmp_path / "one", "cogvideox1.5-5b-i2v", seed=3)
    same = build_tiny_model(tmp_path / "same", "cogvideox1.5-5b-i2v", seed=3)
    other = build_tiny_model(tmp_path / "other", "cogvideox1.5-5b-i2v", seed=4)
    assert hashes(one) == hashes(same)
    changed = {name for name, value in hashes(one).items() if hashes(other)[name] != value}
    assert {name.split("/")[0] for name in changed} == {"transformer", "vae", "text_encoder"}


def test_a_folder_is_never_overwritten(tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(StorageError, match="exists already"):
        build_tiny_model(tmp_path / "mine", "cogvideox-2b")
    assert list((tmp_path / "mine").iterdir()) == []


def test_unknown_names_are_answered_with_the_nearest(tmp_path):
    with pytest.raises(FactoryError, match=r"did you mean 'cogvideox-5b-i2v'"):
        build_tiny_model(tmp_path / "x", "cogvideox-5b-i2")
    with pytest.raises(FactoryError, match="bfloat16"):
        build_tiny_model(tmp_path / "x", "cogvideox-2b", dtype="float8")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [*VARIANTS, *LARGER])
def test_shapes_add_up_to_the_published_parameter_counts(name):
    config = PUBLISHED[name].transformer if name in PUBLISHED else LARGER[name]
    shapes = transformer_shapes(config)
    shapes.pop("patch_embed.pos_embedding", None)  # a buffer
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == config.num_parameters


def test_the_published_vae_has_its_215_million_parameters():
    shapes = vae_shapes(PUBLISHED["cogvideox-2b"].vae)
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 215_583_907


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_weights_are_stored_in_the_dtype_asked_for(tiny_model, dtype):
    folder = tiny_model("cogvideox-5b", 0, dtype)
    for part, stem in (("transformer", "diffusion_pytorch_model"), ("text_encoder", "model")):
        assert {str(array.dtype) for array in load_folder(folder / part, stem).values()} == {dtype}
    assert json.loads((folder / "text_encoder" / "config.json").read_text())["dtype"] == dtype


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_loads_and_runs_every_variant(tiny_model, variant):
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    facts = tiny_facts(variant)
    image = {"image": torch.zeros(1, 3, 64, 96)} if facts.transformer.is_image_to_video else {}
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    pipe = kind.from_pretrained(tiny_model(variant))
    pipe.set_progress_bar_config(disable=True)
    dpm = type(pipe.scheduler).__name__ == "CogVideoXDPMScheduler"
    assert dpm == (variant != "cogvideox-2b")
    assert pipe.transformer.num_parameters() == facts.transformer.num_parameters
    latents = pipe(
        prompt="a red circle moves left", height=64, width=96, num_frames=9, num_inference_steps=1,
        max_sequence_length=16, output_type="latent", generator=torch.Generator().manual_seed(0), **image,
    ).frames  # fmt: skip
    frames = 3 + (facts.transformer.patch_size_t is not None)  # the 1.5 models take them in pairs
    assert latents.shape == (1, frames, 16, 8, 12)
    assert 0.1 < latents.std() < 3


def test_the_vae_neither_vanishes_nor_saturates(tiny_model):
    import diffusers
    import torch

    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(tiny_model("cogvideox-2b") / "vae")
    pixels = torch.rand(1, 3, 9, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        moments = vae.encode(pixels).latent_dist
        decoded = vae.decode(moments.mean).sample
    assert 0.2 < moments.mean.std() < 2
    assert moments.std.mean() < 0.3
    assert 0.2 < decoded.std() < 1


def test_the_tokenizer_is_t5s_and_spells_what_it_does_not_know(tiny_model):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    folder = tiny_model("cogvideox-2b") / "tokenizer"
    theirs, plain = AutoTokenizer.from_pretrained(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert type(theirs).__name__ == "T5Tokenizer"
    assert (theirs.pad_token_id, theirs.eos_token_id, theirs.unk_token_id) == (0, 1, 2)
    assert len(theirs) == len(tokenizer.vocabulary()) == len({piece for piece, _ in tokenizer.vocabulary()})
    for text in ("A red circle moves LEFT!", "xylophone 42% (don't)", "", "  two  spaces "):
        ids = theirs(text).input_ids
        assert ids == plain.encode(text).ids
        assert ids[-1] == tokenizer.EOS_ID
        assert tokenizer.UNK_ID not in ids
        assert theirs.decode(ids, skip_special_tokens=True) == " ".join(text.split())
    assert theirs("é").input_ids[-2] == tokenizer.UNK_ID


def test_captions_of_the_moving_shapes_take_one_token_a_word():
    from tokenizers import Tokenizer, models, pre_tokenizers

    model = Tokenizer(models.Unigram(tokenizer.vocabulary(), unk_id=tokenizer.UNK_ID))
    model.pre_tokenizer = pre_tokenizers.Metaspace()
    for index in range(20):
        caption = random_scene(0, index).caption
        assert len(model.encode(caption).ids) == len(caption.split())


def test_building_needs_no_framework(tmp_path):
    code = (
        "import sys; from cogvideox_factory.tiny.build import build_tiny_model; "
        f"build_tiny_model({str(tmp_path / 'm')!r}, 'cogvideox-2b'); "
        "assert not {'torch', 'transformers', 'diffusers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
