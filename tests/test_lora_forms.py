"""A LoRA in the forms of other programs: each read by the program itself, or by its law written down anew here."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig, PeftModel, get_peft_model

from cogvideox_factory.errors import MissingError, UnfitError
from cogvideox_factory.lora_files import LORA_FILE_NAME, LoraFile, load_lora, resolve_lora
from cogvideox_factory.lora_forms import in_dtype, save_comfyui, save_diffusers, save_peft
from cogvideox_factory.models import tiny_facts
from cogvideox_factory.tensors import open_tensors, save_tensors

TARGETS = ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear")
SIZES = {"attn1.to_q": (128, 128), "attn1.to_out.0": (128, 128), "ff.net.0.proj": (512, 128), "ff.net.2": (128, 512),
         "norm1.linear": (768, 32)}  # fmt: skip
MODULES = {f"transformer_blocks.{block}.{name}": size for block in range(2) for name, size in SIZES.items()}
KINDS = ("plain", "rslora", "dora", "ranks")


def a_lora(kind="plain", *, rank=4, alpha=2.0, dtype=np.float32) -> LoraFile:
    rng = np.random.default_rng(0)
    special = next(iter(MODULES))
    arrays = {}
    for module, (rows, columns) in MODULES.items():
        r = 8 if kind == "ranks" and module == special else rank
        arrays[f"{module}.lora_A.weight"] = rng.standard_normal((r, columns)).astype(dtype)
        arrays[f"{module}.lora_B.weight"] = rng.standard_normal((rows, r)).astype(dtype)
        if kind == "dora":
            arrays[f"{module}.lora_magnitude_vector"] = rng.uniform(1, 2, rows).astype(dtype)
    pattern = {special: 8} if kind == "ranks" else {}
    return LoraFile(
        source="made", arrays=arrays, rank=rank, alpha=alpha, rank_pattern=pattern, target_modules=TARGETS,
        alpha_pattern=dict.fromkeys(pattern, 1.0), use_rslora=kind == "rslora", use_dora=kind == "dora",
    )  # fmt: skip


def deltas(file: LoraFile) -> dict[str, np.ndarray]:
    """What each layer's weight gains, DoRA's lengths apart."""
    a, b = (
        {module: file.arrays[f"{module}.lora_{half}.weight"].astype(np.float64) for module in file.modules}
        for half in "AB"
    )
    return {module: file.scaling(module) * b[module] @ a[module] for module in file.modules}


def tiny_transformer():
    values = tiny_facts("cogvideox-5b").transformer.to_dict()
    values.pop("_class_name")
    torch.manual_seed(0)
    return CogVideoXTransformer3DModel(**values)


def assert_adds(model, expected: dict[str, np.ndarray], adapter: str) -> None:
    for module, delta in expected.items():
        with torch.no_grad():
            found = model.get_submodule(module).get_delta_weight(adapter).double().numpy()
        np.testing.assert_allclose(found, delta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_peft_loads_its_folder_as_strong_as_it_was_trained(tmp_path, kind, baked):
    file = a_lora(kind)
    save_peft(tmp_path, in_dtype(file, None, baked=baked), base="THUDM/CogVideoX-5b")
    model = PeftModel.from_pretrained(tiny_transformer(), str(tmp_path))
    assert model.peft_config["default"].base_model_name_or_path == "THUDM/CogVideoX-5b"
    assert_adds(model.base_model.model, deltas(file), "default")
    if kind == "dora":
        for module in MODULES:
            layer = model.base_model.model.get_submodule(module)
            lengths = layer.lora_magnitude_vector["default"].weight.detach()
            np.testing.assert_array_equal(lengths, file.arrays[f"{module}.lora_magnitude_vector"])
    again = load_lora(tmp_path)
    assert (again.use_dora, again.use_rslora) == (kind == "dora", kind == "rslora" and not baked)
    for module, delta in deltas(again).items():
        np.testing.assert_allclose(delta, deltas(file)[module], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"lora_alpha": 2}, {"lora_alpha": 16, "use_rslora": True}, {"rank_pattern": {"ff.net.2": 8}}], ids=str
)
def test_a_folder_of_pefts_own_is_read_as_strong_as_it_is_there(tmp_path, settings):
    config = LoraConfig(r=4, init_lora_weights=False, target_modules=list(TARGETS), **settings)
    model = get_peft_model(tiny_transformer(), config)
    model.save_pretrained(tmp_path)
    file = load_lora(tmp_path)
    assert resolve_lora(tmp_path) == tmp_path / "adapter_model.safetensors"
    assert sorted(file.modules) == sorted(MODULES)
    assert_adds(model.base_model.model, deltas(file), "default")


def test_pefts_tensors_without_their_config_are_refused(tmp_path):
    path = save_peft(tmp_path, a_lora())
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(UnfitError, match=r"adapter_config\.json is missing, so the scale"):
        load_lora(path)
    (tmp_path / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(UnfitError, match="so its scale is unknown"):
        load_lora(path)


# --- ComfyUI ----------------------------------------------------------------------------------------------------------

CORE_NAMES = {
    "attn1.to_q": "q", "attn1.to_out.0": "attn_out", "ff.net.0.proj": "ff_proj", "ff.net.2": "ff_out",
    "norm1.linear": "norm1.linear",
}  # fmt: skip


def comfyui_loads(path) -> dict[str, np.ndarray]:
    """What ComfyUI adds to each weight of its model: its loader's law, over the names of its module tree.

    Its key map has `diffusion_model.X` for every weight X of the model; of a LoRA under such a key it takes `.alpha`,
    `.lora_up.weight` or `.lora_B.weight`, and adds alpha / (rows of the down matrix) times the product.
    """
    model = [f"blocks.{block}.{name}.weight" for block in range(2) for name in CORE_NAMES.values()]
    key_map = {f"diffusion_model.{name.removesuffix('.weight')}": name for name in model}
    with open_tensors(path) as file:
        tensors = {name: file.read(name) for name in file.names}
    patches, loaded = {}, set()
    for key, name in key_map.items():
        if f"{key}.lora_B.weight" in tensors:
            up, down = tensors[f"{key}.lora_B.weight"], tensors[f"{key}.lora_A.weight"]
            loaded |= {f"{key}.lora_B.weight", f"{key}.lora_A.weight"}
            alpha = 1.0
            if f"{key}.alpha" in tensors:
                alpha = tensors[f"{key}.alpha"].item() / down.shape[0]
                loaded.add(f"{key}.alpha")
            patches[name] = alpha * up.astype(np.float64) @ down.astype(np.float64)
    assert set(tensors) == loaded, f"ComfyUI would skip {sorted(set(tensors) - loaded)[:3]}"
    return patches


@pytest.mark.parametrize("baked", [False, True])
@pytest.mark.parametrize("kind", ["plain", "rslora", "ranks"])
def test_comfyui_adds_what_was_trained(tmp_path, kind, baked):
    file = a_lora(kind)
    path = save_comfyui(tmp_path / "x.safetensors", in_dtype(file, None, baked=baked))
    patches = comfyui_loads(path)
    assert len(patches) == len(MODULES)
    for module, delta in deltas(file).items():
        _, block, rest = module.split(".", 2)
        np.testing.assert_allclose(patches[f"blocks.{block}.{CORE_NAMES[rest]}.weight"], delta, rtol=1e-5, atol=1e-5)
    again = load_lora(path)
    assert sorted(again.modules) == sorted(MODULES)
    for module, delta in deltas(again).items():
        np.testing.assert_allclose(delta, deltas(file)[module], rtol=1e-5, atol=1e-5)


def test_comfyui_gets_no_dora_and_no_layer_it_does_not_have(tmp_path):
    with pytest.raises(UnfitError, match=r"is a DoRA.*--to merged"):
        save_comfyui(tmp_path / "x.safetensors", a_lora("dora"))
    file = a_lora()
    strange = {name.replace("norm1.linear", "norm9.linear"): array for name, array in file.arrays.items()}
    with pytest.raises(UnfitError, match=r"has no layer transformer_blocks\.0\.norm9\.linear"):
        save_comfyui(tmp_path / "x.safetensors", replace(file, arrays=strange))


def test_the_wrapper_needs_alpha_baked_and_then_adds_what_was_trained(tmp_path):
    """ComfyUI-CogVideoXWrapper hands a file with `lora_B` in its keys to diffusers; older ones read no header."""
    added = {}
    for baked in (False, True):
        save_diffusers(tmp_path, in_dtype(a_lora(), None, baked=baked))
        state = CogVideoXPipeline.lora_state_dict(str(tmp_path), weight_name=LORA_FILE_NAME)
        assert any("lora_B" in key for key in state)
        transformer = tiny_transformer()
        CogVideoXPipeline.load_lora_into_transformer(state, transformer, adapter_name="x", metadata=None)
        with torch.no_grad():
            added[baked] = transformer.get_submodule("transformer_blocks.1.ff.net.2").get_delta_weight("x").numpy()
    trained = deltas(a_lora())["transformer_blocks.1.ff.net.2"]
    np.testing.assert_allclose(added[True], trained, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(added[False], 2 * trained, rtol=1e-4, atol=1e-4)  # alpha 2 of rank 4 was not read


@pytest.mark.parametrize(
    "prefix", ["lora_unet_transformer_blocks", "lora_unet_blocks", "lora_transformer_transformer_blocks"]
)
def test_files_with_underscored_names_are_read(tmp_path, prefix):
    """CogVideoX-Fun's trainer, ComfyUI's own other names, and OneTrainer's."""
    file = a_lora()
    arrays = {}
    for module in MODULES:
        _, block, rest = module.split(".", 2)
        rest = CORE_NAMES[rest] if prefix == "lora_unet_blocks" else rest
        key = f"{prefix}_{block}_{rest.replace('.', '_')}"
        arrays[f"{key}.lora_down.weight"] = file.arrays[f"{module}.lora_A.weight"]
        arrays[f"{key}.lora_up.weight"] = file.arrays[f"{module}.lora_B.weight"]
        arrays[f"{key}.alpha"] = np.asarray(2.0, np.float32)
    save_tensors(tmp_path / "x.safetensors", arrays)
    again = load_lora(tmp_path / "x.safetensors")
    assert set(again.modules) == set(MODULES)
    for module, delta in deltas(again).items():
        np.testing.assert_allclose(delta, deltas(file)[module], rtol=1e-6)


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_another_dtype_rounds_once(dtype):
    file = a_lora(alpha=3.0)
    baked = in_dtype(file, dtype, baked=True)
    for module in MODULES:
        exact = (file.arrays[f"{module}.lora_B.weight"] * np.float32(0.75)).astype(dtype)
        assert baked.arrays[f"{module}.lora_B.weight"].dtype == np.dtype(dtype)
        np.testing.assert_array_equal(baked.arrays[f"{module}.lora_B.weight"], exact)
    kept = in_dtype(a_lora(dtype=ml_dtypes.bfloat16), None, baked=True)
    assert {array.dtype for array in kept.arrays.values()} == {np.dtype("bfloat16")}


def test_numbers_beyond_float16_are_refused():
    file = a_lora()
    file.arrays["transformer_blocks.1.ff.net.2.lora_B.weight"][0, 0] = 1e6
    with pytest.raises(UnfitError, match=r"transformer_blocks\.1\.ff\.net\.2\.lora_B\.weight has numbers beyond 65504"):
        in_dtype(file, "float16")
    assert np.isfinite(in_dtype(file, "bfloat16").arrays["transformer_blocks.1.ff.net.2.lora_B.weight"]).all()


def test_a_folder_without_either_file_names_what_is_looked_for(tmp_path):
    with pytest.raises(MissingError, match=r"pytorch_lora_weights\.safetensors does not exist"):
        load_lora(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(ValueError, match=r"a folder with pytorch_lora_weights\.safetensors or adapter_model"):
        resolve_lora(tmp_path)
