"""LoRA files: what we write diffusers and PEFT read, and the reverse, scale included."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

from cogvideox_factory.errors import MissingError, UnfitError
from cogvideox_factory.lora_files import LORA_FILE_NAME, bake_lora, load_lora, save_lora
from cogvideox_factory.models import tiny_facts
from cogvideox_factory.tensors import open_tensors, save_tensors

TARGETS = ("to_k", "to_out.0", "to_q", "to_v")
MODULES = [f"transformer_blocks.{block}.attn1.{target}" for block in range(2) for target in TARGETS]
WIDTH = 128


def lora_arrays(rank=4, *, dora=False, ranks=None, dtype=np.float32):
    rng = np.random.default_rng(0)
    arrays = {}
    for module in MODULES:
        r = (ranks or {}).get(module, rank)
        arrays[f"{module}.lora_A.weight"] = rng.standard_normal((r, WIDTH)).astype(dtype)
        arrays[f"{module}.lora_B.weight"] = rng.standard_normal((WIDTH, r)).astype(dtype)
        if dora:
            arrays[f"{module}.lora_magnitude_vector"] = rng.uniform(1, 2, WIDTH).astype(dtype)
    return arrays


def assert_same(ours, theirs):
    assert set(ours) == set(theirs)
    for name, array in ours.items():
        np.testing.assert_array_equal(array, np.asarray(theirs[name]))


def tiny_transformer():
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    pytest.importorskip("peft")
    values = tiny_facts("cogvideox-5b").transformer.to_dict()
    values.pop("_class_name")
    torch.manual_seed(0)
    return diffusers.CogVideoXTransformer3DModel(**values)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(4, 4), (4, 2), (8, 64), (3, 1.5)])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, dora, rslora, rank, alpha, dtype):
    arrays = lora_arrays(rank, dora=dora, dtype=dtype)
    path = save_lora(tmp_path, arrays, rank=rank, alpha=alpha, target_modules=TARGETS, use_rslora=rslora, use_dora=dora)
    assert path == tmp_path / LORA_FILE_NAME
    file = load_lora(tmp_path)
    assert_same(file.arrays, arrays)
    assert (file.rank, file.alpha, file.use_rslora, file.use_dora) == (rank, alpha, rslora, dora)
    assert file.target_modules == TARGETS
    assert file.modules == sorted(MODULES)
    assert file.scaling(MODULES[0]) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


def test_ranks_and_alphas_by_module(tmp_path):
    ranks, alphas = {MODULES[1]: 8}, {MODULES[2]: 1.0}
    options = {"rank": 4, "alpha": 2, "target_modules": TARGETS, "alpha_pattern": alphas}
    save_lora(tmp_path / "x.safetensors", lora_arrays(4, ranks=ranks), **options)
    file = load_lora(tmp_path / "x.safetensors")
    assert (file.rank_pattern, file.alpha_pattern) == (ranks, alphas)
    assert [file.scaling(module) for module in MODULES[:4]] == [0.5, 0.25, 0.25, 0.5]


def test_target_pattern(tmp_path):
    pattern = r"transformer_blocks\.\d+\.attn1\.to_(q|k|v|out\.0)"
    save_lora(tmp_path, lora_arrays(), rank=4, alpha=4, target_modules=pattern)
    assert load_lora(tmp_path).target_modules == pattern


@pytest.mark.parametrize("name", ["plain", "rslora", "dora", "ranks"])
def test_diffusers_loads_ours_with_the_same_scale(tmp_path, name):
    """Through the pipeline's own reader and PEFT: every tensor, every layer's scaling."""
    torch = pytest.importorskip("torch")
    from diffusers import CogVideoXPipeline

    ranks = {MODULES[1]: 8, MODULES[5]: 8} if name == "ranks" else {}
    arrays = lora_arrays(4, dora=name == "dora", ranks=ranks)
    save_lora(tmp_path, arrays, rank=4, alpha=2, target_modules=TARGETS, use_rslora=name == "rslora",
              use_dora=name == "dora", alpha_pattern=dict.fromkeys(ranks, 1))  # fmt: skip
    state, metadata = CogVideoXPipeline.lora_state_dict(
        str(tmp_path), weight_name=LORA_FILE_NAME, return_lora_metadata=True
    )
    assert_same({f"transformer.{key}": array for key, array in arrays.items()}, state)
    assert metadata["transformer.r"] == 4
    assert metadata["transformer.lora_alpha"] == 2

    transformer, file = tiny_transformer(), load_lora(tmp_path)
    CogVideoXPipeline.load_lora_into_transformer(state, transformer, adapter_name="x", metadata=metadata)
    for module in MODULES:
        layer = transformer.get_submodule(module)
        assert layer.scaling["x"] == pytest.approx(file.scaling(module))
        assert layer.use_dora["x"] == (name == "dora")
        delta = file.scaling(module) * arrays[f"{module}.lora_B.weight"] @ arrays[f"{module}.lora_A.weight"]
        with torch.no_grad():
            np.testing.assert_allclose(layer.get_delta_weight("x"), delta, rtol=1e-5, atol=1e-5)
        if name == "dora":
            theirs = layer.lora_magnitude_vector["x"].weight
            np.testing.assert_array_equal(theirs.detach(), arrays[f"{module}.lora_magnitude_vector"])


@pytest.mark.parametrize("how", ["pipeline", "pipeline without metadata", "adapter"])
@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 2}, {"lora_alpha": 16, "use_rslora": True}, {"use_dora": True}], ids=str
)
def test_we_load_theirs_with_the_same_scale(tmp_path, how, settings):
    pytest.importorskip("torch")
    transformer = tiny_transformer()
    from diffusers import CogVideoXPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig, get_peft_model_state_dict

    transformer.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=list(TARGETS), **settings))
    if how == "adapter":
        transformer.save_lora_adapter(tmp_path)
    else:
        metadata = _collate_lora_metadata({"transformer": transformer}) if how == "pipeline" else {}
        layers = get_peft_model_state_dict(transformer)
        CogVideoXPipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers, **metadata)
    file = load_lora(tmp_path)
    assert sorted(file.modules) == sorted(MODULES)
    assert file.use_dora == settings.get("use_dora", False)
    for module in MODULES:
        layer = transformer.get_submodule(module)
        np.testing.assert_array_equal(file.arrays[f"{module}.lora_A.weight"], layer.lora_A.default.weight.detach())
        expected = 1.0 if how == "pipeline without metadata" else layer.scaling["default"]
        assert file.scaling(module) == pytest.approx(expected)
    assert sorted(file.target_modules) == sorted(
        [f"attn1.{target}" for target in TARGETS] if how == "pipeline without metadata" else TARGETS
    )


def write(path, arrays, **metadata):
    save_tensors(path, arrays, metadata=metadata)
    return path


@pytest.mark.parametrize(
    "prefix", ["", "transformer.", "diffusion_model.", "model.diffusion_model.", "base_model.model."]
)
def test_prefixes(tmp_path, prefix):
    arrays = lora_arrays()
    path = write(tmp_path / "x.safetensors", {f"{prefix}{name}": array for name, array in arrays.items()})
    file = load_lora(path)
    assert_same(file.arrays, arrays)
    assert (file.rank, file.alpha, file.scaling(MODULES[0])) == (4, 4, 1.0)


def test_without_header_alpha_is_rank_module_by_module(tmp_path):
    path = write(tmp_path / "x.safetensors", lora_arrays(4, ranks={MODULES[0]: 16}))
    file = load_lora(path)
    assert {file.scaling(module) for module in MODULES} == {1.0}
    assert file.rank_pattern == {MODULES[0]: 16}


@pytest.mark.parametrize("down_up", [("lora_down", "lora_up"), ("lora.down", "lora.up"), ("lora_A.x", "lora_B.x")])
def test_other_spellings(tmp_path, down_up):
    arrays = {}
    for name, array in lora_arrays().items():
        arrays[name.replace("lora_A", down_up[0]).replace("lora_B", down_up[1])] = array
    alphas = {f"{module}.alpha": np.array(2.0) for module in MODULES}
    file = load_lora(write(tmp_path / "x.safetensors", arrays | alphas))
    assert_same(file.arrays, lora_arrays())
    assert file.alpha == 2
    assert file.scaling(MODULES[3]) == 0.5


def test_finetrainers_header(tmp_path):
    config = {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": True,
        "target_modules": ["to_q", "to_k", "to_v", "to_out.0"],
    }
    arrays = {f"transformer.{name}": array for name, array in lora_arrays().items()}
    file = load_lora(write(tmp_path / "x.safetensors", arrays, lora_config=json.dumps(config, indent=4)))
    assert file.scaling(MODULES[0]) == 2
    assert file.target_modules == TARGETS


def test_pattern_keys_of_peft(tmp_path):
    """PEFT's patterns match the end of a name, the first that matches wins, `^` anchors a full name."""
    config = {"r": 4, "lora_alpha": 4, "alpha_pattern": {f"^{MODULES[0]}": 8, "attn1.to_k": 2, "to_k": 99}}
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    file = load_lora(write(tmp_path / "x.safetensors", lora_arrays(), lora_adapter_metadata=metadata))
    by_name = {module: file.alpha_of(module) for module in MODULES}
    assert by_name[MODULES[0]] == 8
    assert by_name["transformer_blocks.1.attn1.to_k"] == 2
    assert by_name["transformer_blocks.0.attn1.to_q"] == 4
    other = pytest.importorskip("peft.utils.other")
    for module in MODULES:
        key = other.get_pattern_key(config["alpha_pattern"], module)
        assert by_name[module] == config["alpha_pattern"].get(key, config["lora_alpha"])


