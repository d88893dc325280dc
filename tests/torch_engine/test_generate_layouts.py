"""Every model in every layout on 2 and 4 processes, with LoRAs and without: the frames of one process.

And divided weights are read as they are divided: no process reads or holds those of the others.
"""

from itertools import product

import numpy as np
import pytest
import torch

from cogvideox_factory.models import TransformerConfig
from cogvideox_factory.ranks import Layout
from cogvideox_factory.torch_engine.border import local
from cogvideox_factory.torch_engine.loading import Keeping, load_pipeline
from cogvideox_factory.torch_engine.ranks import Ranks, make_ranks
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from tests.torch_engine.processes import run_in
from tests.torch_engine.test_generate import make_lora
from tests.torch_engine.test_loading import Reads

CPU = torch.device("cpu")
VARIANTS = ("cogvideox-2b", "cogvideox-5b", "cogvideox-5b-i2v", "cogvideox1.5-5b", "cogvideox1.5-5b-i2v")
LAYOUTS = {
    2: ({"guidance": 2}, {"sequence": 2}, {"zero": 3}),
    4: ({"sequence": 4}, {"guidance": 2, "sequence": 2}, {"guidance": 2, "sequence": 2, "zero": 3}),
}
CASES = {
    size: [
        # Each layout has both kinds of model with a LoRA and without, decoded in tiles and by rows.
        (variant, layout, (number + index // 2) % 2 == 0, (number + index) % 2 == 0)
        for (number, layout), (index, variant) in product(enumerate(LAYOUTS[size]), enumerate(VARIANTS))
    ]
    for size in LAYOUTS
}


def load(root, variant, ranks, *, with_lora, tiling):
    folder = root / variant
    return load_pipeline(
        folder, transformer_folder=folder / "transformer", config=TransformerConfig.from_folder(folder / "transformer"),
        dtype=torch.float32, device=CPU, tiling=tiling, loras=[str(root / f"{variant}.safetensors")] * with_lora,
        lora_weights=[0.7] * with_lora, keeping=Keeping(), ranks=ranks,
    )  # fmt: skip


def video(pipe):
    config = pipe.transformer.config
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, config.max_text_seq_length, config.text_embed_dim, generator=draw)
    height, width = (64, 96) if config.use_learned_positional_embeddings else (32, 48)
    rows, columns = np.mgrid[0:height, 0:width]
    picture = np.stack([rows * 3, columns * 2, 255 - rows * 3], axis=-1).astype(np.uint8)
    if pipe.vae.tiles is not None:
        pipe.vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=24)
    return pipe(
        prompt_embeds=embeds[:1], negative_prompt_embeds=embeds[1:],
        image=picture if config.is_image_to_video else None, height=height, width=width,
        num_frames=9, num_inference_steps=2,
    ).frames[0]  # fmt: skip


def make_each(root, size):
    """Make every video; return (frames, bytes read of the transformer, bytes held of it) of each."""
    reads, found, load_folder = Reads(), [], CogVideoXTransformer.load_folder

    def counted(self, folder, **options):
        reads.total = 0
        load_folder(self, folder, **options)
        found.append(reads.total)

    known = {
        str(layout): make_ranks(Layout(size=size, **layout), num_heads=2, device_type="cpu") for layout in LAYOUTS[size]
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CogVideoXTransformer, "load_folder", counted)
        for variant, layout, with_lora, tiling in CASES[size]:
            pipe = load(root, variant, known[str(layout)], with_lora=with_lora, tiling=tiling)
            held = sum(local(tensor).nbytes for tensor in pipe.transformer.state_dict().values())
            found.append((video(pipe), found.pop(), held))
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("layouts")
    for variant in VARIANTS:
        (folder / variant).symlink_to(tiny_model(variant))
        make_lora(tiny_model, folder / f"{variant}.safetensors", variant=variant, seed=1)
    return folder


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_model_makes_the_same_frames_in_every_layout(root, size, tmp_path):
    results = run_in(size, make_each, root, size, folder=tmp_path)
    alone = {}
    for number, (variant, layout, with_lora, tiling) in enumerate(CASES[size]):
        case = variant, with_lora, tiling
        if case not in alone:
            alone[case] = load(root, variant, Ranks(layout=Layout()), with_lora=with_lora, tiling=tiling)
            alone[case] = video(alone[case]), *sizes_of(alone[case].transformer)
        expected, whole, undivided, adapters = alone[case]
        assert expected.std() > 5, "a constant picture would prove nothing"
        for by_rank in results:
            frames, read, held = by_rank[number]
            assert np.abs(frames.astype(int) - expected).max() <= 1, (layout, *case)
            if layout.get("zero") == 3:
                part = (whole - undivided) / size
                assert held - undivided < 1.2 * part, case
                assert read - undivided < 1.2 * part, case
            else:
                assert (read, held) == (whole - adapters, whole)
    kinds = {(str(layout), "i2v" in variant, with_lora) for variant, layout, with_lora, _ in CASES[size]}
    assert len(kinds) == 4 * len(LAYOUTS[size]), "t2v and i2v, with a LoRA and without, in every layout"


def sizes_of(transformer):
    """Return the bytes of all tensors, of those that no layout divides, and of LoRAs."""
    tensors = transformer.state_dict()
    parts = (lambda name: True), (lambda name: name.endswith("pos_embedding")), (lambda name: "lora_" in name)
    return [sum(tensor.nbytes for name, tensor in tensors.items() if fits(name)) for fits in parts]
