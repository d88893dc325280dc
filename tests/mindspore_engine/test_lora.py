"""LoRA against the golden files of the other engine; mixing, merging, files, and what a compiled graph sees of it."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from itertools import pairwise

import mindspore as ms
import numpy as np

from cogvideox_factory.errors import FactoryError, UnfitError
from cogvideox_factory.lora_files import load_lora, save_lora
from cogvideox_factory.lora_names import initial_down
from cogvideox_factory.mindspore_engine.border import load_parameters, put, to_array, to_tensor
from cogvideox_factory.mindspore_engine.device import Mode
from cogvideox_factory.mindspore_engine.lora import (
    adapter_names,
    add_lora,
    find_targets,
    load_lora_into,
    lora_arrays,
    lora_parameters,
    lora_settings,
    merge_lora,
    remove_lora,
    set_adapters,
    unmerge_lora,
)
from cogvideox_factory.mindspore_engine.lora_linear import LoraLinear
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from tests.golden import cases, error, golden, worst

MODES = {"pynative": Mode(), "graph": Mode(graph=True)}


def fresh_model() -> CogVideoXTransformer:
    model = CogVideoXTransformer(cases.config_of(cases.LORA_VARIANT))
    load_parameters(model, cases.weights_of(cases.LORA_VARIANT).items(), source="test")
    return model


@pytest.fixture
def model() -> CogVideoXTransformer:
    return fresh_model()


@pytest.fixture(scope="module")
def arguments():
    step = cases.step_of(cases.LORA_VARIANT)
    positions = fresh_model().positions(**step.shape)
    return (*map(to_tensor, (step.latents, step.prompt_embeds, step.timesteps)), positions.cos, positions.sin)


def output(model: CogVideoXTransformer, arguments) -> np.ndarray:
    return to_array(model(*arguments))


@pytest.mark.parametrize("case", cases.LORAS)
@pytest.mark.parametrize("mode", MODES)
def test_forward_and_gradients_are_those_of_the_other_engine(model, arguments, case, mode):
    expected, grad = golden("lora"), to_tensor(cases.step_of(cases.LORA_VARIANT).grad)
    load_lora_into(model, cases.lora_file(case), trainable=True)
    parameters = lora_parameters(model)
    assert {p.name for p in parameters} == {p.name for p in model.trainable_params()}

    def run(latents, prompt, timesteps, cos, sin, grad):
        v = model(latents, prompt, timesteps, cos, sin)
        return (v * grad).sum(), v

    function = MODES[mode].compiled(ms.value_and_grad(run, None, parameters, has_aux=True), of=model)
    (_, v), grads = function(*arguments, grad)
    assert error(to_array(v), expected[f"{case}/v"]) <= 1e-5
    found = dict(zip(lora_arrays(model), map(to_array, grads)))
    assert worst(found, expected[f"{case}/adapter"]) <= 5e-5


def test_targets_are_the_linear_layers_by_their_diffusers_names(model):
    targets = find_targets(model)
    assert len(targets) == 2 * 8 + 5  # eight a block; text, time twice, the last norm, the output
    assert "transformer_blocks.1.attn1.to_out.0" in targets
    assert "transformer_blocks.0.ff.net.0.proj" in targets
    assert "patch_embed.proj" not in targets
    assert "patch_embed.proj" in find_targets(CogVideoXTransformer(cases.config_of("cogvideox1.5-5b")))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_new_adapter_changes_nothing_and_is_all_that_is_trained(model, arguments, use_dora):
    before = output(model, arguments)
    names = add_lora(model, rank=4, alpha=4, use_dora=use_dora, seed=5)
    np.testing.assert_allclose(output(model, arguments), before, rtol=0, atol=1e-5 if use_dora else 0)
    assert len(names) == 8
    arrays = lora_arrays(model)
    for name in names:
        assert np.array_equal(arrays[f"{name}.lora_A.weight"], initial_down(5, name, 4, model.config.width))
        assert not arrays[f"{name}.lora_B.weight"].any()
    assert dict(model.iterate_arrays()).keys() == cases.weights_of(cases.LORA_VARIANT).keys()
    trained = [p.name for p in model.trainable_params()]
    assert len(trained) == len(set(trained)) == len(arrays) == (3 if use_dora else 2) * len(names)


def test_a_file_comes_back_as_it_was(model, arguments, tmp_path):
    load_lora_into(model, cases.lora_file("everywhere"), "mine")
    path = save_lora(tmp_path, lora_arrays(model, "mine"), **lora_settings(model, "mine"))
    other = fresh_model()
    assert load_lora_into(other, load_lora(path)) == len(cases.lora_file("everywhere").modules)
    assert np.array_equal(output(other, arguments), output(model, arguments))


def test_a_file_of_another_model_is_refused(arguments):
    with pytest.raises(UnfitError, match="does not fit this model"):
        load_lora_into(CogVideoXTransformer(cases.config_of(cases.LARGER)), cases.lora_file("attention"))


def test_adapters_add_up_by_their_weights(model, arguments):
    """To first order of small adapters, the change of two is the sum of the changes of each."""
    plain = output(model, arguments)
    for case in ("attention", "everywhere"):
        load_lora_into(model, cases.lora_file(case), case)

    def change(names, weights):
        set_adapters(model, names, weights)
        return output(model, arguments) - plain

    small = 1e-3
    both = change(["attention", "everywhere"], [small, 2 * small])
    apart = change("attention", small) + change("everywhere", 2 * small)
    assert np.abs(both).max() > 1e-4
    assert np.abs(both - apart).max() <= 2e-2 * np.abs(both).max()
    assert not change(["attention", "everywhere"], [0, 0]).any()
    assert sorted(adapter_names(model)) == ["attention", "everywhere"]


@pytest.mark.parametrize("names", [["attention"], ["dora"], ["attention", "dora"]])
def test_merging_computes_the_same_and_can_be_undone(model, arguments, names):
    for name in names:
        load_lora_into(model, cases.lora_file(name), name)
    set_adapters(model, names, [0.5] * len(names))
    expected, weights = output(model, arguments), to_array(model.transformer_blocks[0].attn1.to_q.weight)
    merge_lora(model, restorable=True)
    np.testing.assert_allclose(output(model, arguments), expected, rtol=0, atol=2e-5)
    with pytest.raises(FactoryError, match="unmerge_lora first"):
        set_adapters(model, names)
    unmerge_lora(model)
    assert np.array_equal(output(model, arguments), expected)
    assert np.array_equal(to_array(model.transformer_blocks[0].attn1.to_q.weight), weights)
    merge_lora(model)
    assert not adapter_names(model)
    assert not any(isinstance(cell, LoraLinear) for _, cell in model.cells_and_names())
    assert dict(model.parameters_and_names()).keys() == cases.weights_of(cases.LORA_VARIANT).keys()
    np.testing.assert_allclose(output(model, arguments), expected, rtol=0, atol=2e-5)


def test_removing_gives_the_plain_model_back(model, arguments):
    plain = output(model, arguments)
    for case in ("attention", "everywhere"):
        load_lora_into(model, cases.lora_file(case), case)
    set_adapters(model, ["everywhere"])
    expected = output(model, arguments)
    remove_lora(model, "attention")
    assert np.array_equal(output(model, arguments), expected)
    remove_lora(model)
    assert np.array_equal(output(model, arguments), plain)
    names = [(name, parameter.name) for name, parameter in model.parameters_and_names()]
    assert {name for name, _ in names} == cases.weights_of(cases.LORA_VARIANT).keys()
    assert all(name == own for name, own in names)


def test_a_compiled_graph_follows_what_is_done_to_adapters(model, arguments):
    """Loading, weights, switching off, training steps, merging: what a graph of before would not see."""

    def run(latents, prompt, timesteps, cos, sin):
        return model(latents, prompt, timesteps, cos, sin)

    graph = Mode(graph=True).compiled(run, of=model)

    def check():
        found, expected = to_array(graph(*arguments)), output(model, arguments)
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5)
        return expected

    results = [check()]
    load_lora_into(model, cases.lora_file("attention"), "mine")
    results.append(check())
    changes = model.num_changes
    set_adapters(model, "mine", 0.25)
    results.append(check())
    put(lora_parameters(model, "mine")[1], np.ones(lora_parameters(model, "mine")[1].shape, np.float32))
    results.append(check())
    assert model.num_changes == changes, "a graph is made anew where only numbers change"
    set_adapters(model, "mine", 0)
    np.testing.assert_allclose(check(), results[0], rtol=0, atol=1e-6)
    distinct = [np.abs(a - b).max() > 1e-3 for a, b in pairwise(results)]
    assert all(distinct)


def test_mistakes_are_said(model):
    with pytest.raises(FactoryError, match=r"did you mean 'to_q'"):
        add_lora(model, rank=4, alpha=4, target_modules=["to_qq"], seed=0)
    with pytest.raises(FactoryError, match="rank=0"):
        add_lora(model, rank=0, alpha=4, seed=0)
    with pytest.raises(FactoryError, match="None is loaded"):
        set_adapters(model, "mine")
    add_lora(model, rank=4, alpha=4, seed=0, adapter_name="mine")
    with pytest.raises(FactoryError, match="in use"):
        add_lora(model, rank=4, alpha=4, seed=0, adapter_name="mine")
    with pytest.raises(FactoryError, match="letters, digits"):
        add_lora(model, rank=4, alpha=4, seed=0, adapter_name="mi.ne")
    with pytest.raises(FactoryError, match=r"did you mean 'mine'"):
        set_adapters(model, "mines")
    with pytest.raises(FactoryError, match="once, with one weight"):
        set_adapters(model, ["mine", "mine"])