def test_partial_layers_are_targets_by_full_name(tmp_path):
    config = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q"], "layers_to_transform": [0, 1]}
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    path = write(tmp_path / "x.safetensors", lora_arrays(), lora_adapter_metadata=metadata)
    assert load_lora(path).target_modules == tuple(sorted(MODULES))


@pytest.mark.parametrize("rslora", [False, True])
def test_baked_adds_the_same_at_scale_one(tmp_path, rslora):
    ranks = {MODULES[1]: 8}
    path = save_lora(tmp_path, lora_arrays(4, ranks=ranks), rank=4, alpha=2, target_modules=TARGETS, use_rslora=rslora)
    file = load_lora(path)
    baked = bake_lora(file)
    save_lora(tmp_path / "baked", baked.arrays, rank=baked.rank, alpha=baked.alpha, target_modules=TARGETS,
              alpha_pattern=baked.alpha_pattern)  # fmt: skip
    for again in (baked, load_lora(tmp_path / "baked")):
        for module in MODULES:
            assert again.scaling(module) == 1
            b, before = again.arrays[f"{module}.lora_B.weight"], file.arrays[f"{module}.lora_B.weight"]
            np.testing.assert_allclose(b, before * file.scaling(module), rtol=1e-6)


def test_header_is_what_peft_of_any_age_takes(tmp_path):
    path = save_lora(tmp_path, lora_arrays(), rank=4, alpha=2.5, target_modules=TARGETS)
    with open_tensors(path) as file:
        assert file.metadata["format"] == "pt"
        config = json.loads(file.metadata["lora_adapter_metadata"])
    assert all(key.startswith("transformer.") for key in config)
    assert config["transformer.lora_alpha"] == 2.5
    peft = pytest.importorskip("peft")
    made = peft.LoraConfig(**{key.removeprefix("transformer."): value for key, value in config.items()})
    assert (made.r, made.lora_alpha, made.target_modules) == (4, 2.5, set(TARGETS))


