"""Folding a LoRA into its base: the same as peft and our engine, in the memory of a tensor."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from peft import PeftModel

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.lora_forms import save_diffusers, save_peft
from cogvideox_factory.merge import merged_tensors
from cogvideox_factory.models import tiny_facts
from cogvideox_factory.torch_engine import lora
from cogvideox_factory.torch_engine.layout import diffusers_names
from cogvideox_factory.torch_engine.transformer import CogVideoXTransformer
from cogvideox_factory.weights import iterate_tensors, save_folder
from tests.test_lora_forms import MODULES, a_lora, tiny_transformer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A transformer folder as diffusers writes it."""
    folder = tmp_path_factory.mktemp("base")
    tiny_transformer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["plain", "rslora", "dora", "ranks"])
def test_merging_is_pefts(tmp_path, base, kind):
    save_peft(tmp_path, a_lora(kind))
    merged = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path)).merge_and_unload()
    theirs = {name: tensor.numpy() for name, tensor in merged.state_dict().items()}
    ours = dict(merged_tensors(base, load_lora(tmp_path)))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=2e-5, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("kind", ["plain", "dora"])
def test_a_strength_is_the_weight_of_an_adapter(tmp_path, base, kind):
    path = save_diffusers(tmp_path, a_lora(kind))
    model = CogVideoXTransformer.from_folder(base)
    lora.load_lora_into(model, load_lora(path))
    lora.set_adapters(model, "default", 0.5)
    lora.merge_lora(model)
    theirs, ours = model.to_arrays(), dict(merged_tensors(base, load_lora(path), strength=0.5))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        np.testing.assert_allclose(array, theirs[name], rtol=2e-5, atol=2e-5, err_msg=name)


def test_what_is_not_adapted_stays_bit_for_bit_and_the_rest_is_rounded_once(base):
    file, before = a_lora(), dict(iterate_tensors(base))
    exact = dict(merged_tensors(base, file))
    for name, array in merged_tensors(base, file, dtype="bfloat16"):
        assert array.dtype == np.dtype("bfloat16")
        np.testing.assert_array_equal(array, exact[name].astype("bfloat16"))
        if name.removesuffix(".weight") not in MODULES:
            np.testing.assert_array_equal(exact[name], before[name])


def test_a_lora_of_another_model_is_refused_before_anything_is_written(base):
    wider = {name: np.pad(array, ((0, 0), (0, 1))) for name, array in a_lora().arrays.items()}
    with pytest.raises(UnfitError, match="does not fit this model"):
        merged_tensors(base, replace(a_lora(), arrays=wider))
    with pytest.raises(FactoryError, match="merges nothing"):
        merged_tensors(base, a_lora(), strength=0)


def test_weights_that_leave_float16_are_refused(base):
    file = a_lora()
    file.arrays["transformer_blocks.0.attn1.to_q.lora_B.weight"][0] = 1e6
    with pytest.raises(UnfitError, match=r"to_q\.weight has numbers beyond 65504"):
        list(merged_tensors(base, file, dtype="float16"))


def test_merging_holds_one_shard(tmp_path):
    """60 blocks: the peak is a shard, the block that a file is hashed by (4 MB) and some matrices."""
    config = replace(tiny_facts("cogvideox-5b").transformer, num_layers=60)
    drawn = ((name, np.zeros(slot.shape, np.float32)) for name, slot in diffusers_names(config).items())
    save_folder(tmp_path / "base", drawn, config=config.to_dict(), max_shard_bytes=10**6)
    size = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    one = {name: array for name, array in a_lora().arrays.items() if name.startswith("transformer_blocks.0.")}
    arrays = {name.replace(".0.", f".{index}.", 1): array for name, array in one.items() for index in range(60)}
    tracemalloc.start()
    merged = merged_tensors(tmp_path / "base", replace(a_lora(), arrays=arrays))
    save_folder(tmp_path / "merged", merged, config=config.to_dict(), max_shard_bytes=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size > 60e6
    assert peak < 8e6, f"{peak / 1e6:.1f} MB for a model of {size / 1e6:.1f} MB"
