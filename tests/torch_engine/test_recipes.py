"""Every recipe is a complete run: its commands parse, its memory is what it says, and it takes two steps.

The steps are those of a tiny model of the same architecture, on small clips, in one or two processes on a CPU. Only
what a CPU refuses is left out then (`ACCELERATOR_ONLY`), and what two processes cannot be (`FOR_TWO`).
"""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from cogvideox_factory.cli import main
from cogvideox_factory.cli.plan import training_of
from cogvideox_factory.cli.settings import parse
from cogvideox_factory.cli.train import SECTIONS
from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.models import PUBLISHED, ModelFacts
from cogvideox_factory.plan.machine import Machine
from cogvideox_factory.plan.memory import Need, need
from cogvideox_factory.recipe import check, read_recipe
from cogvideox_factory.torch_engine import train
from cogvideox_factory.torch_engine.start import make_plan
from tests.clips import draw_clips
from tests.torch_engine.processes import run_in
from tests.torch_engine.runs import assert_same, losses, weights_of

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
HARDWARE = re.compile(r"^# Hardware: (\d+) cards? of (\d+) GB$", re.MULTILINE)
MEMORY = re.compile(
    r"^# Memory: ([\d.]+) GiB a card(?:, and ([\d.]+) GiB of the host's for each)?, calculated$", re.MULTILINE
)
OTHERWISE = re.compile(r"^# On (\d+) GB: (.*), ([\d.]+) GiB$", re.MULTILINE)
ACCELERATOR_ONLY = {"swapped_blocks": 0, "activation_offload": False, "optimizer_offload": False}

each = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    return draw_clips(tmp_path_factory.mktemp("clips"), [(9, 64, 96)] * 3)


def facts_of(config: Config) -> ModelFacts:
    return next(facts for facts in PUBLISHED.values() if facts.hub_id == config.model.path)


def cards_of(path: Path) -> tuple[int, int]:
    found = HARDWARE.search(path.read_text())
    assert found, "no line `# Hardware: N cards of M GB`"
    return int(found[1]), int(found[2])


def needs(path: Path, *flags: str) -> Need:
    """What `plan` says of the recipe, on its own cards."""
    config = parse("train", [str(path), *flags], sections=SECTIONS, description="")
    return need(training_of(config, cards_of(path)[0])[0])


def fits(device_bytes: int, gib: int) -> bool:
    return device_bytes <= Machine.of("any", memory_gib=gib).memory


def test_every_published_model_has_a_recipe_of_each_method():
    """The task is the model's."""
    there = {(config.model.path.lower(), config.train.method) for config in map(read_recipe, RECIPES)}
    wanted = {(str(facts.hub_id).lower(), method) for facts in PUBLISHED.values() for method in ("lora", "full")}
    assert wanted <= there, f"no recipe for {wanted - there}"


@each
def test_a_recipe_needs_the_memory_it_names_and_its_cards_have_it(path):
    found, (_, size) = MEMORY.search(path.read_text()), cards_of(path)
    calculated = needs(path)
    device, host = calculated.device / 2**30, calculated.host / 2**30
    beside = f", and {host:.1f} GiB of the host's for each" if calculated.host else ""
    assert found, f"write: # Memory: {device:.1f} GiB a card{beside}, calculated"
    assert found[0] == f"# Memory: {device:.1f} GiB a card{beside}, calculated"
    assert fits(calculated.device, size)
    text = path.read_text()
    for size, flags, said in OTHERWISE.findall(text):
        other = needs(path, *flags.split()).device
        assert f"{other / 2**30:.1f}" == said
        assert fits(other, int(size))
    assert text.count("GiB") == 1 + text.count(" GiB of the host") + len(OTHERWISE.findall(text))
    for name in re.findall(r"\w[\w.]*\.yaml", text):
        assert (path.parent / name).is_file()