def test_absent_and_pickled(tmp_path):
    with pytest.raises(MissingError, match=r"LoRA .*pytorch_lora_weights\.safetensors does not exist"):
        load_lora(tmp_path)
    with pytest.raises(MissingError, match="is pickled"):
        load_lora(tmp_path / "pytorch_lora_weights.bin")


def test_not_a_lora(tmp_path):
    arrays = {f"layer.{i}.weight": np.zeros(2) for i in range(7)}
    with pytest.raises(UnfitError, match=r"7 of 7 tensors belong to no LoRA .*layer\.0\.weight, .*full model"):
        load_lora(write(tmp_path / "x.safetensors", arrays))
    with pytest.raises(UnfitError, match="text_encoder"):
        load_lora(write(tmp_path / "x.safetensors", lora_arrays() | {"text_encoder.q.dora_scale": np.zeros(2)}))
    with pytest.raises(UnfitError, match="holds no tensors"):
        load_lora(write(tmp_path / "x.safetensors", {}))


def test_damaged_file(tmp_path):
    path = save_lora(tmp_path, lora_arrays(), rank=4, alpha=2, target_modules=TARGETS)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UnfitError, match=r"pytorch_lora_weights\.safetensors cannot be read"):
        load_lora(path)


UNREADABLE = (
    "{", "[]", "{}", '{"transformer.r": 4}', '{"r": "many", "lora_alpha": 1}', '{"text_encoder.r": 4}',
    '{"r": 4, "lora_alpha": 4, "target_modules": "to_(q"}',
    '{"r": 4, "lora_alpha": 4, "alpha_pattern": {"(": 1}}',
)  # fmt: skip


