"""A token stream over several processes against the same stream in one: output, loss, gradients."""

import pytest

pytest.importorskip("mindspore", reason="the MindSpore engine has an environment of its own: make test-mindspore")

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np

from cogvideox_factory.config import Config
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.mindspore_engine import generate, lora
from cogvideox_factory.mindspore_engine.border import put, to_array, to_tensor
from cogvideox_factory.mindspore_engine.collectives import all_reduce
from cogvideox_factory.mindspore_engine.device import PYNATIVE, Mode
from cogvideox_factory.mindspore_engine.learner import set_checkpointing
from cogvideox_factory.mindspore_engine.ranks import Ranks, join, make_ranks
from cogvideox_factory.mindspore_engine.sequence_parallel import require_divisible_heads
from cogvideox_factory.mindspore_engine.transformer import CogVideoXTransformer
from cogvideox_factory.ranks import Layout
from tests.golden import cases, golden, runs
from tests.mindspore_engine.processes import run_in

pytestmark = pytest.mark.timeout(700)  # all that runs in many processes runs for the first test
RELATIVE = 1e-5
"""Of the largest entry, in float32."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model, what is trained of it and how, and the shapes it is given one after the other."""

    variant: str
    sequence: int = 2
    text: int = 16
    shapes: tuple[tuple[int, int, int], ...] = ((3, 6, 10),)
    """Latent frames, height and width."""
    adapters: dict[str, Any] | None = None
    checkpointing: str = "none"
    mode: Mode = PYNATIVE


LORA = {"rank": 2, "alpha": 2, "use_rslora": False, "use_dora": False}
CASES = {
    2: [
        Case(variant="cogvideox-2b", text=17),
        Case(variant="cogvideox1.5-5b-i2v", shapes=((2, 6, 10),), checkpointing="full", adapters=LORA),
        Case(variant="cogvideox-5b-i2v", shapes=((3, 8, 12),), text=15, checkpointing="save_attention"),
        Case(
            variant="cogvideox-5b", text=3, shapes=((3, 6, 10), (2, 8, 6)), mode=Mode(graph=True),
            checkpointing="full", adapters=LORA | {"use_dora": True},
        ),
    ],
    4: [
        Case(variant="cogvideox1.5-5b", sequence=4, text=5, shapes=((2, 6, 10),)),
        Case(variant="cogvideox-5b", sequence=4, text=1, shapes=((1, 2, 6),), checkpointing="full", adapters=LORA),
        Case(variant="cogvideox1.5-5b-i2v", text=15, shapes=((2, 6, 10),), adapters=LORA),
        Case(variant="cogvideox-2b", text=15, checkpointing="save_attention"),
    ],
}  # fmt: skip
"""No number of video tokens but one divides among the processes, and no text but one."""


def model_of(case: Case) -> CogVideoXTransformer:
    config = replace(
        cases.config_of(case.variant), num_attention_heads=4, attention_head_dim=16, max_text_seq_length=case.text,
        num_layers=1 if case.mode.graph else 2,
    )  # fmt: skip
    model = CogVideoXTransformer(config)
    model.initialize(3)
    if case.adapters is not None:
        lora.add_lora(model, seed=0, **case.adapters)
        for parameter in model.trainable_params():
            put(parameter, to_array(parameter) + np.float32(0.1))  # B is zero at first, and then A has no gradient
    set_checkpointing(model, case.checkpointing)
    return model


def inputs_of(case: Case, model: CogVideoXTransformer, index: int, part: slice) -> tuple:
    """Return what the model takes for shape number `index`, and a target, of a part of two samples."""
    (frames, height, width), config = case.shapes[index], model.config
    latents = cases.normal("latents", index, shape=(2, frames, config.in_channels, height, width))
    prompt = cases.normal("prompt", shape=(2, case.text, config.text_embed_dim))
    target = cases.normal("target", index, shape=(2, frames, config.out_channels, height, width))
    positions = model.positions(
        latent_frames=frames, latent_height=height, latent_width=width, text_length=case.text
    )  # fmt: skip
    ofs = to_tensor(np.full(1, 2.0, np.float32)) if config.ofs_embed_dim else None
    timesteps = np.array([999, 7], np.int64)
    latents, prompt, timesteps, target = (to_tensor(x[part]) for x in (latents, prompt, timesteps, target))
    return latents, prompt, timesteps, positions.cos, positions.sin, positions.added, ofs, target


def steps(case: Case, model: CogVideoXTransformer, part: slice = slice(None)) -> list[tuple]:
    """Return loss, output and gradients of each shape."""
    weights = model.trainable_params()

    def run(latents, prompt, timesteps, cos, sin, added, ofs, target):
        v = model(latents, prompt, timesteps, cos, sin, added, ofs)
        return (v - target).square().mean(), v

    function = case.mode.compiled(ms.value_and_grad(run, None, weights, has_aux=True), of=model)
    found = []
    for index in range(len(case.shapes)):
        (loss, v), grads = function(*inputs_of(case, model, index, part))
        found.append((float(loss), to_array(v), dict(zip((w.name for w in weights), grads, strict=True))))
    return found


