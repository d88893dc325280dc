"""The tables of facts: parameter counts against published figures and diffusers on the meta device."""

import json
from dataclasses import replace

import pytest

from cogvideox_factory.errors import UnfitError
from cogvideox_factory.models import (
    LARGER,
    PUBLISHED,
    SchedulerConfig,
    TransformerConfig,
    VaeConfig,
    facts_for,
    tiny_facts,
)

COUNTS = {
    "cogvideox-2b": 1_693_783_872,
    "cogvideox-5b": 5_570_283_072,
    "cogvideox-5b-i2v": 5_570_479_680,
    "cogvideox1.5-5b": 5_570_676_352,
    "cogvideox1.5-5b-i2v": 5_571_594_880,
    "10b": 13_622_525_056,
    "20b": 23_599_096_960,
    "30b": 31_453_299_840,
}
CONFIGS = {name: facts.transformer for name, facts in PUBLISHED.items()} | LARGER


def diffusers_model(config: TransformerConfig):
    """Build diffusers' transformer without memory."""
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    values = config.to_dict()
    values.pop("_class_name")
    with torch.device("meta"):
        return diffusers.CogVideoXTransformer3DModel(**values)


def count(model) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name):
    assert CONFIGS[name].num_parameters == COUNTS[name]


@pytest.mark.parametrize("name", COUNTS)
def test_counts_equal_diffusers(name):
    """One and two layers are built, to be quick; the difference is what each further layer adds."""
    config = CONFIGS[name]
    few, more = (count(diffusers_model(replace(config, num_layers=n))) for n in (1, 2))
    assert few + (more - few) * (config.num_layers - 1) == COUNTS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_counts_equal_diffusers(name):
    config = tiny_facts(name).transformer
    assert config.num_parameters == count(diffusers_model(config))


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": False},
        {"norm_elementwise_affine": False},
        {"patch_bias": False},
        {"patch_size": 4},
        {"ofs_embed_dim": 24},
        {"time_embed_dim": 48, "text_embed_dim": 20},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["cogvideox-2b", "cogvideox1.5-5b"])
def test_every_flag_counts_as_in_diffusers(name, change):
    config = replace(tiny_facts(name).transformer, **change)
    assert config.num_parameters == count(diffusers_model(config))


@pytest.mark.parametrize("name", PUBLISHED)
def test_tiny_keeps_the_architecture(name):
    own, tiny = PUBLISHED[name].transformer, tiny_facts(name).transformer
    for flag in (
        "attention_head_dim", "in_channels", "patch_size", "patch_size_t", "use_rotary_positional_embeddings",
        "use_learned_positional_embeddings", "is_image_to_video", "patch_bias",
    ):  # fmt: skip
        assert getattr(tiny, flag) == getattr(own, flag)
    assert (tiny.ofs_embed_dim is None) == (own.ofs_embed_dim is None)
    assert tiny.num_parameters < 2_000_000


def test_image_scale():
    assert PUBLISHED["cogvideox-5b-i2v"].vae.image_scale == 0.7
    assert PUBLISHED["cogvideox1.5-5b-i2v"].vae.image_scale == 1 / 0.7


@pytest.mark.parametrize("name", PUBLISHED)
def test_facts_for_finds_the_family(name):
    assert facts_for(PUBLISHED[name].transformer).name == name
    assert facts_for(tiny_facts(name).transformer).name == name


@pytest.mark.parametrize("kind", [TransformerConfig, VaeConfig, SchedulerConfig])
def test_keys_and_class_are_those_of_diffusers(kind):
    diffusers = pytest.importorskip("diffusers")
    import inspect

    theirs = getattr(diffusers, kind.class_name())
    keys = set(inspect.signature(theirs.__init__).parameters) - {"self"}
    assert keys == set(kind().to_dict()) - {"_class_name"}


@pytest.mark.parametrize("facts", PUBLISHED.values(), ids=PUBLISHED)
def test_config_survives_json(facts, tmp_path):
    for config in (facts.transformer, facts.vae, facts.scheduler):
        text = json.dumps(config.to_dict() | {"_diffusers_version": "0.42.1"})
        assert type(config).from_dict(json.loads(text), source="here") == config
        (tmp_path / "config.json").write_text(text)
        assert type(config).from_folder(tmp_path) == config


def test_unknown_key():
    with pytest.raises(UnfitError, match=r"here: unknown key 'num_layer' \(did you mean 'num_layers'\?\)"):
        TransformerConfig.from_dict({"num_layer": 3}, source="here")


def test_broken_config_files(tmp_path):
    with pytest.raises(UnfitError, match=r"config\.json is missing"):
        TransformerConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UnfitError, match="is not valid JSON"):
        TransformerConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UnfitError, match=r"not valid JSON.*Download the model again"):
        TransformerConfig.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (TransformerConfig, {"activation_fn": "gelu"}),
        (TransformerConfig, {"use_learned_positional_embeddings": True}),
        (SchedulerConfig, {"prediction_type": "epsilon"}),
        (SchedulerConfig, {"beta_schedule": "linear"}),
        (SchedulerConfig, {"clip_sample": True}),
    ],
    ids=str,
)
def test_what_no_checkpoint_of_the_family_has(kind, change):
    with pytest.raises(UnfitError):
        kind(**change)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"num_layers": "two"}, "num_layers='two' is no int"),
        ({"use_rotary_positional_embeddings": 1}, "is no bool"),
        ({"norm_eps": "1e-5"}, "is no float"),
        ({"patch_size_t": "2"}, "patch_size_t='2'"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(values, says):
    with pytest.raises(UnfitError, match="config") as caught:
        TransformerConfig.from_dict(values, source="config.json")
    assert says in str(caught.value)


def test_a_config_that_is_no_object_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("[1, 2]")
    with pytest.raises(UnfitError, match="holds a list"):
        TransformerConfig.from_folder(tmp_path)


def test_a_config_is_read_from_yaml_too(tmp_path):
    import yaml

    config = LARGER["10b"]
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"transformer": config.to_dict()}))
    assert TransformerConfig.from_file(path) == config
    path.write_text(yaml.safe_dump({"transformer": {"num_layer": 3}}))
    with pytest.raises(UnfitError, match="unknown key 'num_layer'"):
        TransformerConfig.from_file(path)
    path.write_text(yaml.safe_dump(config.to_dict()))
    with pytest.raises(UnfitError, match="one mapping, `transformer:`"):
        TransformerConfig.from_file(path)
