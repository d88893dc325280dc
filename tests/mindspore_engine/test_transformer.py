"""The transformer against the golden files of the other engine, in PyNative and in graphs; files, dtypes, errors."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from dataclasses import replace

import mindspore as ms
import numpy as np

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.initial_weights import initial_weight
from cogvideox_factory.mindspore_engine.border import put, to_array
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.models import LARGER, tiny_facts
from cogvideox_factory.tiny.layout import transformer_shapes
from cogvideox_factory.weights import load_folder
from tests.golden import cases
from tests.mindspore_engine import parity
from tests.mindspore_engine.parity import MODES, model_of, tensors_of


@pytest.mark.parametrize("case", [*cases.VARIANTS, cases.LARGER])
def test_forward_and_gradients_are_those_of_the_other_engine(case):
    parity.hold(parity.transformer(case, MODES["PyNative"]))


@pytest.mark.parametrize("case", cases.VARIANTS)
def test_so_they_are_in_a_graph(case):
    parity.hold(parity.transformer(case, MODES["O0"]))


def test_so_they_are_in_a_graph_of_level_1():
    parity.hold(parity.transformer("cogvideox-2b", MODES["O1"]))


@pytest.mark.parametrize("case", cases.VARIANTS)
def test_names_and_shapes_are_the_checkpoints(case):
    model = CogVideoXTransformer(cases.config_of(case))
    assert {name: tuple(p.shape) for name, p in model.parameters_and_names()} == transformer_shapes(model.config)
    frozen = {p.name for p in model.get_parameters()} - {p.name for p in model.trainable_params()}
    assert frozen == ({"patch_embed.pos_embedding"} if model.config.use_learned_positional_embeddings else set())


@pytest.mark.parametrize("name", LARGER)
def test_larger_models_are_described_by_their_config(name):
    """Names and shapes; one layer stands for all, or the machine would have to hold 30 billion weights."""
    config = replace(LARGER[name], num_layers=1, num_attention_heads=1, text_embed_dim=32, time_embed_dim=32)
    model = CogVideoXTransformer(config)
    assert {name: tuple(p.shape) for name, p in model.parameters_and_names()} == transformer_shapes(config)
    assert sum(p.size for p in model.get_parameters()) == config.num_parameters


def test_a_folder_comes_back_as_it_was(tmp_path):
    source = cases.model_folder("cogvideox1.5-5b-i2v") / "transformer"
    model = CogVideoXTransformer.from_folder(source)
    model.save(tmp_path / "transformer")
    ours, theirs = load_folder(tmp_path / "transformer"), load_folder(source)
    assert ours.keys() == theirs.keys()
    assert all(ours[name].tobytes() == theirs[name].tobytes() for name in ours)
    assert CogVideoXTransformer.from_folder(tmp_path / "transformer").config == model.config


def test_weights_of_another_model_are_refused(tmp_path):
    config = cases.config_of("cogvideox1.5-5b")
    with pytest.raises(UnfitError, match=r"patch_embed\.proj\.weight"):
        CogVideoXTransformer.from_folder(cases.model_folder("cogvideox-5b") / "transformer", config=config)


def test_drawn_weights_are_the_grounds():
    model = CogVideoXTransformer(tiny_facts("cogvideox-2b").transformer)
    model.initialize(seed=3)
    for name, array in model.iterate_arrays():
        assert np.array_equal(array, initial_weight(model.config, name, array.shape, seed=3)), name


@pytest.mark.parametrize("weights", [ms.float32, ms.float16])
def test_half_precision_is_the_dtype_of_the_input(weights):
    """Activations in float16 over weights in either dtype; the error is that of 11 bits."""
    folder = cases.model_folder("cogvideox-2b") / "transformer"
    exact, half = CogVideoXTransformer.from_folder(folder), CogVideoXTransformer.from_folder(folder, dtype=weights)
    (latents, prompt, timesteps, *rest), _ = tensors_of(exact, cases.step_of("cogvideox-2b", batch=1))
    expected = to_array(exact(latents, prompt, timesteps, *rest))
    positions = half.positions(**cases.step_of("cogvideox-2b", batch=1).shape, dtype=ms.float16)
    found = half.forward(latents.astype(ms.float16), prompt.astype(ms.float16), timesteps, positions=positions)
    assert found.dtype == ms.float16
    assert 0 < np.abs(to_array(found) - expected).max() <= 1e-2 * np.abs(expected).max()


def test_other_lengths_take_the_plain_table_in_place_of_learned_positions():
    model = model_of("cogvideox-5b-i2v")
    step = cases.step_of("cogvideox-5b-i2v", batch=1)
    (latents, prompt, timesteps, *_), _ = tensors_of(model, step)
    shape = {**step.shape, "latent_frames": 2}
    before = to_array(model.forward(latents[:, :2], prompt, timesteps, positions=model.positions(**shape)))
    put(model.patch_embed.pos_embedding, np.zeros(model.patch_embed.pos_embedding.shape, np.float32))
    after = to_array(model.forward(latents[:, :2], prompt, timesteps, positions=model.positions(**shape)))
    assert np.array_equal(before, after)


def test_wrong_input_is_said_before_anything_is_computed():
    model = model_of("cogvideox1.5-5b-i2v")
    step = cases.step_of("cogvideox1.5-5b-i2v")
    (latents, prompt, timesteps, *_, ofs), _ = tensors_of(model, step)
    positions = model.positions(**step.shape)
    with pytest.raises(FactoryError, match="needs ofs"):
        model.forward(latents, prompt, timesteps, positions=positions)
    with pytest.raises(FactoryError, match="patches of 2"):
        model.forward(latents[:, :3], prompt, timesteps, positions=positions, ofs=ofs)
    with pytest.raises(FactoryError, match="takes 32, half of them the image"):
        model.forward(latents[:, :, :16], prompt, timesteps, positions=positions, ofs=ofs)
    with pytest.raises(FactoryError, match="16 text and 48 video tokens"):
        model.forward(latents[:, :2], prompt, timesteps, positions=positions, ofs=ofs)
    with pytest.raises(FactoryError, match="positions=None"):
        model.forward(latents, prompt, timesteps, positions=None, ofs=ofs)
    with pytest.raises(FactoryError, match="17 text tokens"):
        model.positions(**{**step.shape, "text_length": 17})