@each
def test_a_recipes_commands_are_about_itself_and_have_only_flags_there_are(path):
    lines = re.findall(r"^#   cogvideox (.*)$", path.read_text(), re.MULTILINE)
    commands = []
    for line in lines:
        words = shlex.split(line)
        launched = words[words.index("--") + 1 :] if words[0] == "launch" else words
        if words[0] == "launch":
            assert words[1:3] == ["--nproc", str(cards_of(path)[0])]
        command, recipe, *flags = launched
        assert recipe == f"recipes/{path.name}"
        sections = import_module(f"cogvideox_factory.cli.{command}").SECTIONS
        parse(command, [str(path), *flags], sections=sections, description="")
        commands.append(command)
    assert commands == ["prepare", "train", "generate"]


def small(path: Path, tiny_model, clips: Path, folder: Path, *, processes: int) -> Config:
    """The recipe with a tiny model of its kind, on clips of its size."""
    config = read_recipe(path)
    values = config.model_dump()
    values["model"]["path"] = str(tiny_model(facts_of(config).name, dtype="bfloat16"))
    values["data"] |= {"root": str(clips), "num_frames": 9, "height": 64, "width": 96, "fps": 8.0}
    values["run"] |= {"device": "cpu", "dtype": "bfloat16"}
    values["train"] |= {"dir": str(folder / "run"), "steps": 2, "warmup_steps": 1, "log_every": 1, **ACCELERATOR_ONLY}
    values["validation"] |= {"every": 2, "num_clips": 1}
    if processes == 2:  # FOR_TWO: they share a video where four did, take two clips, not sixteen, and all keep averages
        values["parallel"] |= {"sequence": min(config.parallel.sequence, 2)}
        values["train"] |= {"batch_size": min(config.train.batch_size, 2), "ema_decay": 0.5}
    return check(values, source=str(path))


ONE_CARD = [path for path in RECIPES if cards_of(path)[0] == 1]
MANY_CARDS = [path for path in RECIPES if cards_of(path)[0] > 1]


@pytest.mark.parametrize("path", ONE_CARD, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps_with_a_tiny_model(path, tiny_model, clips, tmp_path):
    config = small(path, tiny_model, clips, tmp_path, processes=1)
    if config.lora.base != "model":
        pytest.importorskip("torchao", reason="the extra lowbit is not installed")
    train.run(config)
    assert_trained(path, tmp_path / "run")


def train_each(configs: list[dict]) -> None:
    for values in configs:
        train.run(check(values, source="recipe"))


def test_recipes_for_many_cards_take_two_steps_in_two_processes(tiny_model, clips, tmp_path):
    configs = [small(path, tiny_model, clips, tmp_path / path.stem, processes=2) for path in MANY_CARDS]
    assert {config.parallel.zero for config in configs} == {2, 3}
    run_in(2, train_each, [config.model_dump() for config in configs], folder=tmp_path)
    for path in MANY_CARDS:
        run = tmp_path / path.stem / "run"
        assert_trained(path, run)
        again = tmp_path / path.stem / "again" / "final"  # what two processes saved is put together
        assert main(["export", str(run / "checkpoint-000002"), "--to", "diffusers", "--out", str(again)]) == 0
        assert_same(run, again.parent)


def assert_trained(path: Path, run: Path) -> None:
    assert len(losses(run)) == 2
    assert np.isfinite(losses(run)).all()
    asked = read_recipe(path).model_dump()
    kept = json.loads((run / "checkpoint-000002" / "state.json").read_text())["settings"]
    for section in ("lora", "parallel"):
        for name, value in asked[section].items():
            assert name == "sequence" or kept[section][name] == value
    final = weights_of(run)
    assert all(np.isfinite(array.astype(np.float32)).all() for array in final.values())
    assert any(name.startswith("pytorch_lora") for name in final) == (asked["train"]["method"] == "lora")


@pytest.mark.parametrize("name", ["swapped_blocks", "activation_offload", "optimizer_offload"])
def test_what_is_left_out_here_is_what_a_cpu_refuses(name, tiny_model, clips, tmp_path):
    value = 1 if name == "swapped_blocks" else True
    train_section = {"dir": str(tmp_path / "run"), name: value}
    values = {"model": {"path": str(tiny_model("cogvideox-5b"))}, "data": {"root": str(clips)}, "train": train_section}
    with pytest.raises(FactoryError, match=f"train.{name} moves what an accelerator has no room for"):
        make_plan(check({**values, "run": {"device": "cpu"}}, source="test"))
