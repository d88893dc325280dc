import pytest

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.recipe import check, read_recipe, write_recipe
from cogvideox_factory.strict_yaml import read_yaml


def write(tmp_path, text: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_defaults_are_valid_and_a_written_config_reads_back_equal(tmp_path):
    config = check({"task": "i2v", "generate": {"prompt": ["naïve: 'quoted' #1", "二"]}}, source="test")
    write_recipe(tmp_path / "a.yaml", config)
    assert read_recipe(tmp_path / "a.yaml") == config


def test_numbers_mean_what_they_look_like(tmp_path):
    values = read_yaml(write(tmp_path, "a: 1e-5\nb: no\nc: 12:30:00\nd: 010\ne: 1.\nf: ~\ng: true\nh: -3"))
    assert values == {"a": 1e-5, "b": "no", "c": "12:30:00", "d": 10, "e": 1.0, "f": None, "g": True, "h": -3}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("train: {lerning_rate: 1}", "did you mean 'learning_rate'"),
        ("trian: {}", "did you mean 'train'"),
        ("train: {steps: 1, steps: 2}", "was set on line 1 already"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ("- 1\n- 2", "key: value"),
        ("a: [", "not valid YAML"),
        ("train: {steps: -1, batch_size: 0}", "train.batch_size=0"),
        ("train: {steps: 1.5}", "valid integer"),
        ("train: {steps: 'ten'}", "valid integer"),
        ("data: {captions: a.txt}", "belong together"),
        ("train: {warmup_steps: 9, steps: 9}", "below train.steps"),
        ("cache: {dir: c}\ndata: {flip_probability: 0.5}", "no effect on cached latents"),
        ("generate: {image: [a.png]}", "generate.image has no effect with task=t2v"),
        ("train: {method: full}\nlora: {rank: 8}", "lora.rank has no effect with train.method=full"),
        ("train: {method: full}\nlora: {base: nf4}", "lora.base has no effect with train.method=full"),
        ("train: {method: full, swapped_blocks: 2}", "train.swapped_blocks is for frozen weights"),
        ("train: {swapped_blocks: 2}\nparallel: {zero: 1}", "parallel.zero=1 divides them; choose one"),
        ("lora: {base: int8}\nparallel: {zero: 3}", "lora.base keeps frozen weights whole"),
        (
            "train: {checkpointing: none, checkpointing_layers: 2}",
            "train.checkpointing_layers has no effect with train.checkpointing=none",
        ),
        ("train: {power: 2.0}", "train.power has no effect"),
        ("parallel: {ring: 2}", "parallel.ring has no effect with parallel.sequence=1"),
        ("train: {beta3: 0.9}", "train.beta3 has no effect with train.optimizer other than prodigy and came"),
        ("train: {optimizer: came, epsilon: 1.0e-6}", "train.epsilon has no effect with train.optimizer=came"),
        ("train: {optimizer: prodigi}", "train.optimizer"),
        ("train: {compile: max_autotune}", "train.compile=max_autotune chooses kernels by the clock"),
        ("train: {compile: default, activation_offload: true}", "train.activation_offload is not for compiled"),
        ("train: {compile: default}\nlora: {base: nf4}", "lora.base=nf4 is not for compiled blocks"),
        ("train: {fp8: rowwise}\nlora: {base: int8}", "train.fp8=rowwise rounds the base for each product"),
        ("train: {fp8: e4m3}", "train.fp8"),
        ("train: {optimizer: came, optimizer_offload: true}", "train.optimizer_offload is for adamw and adam"),
        (
            "train: {method: full, optimizer: prodigy, master_weights: stochastic_bf16}",
            "train.master_weights=stochastic_bf16 is for adamw and adamw8bit, not train.optimizer=prodigy",
        ),
        (
            "train: {method: full, optimizer_offload: true, master_weights: stochastic_bf16}",
            "train.optimizer_offload moves float32 masters",
        ),
        ("generate: {merge_lora: true}", "generate.merge_lora has no effect with no generate.lora"),
        (
            "generate: {tea_cache_polynomial: [1.0, 0.0]}",
            "tea_cache_polynomial has no effect with no generate.tea_cache",
        ),
        ("generate: {first_block_cache: 0.1, tea_cache: 0.1}", "two ways to leave out blocks; use one of them"),
        ("generate: {guidance_interval: [0.8, 0.2]}", "generate.guidance_interval=0.8 0.2 holds no step"),
        ("generate: {guidance_interval: [0.8]}", "generate.guidance_interval"),
        (
            "sampling: {guidance_scale: 1.0}\ngenerate: {guidance_interval: [0.1, 0.8]}",
            "generate.guidance_interval has no effect with sampling.guidance_scale=1",
        ),
        (
            "sampling: {guidance_scale: 1.0, negative_prompt: blurred}",
            "sampling.negative_prompt has no effect with sampling.guidance_scale=1",
        ),
        ("validation: {prompts: [x]}", "validation.prompts has no effect with validation.every=0"),
        (
            "task: i2v\nvalidation: {every: 5, images: [a.png]}",
            "validation.images has no effect with no validation.prompts",
        ),
        ("generate: {fps: 5000.0}", "generate.fps=5000.0"),
        ("sampling: {steps: 1001}", "sampling.steps=1001"),
        ("data: {fps: 0.0001}", "data.fps=0.0001"),
        ("generate: {lora: [a, b], lora_weight: [1.0]}", "one each"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
    ],
)
def test_refuses_with_a_reason(tmp_path, text, says):
    with pytest.raises(FactoryError, match=r"recipe\.yaml") as caught:
        read_recipe(write(tmp_path, text))
    assert says in str(caught.value)


def test_refuses_what_is_no_text(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(FactoryError, match="not UTF-8"):
        read_yaml(path)
    with pytest.raises(FactoryError, match="no such recipe"):
        read_yaml(tmp_path / "absent.yaml")
    path.write_text("# " + "x" * 2_000_000)
    with pytest.raises(FactoryError, match="at most"):
        read_yaml(path)


def test_every_setting_explains_itself():
    for name, section in Config.model_fields.items():
        fields = getattr(section.annotation, "model_fields", None)
        for key, field in (fields or {name: section}).items():
            assert field.description, f"{name}.{key} has no description"


@pytest.mark.parametrize("text", ["1e5", "089", "no", "true", "~", "null", "- x", "a: b", "#", "'", "12:30", ".5", ""])
def test_text_that_looks_like_something_else_stays_text(tmp_path, text):
    config = check({"generate": {"prompt": [text]}, "data": {"trigger_word": text}}, source="test")
    write_recipe(tmp_path / "a.yaml", config)
    assert read_recipe(tmp_path / "a.yaml") == config


@pytest.mark.parametrize("value", [".inf", "1.0", "2"])
def test_a_moment_decay_of_one_or_more_is_refused(tmp_path, value):
    with pytest.raises(FactoryError, match=r"train\.beta1"):
        read_recipe(write(tmp_path, f"train: {{beta1: {value}}}"))
