"""Models that take turns: who is on the device when, and that no bit of a video depends on it."""

import weakref
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from cogvideox_factory import quality
from cogvideox_factory.lora_files import save_lora
from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine import generate, lora, prompts, swap
from cogvideox_factory.torch_engine.loading import Keeping, load_pipeline, load_text_encoder
from cogvideox_factory.torch_engine.low_bit import BASES
from cogvideox_factory.torch_engine.ranks import Ranks
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.stepping import CPU
from tests.torch_engine.test_generate import settings

NUM_LAYERS = 5
PLAIN = Keeping()
WAYS = [Keeping(offload="model"), Keeping(offload="block"), Keeping(offload="group", group=2)]


@pytest.fixture(scope="module")
def make(tiny_model, tmp_path_factory):
    """Return make(keeping, variant): a pipeline of five layers under a LoRA of weight 0.5."""
    root = tmp_path_factory.mktemp("turns")

    def build(keeping=PLAIN, variant="cogvideox-5b"):
        folder, own = tiny_model(variant), root / variant
        if not own.exists():
            config = replace(TransformerConfig.from_folder(folder / "transformer"), num_layers=NUM_LAYERS)
            model = CogVideoXTransformer(config)
            model.save(own)
            lora.add_lora(model, rank=4, alpha=4, seed=0, target_modules=["to_q", "ff.net.2", "norm1.linear"])
            draw = np.random.default_rng(0)
            arrays = {
                n: draw.standard_normal(a.shape).astype(np.float32) * 0.1 for n, a in lora.lora_arrays(model).items()
            }
            save_lora(own / "lora.safetensors", arrays, **lora.lora_settings(model))
        return load_pipeline(
            folder, transformer_folder=own, config=TransformerConfig.from_folder(own), dtype=torch.float32, device=CPU,
            tiling=True, loras=[str(own / "lora.safetensors")], lora_weights=[0.5], keeping=keeping,
            ranks=Ranks(layout=Layout()),
        )  # fmt: skip

    return build


def video(pipe, steps=2):
    """Two videos, one after the other, so that everything comes back."""
    size = pipe.transformer.config.max_text_seq_length, pipe.transformer.config.text_embed_dim
    embeds = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    picture = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    frames = pipe(
        prompt_embeds=embeds, negative_prompt_embeds=embeds[:1] * 0.1,
        image=picture if pipe.transformer.config.is_image_to_video else None, height=32, width=48, num_frames=9,
        num_inference_steps=steps,
    )  # fmt: skip
    return np.stack(frames.frames)


@pytest.fixture(scope="module")
def plain(make):
    """Return plain(variant): the videos of a pipeline that keeps everything as it is."""

    @cache
    def of(variant="cogvideox-5b"):
        made = video(make(variant=variant))
        assert made.std() > 5, "a constant picture would prove nothing"
        return made

    return of


@pytest.mark.parametrize("keeping", WAYS, ids=lambda keeping: keeping.offload)
@pytest.mark.parametrize("variant", ["cogvideox-5b", "cogvideox1.5-5b-i2v"])
def test_no_bit_of_a_video_depends_on_it(make, plain, keeping, variant):
    assert np.array_equal(video(make(keeping, variant)), plain(variant))


@pytest.fixture
def visits(monkeypatch):
    """Return a list of the bytes that are there after each coming and going, by pipeline: `clear` it between two."""
    seen, there = [], weakref.WeakKeyDictionary()

    def watched(method):
        def moved(self):
            method(self)
            there[self] = self._size if self.is_here else 0
            seen.append(sum(there.values()))

        return moved

    for name in ("arrive", "leave"):
        monkeypatch.setattr(swap.Visitor, name, watched(getattr(swap.Visitor, name)))
    return seen


def bytes_of(module):
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def test_one_model_is_there_at_a_time_and_two_blocks_of_it(make, visits):
    for keeping in WAYS:
        pipe = make(keeping)
        transformer, decoder, block = map(bytes_of, (pipe.transformer, pipe.vae.decoder, pipe.transformer.blocks[0]))
        visits.clear()
        video(pipe)
        here = {"model": NUM_LAYERS, "block": 2, "group": 4}[keeping.offload]
        most = max(transformer - (NUM_LAYERS - here) * block, decoder)
        assert most <= max(visits) <= 1.1 * most, keeping  # each tensor begins at a multiple of 256 bytes
        assert decoder <= visits[-1] <= 1.1 * decoder, "the decoder's turn was last"
        del pipe


def test_blocks_come_ahead_of_their_turn_around_the_end_of_a_step(make, monkeypatch):
    order, pipe = [], make(Keeping(offload="block"))
    number = {p: index for index, block in enumerate(pipe.transformer.blocks) for p in block.parameters()}
    for index, block in enumerate(pipe.transformer.blocks):
        block.register_forward_pre_hook(lambda module, args, index=index: order.append(("works", index)))
    arrive = swap.Visitor.arrive

    def arriving(self):
        if not self.is_here and self.parameters[0] in number:
            order.append(("comes", number[self.parameters[0]]))
        arrive(self)

    monkeypatch.setattr(swap.Visitor, "arrive", arriving)
    video(pipe)
    ahead = [("comes", 0)]  # a block's copy is asked for before the block ahead of it begins
    for _ in range(2):
        ahead += [step for i in range(NUM_LAYERS) for step in (("comes", (i + 1) % NUM_LAYERS), ("works", i))]
    assert order == 2 * ahead, "two steps, and between two videos the decoder's turn"


@pytest.mark.parametrize("base", BASES)
def test_few_bits_make_nearly_the_same_video_and_wait_like_any(make, plain, base, record_property):
    pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    rounded = video(make(Keeping(base=base)))
    found = quality.psnr(plain(), rounded)
    record_property("psnr", found)
    assert {"int8": 45, "fp8": 36, "nf4": 26}[base] < found < 80
    assert np.array_equal(video(make(Keeping(base=base, offload="block"))), rounded)


def test_the_text_encoder_waits_too_and_is_gone_before_the_transformer_comes(tiny_model, tmp_path, monkeypatch):
    folder = tiny_model("cogvideox-2b")
    options = {"dtype": torch.float32, "device": CPU}
    plain = load_text_encoder(folder, keeping=PLAIN, **options).encode(["a red circle", "a"], 16)
    for keeping in WAYS:
        encoder = load_text_encoder(folder, keeping=keeping, **options)
        assert torch.equal(encoder.encode(["a red circle", "a"], 16), plain)
        assert torch.equal(encoder.encode(["a red circle", "a"], 16), plain)
    known = []
    load, from_folder = prompts.load_text_encoder, CogVideoXTransformer.from_folder

    def loading(*args, **kwargs):
        encoder = load(*args, **kwargs)
        known.append(weakref.ref(encoder.model.get_input_embeddings().weight))
        return encoder

    def transformer(*args, **kwargs):
        assert known
        assert known[0]() is None, "the text encoder is still in memory"
        return from_folder(*args, **kwargs)

    monkeypatch.setattr(prompts, "load_text_encoder", loading)
    monkeypatch.setattr(CogVideoXTransformer, "from_folder", transformer)
    generate.run(settings(tiny_model, tmp_path, prompt=["x"]))