def one_rank(size: int) -> list[list[tuple]]:
    """Return what `steps` does, from this process' share of a batch of two samples, as a reduction would give it."""
    join(Layout(size=size))
    results = []
    for case in CASES[size]:
        ranks, model = make_ranks(Layout(size=size, sequence=case.sequence)), model_of(case)
        assert ranks.sequence is not None
        model.divide(ranks.sequence)
        num_data = ranks.layout.num_data_ranks
        samples = 2 // num_data
        part = slice(ranks.data_rank * samples, (ranks.data_rank + 1) * samples)
        found = []
        for loss, v, grads in steps(case, model, part):
            reduced = {n: to_array(all_reduce(grad, ranks.everyone)) / num_data for n, grad in grads.items()}
            found.append((part, float(ranks.mean(ms.Tensor([loss]))), v, reduced))
        results.append(found)
    return results


def videos(folder: Path, **parallel: int) -> list[np.ndarray]:
    """Make three videos, or see that they are there; return samples of their frames. Each prompt is kept once."""
    kept = folder.with_name("kept")
    ask = {"num_videos": 3, "num_frames": 1, "format": "npy", "prompt_cache": str(kept)}
    config = runs.request(
        "cogvideox-5b", folder, engine="mindspore", generate=ask, sampling={"steps": 2}, parallel=parallel
    )
    frames = [runs.seen(path) for path in generate.run(config)]
    assert len(list(kept.rglob("*.safetensors"))) == len(["negative", "prompt"])
    return frames


def video_request(folder: Path) -> Config:
    return runs.video_request("i2v dpm", folder, engine="mindspore", parallel={"sequence": 2})


def two_ranks(folder: Path) -> tuple[list[list[tuple]], np.ndarray]:
    (path,) = generate.run(video_request(folder))
    return one_rank(2), runs.seen(path)


def four_ranks(folder: Path) -> tuple[list[list[tuple]], list[np.ndarray]]:
    return one_rank(4), videos(folder / "videos", sequence=2)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    video_request(folder)  # draws the image
    return run_in(2, two_ranks, folder, folder=folder)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    return run_in(4, four_ranks, folder, folder=folder)


@pytest.mark.parametrize(
    ("size", "number"), [(size, number) for size, group in CASES.items() for number in range(len(group))]
)
def test_output_loss_and_gradients_are_those_of_one_process(size, number, request):
    results = [gradients for gradients, _ in request.getfixturevalue({2: "two", 4: "four"}[size])]
    case = CASES[size][number]
    alone = steps(replace(case, mode=PYNATIVE), model_of(case))
    for rank in range(size):
        for (loss, v, grads), (part, their_loss, their_v, their_grads) in zip(
            alone, results[rank][number], strict=True
        ):
            assert abs(their_loss - loss) <= RELATIVE * loss
            assert np.abs(their_v - v[part]).max() <= RELATIVE * np.abs(v).max()
            assert their_grads.keys() == grads.keys()
            largest = max(np.abs(to_array(grad)).max() for grad in grads.values())
            for name, grad in grads.items():  # the bias of k's norm has none but rounding: softmax does not see it
                own = to_array(grad)
                limit = RELATIVE * np.abs(own).max() + 1e-7 * largest
                assert np.abs(their_grads[name] - own).max() <= limit, name


def test_a_video_of_two_processes_is_that_of_one(two):
    for _, frames in two:
        assert np.abs(frames.astype(int) - golden("videos")["i2v dpm"]).max() <= 2


def test_three_videos_of_two_sequences_are_those_of_one_process(four, tmp_path):
    """The second sequence makes the last one along; all is written once, by who leads its making."""
    for alone, *others in zip(videos(tmp_path / "videos"), *(made for _, made in four), strict=True):
        assert alone.std() > 10
        for frames in others:
            assert np.abs(frames.astype(int) - alone).max() <= 1


@pytest.mark.parametrize(
    ("num_videos", "shares"),
    [
        (5, [[(0, True), (2, True), (4, True)], [(1, True), (3, True), (4, False)]]),
        (2, [[(0, True)], [(1, True)]]),
        (1, [[(0, True)], [(0, False)]]),
    ],
)
def test_sequences_come_to_the_model_equally_often(num_videos, shares):
    for rank in range(4):
        share = [(index, writes and rank % 2 == 0) for index, writes in shares[rank // 2]]
        assert generate.share_of(num_videos, Ranks(layout=Layout(size=4, sequence=2), rank=rank)) == share


def test_heads_that_do_not_divide_are_refused_with_the_numbers_that_do():
    require_divisible_heads(3, 30)
    with pytest.raises(
        FactoryError, match=r"sequence=4 needs heads divisible by 4; this model has 30\. Use one of 1, 2, 3, 5"
    ):
        require_divisible_heads(4, 30)