@pytest.mark.parametrize("header", UNREADABLE)
def test_unreadable_header(tmp_path, header):
    """A scale that is there but cannot be read is never guessed."""
    path = write(tmp_path / "x.safetensors", lora_arrays(), lora_adapter_metadata=header)
    with pytest.raises(UnfitError, match="so its scale is unknown"):
        load_lora(path)


def test_header_that_contradicts_the_tensors(tmp_path):
    path = save_lora(tmp_path, lora_arrays(4), rank=4, alpha=2, target_modules=TARGETS)
    header = json.dumps({"r": 8, "lora_alpha": 8})
    with pytest.raises(UnfitError, match=r"its header gives .* rank 8, its tensors have rank 4"):
        load_lora(write(path, lora_arrays(4), lora_adapter_metadata=header))
    for dora in (True, False):
        header = json.dumps({"r": 4, "lora_alpha": 8, "use_dora": dora})
        with pytest.raises(UnfitError, match=f"header says use_dora={dora}"):
            load_lora(write(path, lora_arrays(4, dora=not dora), lora_adapter_metadata=header))


def test_two_adapters_in_one_file(tmp_path):
    arrays = lora_arrays()
    doubled = arrays | {f"transformer.{name}": array for name, array in arrays.items()}
    with pytest.raises(UnfitError, match="Keep one adapter per file"):
        load_lora(write(tmp_path / "x.safetensors", doubled))


def test_files_are_byte_identical(tmp_path):
    for name in ("a", "b"):
        save_lora(
            tmp_path / name,
            lora_arrays(),
            rank=4,
            alpha=2,
            target_modules={"to_v", "to_q", "to_k", "to_out.0"},
        )
    assert (tmp_path / "a" / LORA_FILE_NAME).read_bytes() == (tmp_path / "b" / LORA_FILE_NAME).read_bytes()


def test_lora_file_is_a_value(tmp_path):
    save_lora(tmp_path, lora_arrays(), rank=4, alpha=2, target_modules=TARGETS)
    file = load_lora(tmp_path)
    assert replace(file, alpha=8.0).scaling(MODULES[0]) == 2
    assert file.scaling(MODULES[0]) == 0.5
