"""The VAE of 2 and 4 processes against that of one: every frame count, tiles, clips and rows, and what is exchanged."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from cogvideox_factory.diffusion.frames import frame_batches
from cogvideox_factory.models import VaeConfig
from cogvideox_factory.torch_engine.vae import CogVideoXVAE
from cogvideox_factory.torch_engine.vae_blocks import Downsample, Upsample
from cogvideox_factory.torch_engine.vae_layers import CausalConv, GroupNorm
from tests.torch_engine.processes import run_in

TINY = VaeConfig(block_out_channels=(8, 8, 16, 16), norm_num_groups=4, layers_per_block=1)
ROUNDING = 1e-5
"""Of the largest value: rows sum the same numbers in another order. Seen are at most 1.3e-6."""


@dataclass(frozen=True, kw_only=True)
class Case:
    frames: int = 9
    height: int = 40  # 5 rows of latents, which neither 2 nor 4 divide
    width: int = 8
    batch: int = 1
    tiles: tuple[int, int, float, float] | None = None
    slicing: bool = False
    config: VaeConfig = TINY
    dtype: torch.dtype = torch.float32


ROWS = {
    2: [
        *(Case(frames=frames) for frames in (1, 6, 9, 53, 81)),
        Case(frames=17, height=64, width=24, batch=3),
        Case(frames=13, config=replace(TINY, latent_channels=3, use_quant_conv=True, use_post_quant_conv=True)),
        Case(frames=17, dtype=torch.float64),
    ],
    4: [
        *(Case(frames=frames) for frames in (1, 2, 5, 17, 49, 77)),
        Case(frames=12, batch=3, slicing=True),
        Case(frames=20, config=replace(TINY, temporal_compression_ratio=8, layers_per_block=2, norm_num_groups=2)),
        Case(frames=17, dtype=torch.bfloat16),
    ],
}  # fmt: skip
CLIPS = [
    Case(batch=4),
    Case(batch=4, slicing=True),
    Case(frames=17, height=8),  # a single row of latents: not everybody gets one
    Case(frames=1, height=8, batch=3),
]
TILES = {
    2: [
        *(Case(frames=frames, height=56, width=88, tiles=(48, 80, 1 / 6, 0.2)) for frames in (1, 17)),  # with slivers
        Case(frames=81, height=32, width=8, tiles=(16, 32, 0.5, 0.5)),
    ],
    4: [
        Case(frames=9, height=40, width=40, tiles=(32, 32, 0.5, 0.5), batch=2),
        Case(frames=53, height=24, width=8, tiles=(16, 32, 0.5, 0.5)),
        Case(frames=5, height=24, width=16, tiles=(16, 16, 0.5, 0.5), batch=3, slicing=True, dtype=torch.bfloat16),
    ],
}


def coded(case: Case, group: dist.ProcessGroup | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]:
    """Return moments and decoded latents, and the talk and work of both: calls by name, elements coded."""
    vae = CogVideoXVAE(case.config, seed=3)
    with torch.no_grad():
        for index, parameter in enumerate(vae.parameters()):  # residual branches start silent
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
            parameter += noise * 0.3 / max(1, parameter[0].numel()) ** 0.5
    vae.to(case.dtype).requires_grad_(False)
    vae.group = group
    if case.tiles:
        vae.enable_tiling(*case.tiles)
    if case.slicing:
        vae.enable_slicing()
    seen: Counter[str] = Counter()
    counts = []
    for coder in (vae.encoder, vae.decoder):
        coder.register_forward_pre_hook(lambda _coder, inputs: seen.update(elements=inputs[0].numel()))
    draw = torch.Generator().manual_seed(case.frames)
    pixels = torch.rand(case.batch, 3, case.frames, case.height, case.width, generator=draw) * 2 - 1
    with counted_talk(seen):
        mean, logvar = vae.encode(pixels.to(case.dtype))
        counts.append(dict(seen))
        seen.clear()
        latents = torch.randn(mean.shape, generator=draw).to(case.dtype)
        decoded = vae.decode(latents)
        counts.append(dict(seen))
    return mean, logvar, decoded, counts


@contextmanager
def counted_talk(seen: Counter[str]) -> Iterator[None]:
    """Count what goes through the group, for the duration."""

    def counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[name] += 1
            return function(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("batch_isend_irecv", "all_gather"):
            patch.setattr(dist, name, counting(name, getattr(dist, name)))
        yield


def in_processes(cases: list[Case]):
    return [coded(case, dist.group.WORLD) for case in cases]


@cache
def alone(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[Any]]:
    return coded(case, None)


@pytest.fixture(scope="module", params=[2, 4])
def results(request, tmp_path_factory):
    """Return the number of processes, and what each made of each case."""
    cases = [*ROWS[request.param], *CLIPS, *TILES[request.param]]
    made = run_in(request.param, in_processes, cases, folder=tmp_path_factory.mktemp("vae"))
    return request.param, dict(zip(cases, zip(*made), strict=True))


def test_rows_and_clips_equal_one_process_at_every_frame_count(results):
    size, made = results
    for case in [*ROWS[size], *CLIPS]:
        for ours, theirs in zip(made[case][0][:3], alone(case)[:3], strict=True):
            assert ours.dtype == theirs.dtype
            error = (ours - theirs).double().abs().max() / theirs.double().abs().max()
            limit = {torch.float32: ROUNDING, torch.float64: 1e-13, torch.bfloat16: 0.05}[case.dtype]
            assert error <= limit, (case, error)


def test_tiles_equal_one_process_to_the_bit(results):
    size, made = results
    for case in TILES[size]:
        for ours, theirs in zip(made[case][0][:3], alone(case)[:3], strict=True):
            assert torch.equal(ours, theirs), case


def test_all_processes_end_with_the_same_bits(results):
    _, made = results
    for case, by_rank in made.items():
        for other in by_rank[1:]:
            assert all(torch.equal(a, b) for a, b in zip(by_rank[0][:3], other[:3], strict=True)), case


def test_nothing_is_coded_twice(results):
    size, made = results
    for case, by_rank in made.items():
        for way in range(2):
            work, whole = [counts[way].get("elements", 0) for *_, counts in by_rank], alone(case)[-1][way]["elements"]
            assert sum(work) == whole, case
            if case in ROWS[size]:
                a_row = whole / (case.height // 8)
                assert max(work) - min(work) <= a_row * 1.001, (case, work)


def test_what_is_exchanged(results):
    """Rows: edges once a convolution, numbers once a norm, for each frame batch; the others: a gather a round."""
    size, made = results
    for case, by_rank in made.items():
        vae = CogVideoXVAE(case.config)
        calls = case.batch if case.slicing else 1
        for way, coder in enumerate((vae.encoder, vae.decoder)):
            talk = {name: count for name, count in by_rank[-1][-1][way].items() if name != "elements"}
            if case in ROWS[size]:
                count = case.frames if way == 0 else vae.num_latent_frames(case.frames)
                batches = len(frame_batches(count, 8 if way == 0 else 2))
                convs, norms = (modules(coder, *kinds) for kinds in ((CausalConv, Downsample, Upsample), (GroupNorm,)))
                expected = {"batch_isend_irecv": calls * batches * convs}
                expected["all_gather"] = calls * (batches * norms + 1)
            elif case in CLIPS:
                at_once = 1 if case.slicing else -(-case.batch // size)
                expected = {"all_gather": -(-case.batch // at_once // size)}
            else:
                tiles = case.tiles
                assert tiles is not None
                rows, columns = (
                    -(-extent // (8 * max(1, round(size / 8 * (1 - share)))))
                    for extent, size, share in zip((case.height, case.width), tiles[:2], tiles[2:])
                )
                expected = {"all_gather": calls * -(-rows * columns // size)}
            assert talk == expected, (case, way)


def modules(coder: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(module, kinds) for module in coder.modules())


def test_gradients_are_not_shared(tmp_path):
    (problem, *_) = run_in(2, decode_with_gradients, folder=tmp_path)
    assert "no gradients" in problem


def decode_with_gradients():
    vae = CogVideoXVAE(TINY)
    vae.group = dist.group.WORLD
    try:
        vae.decode(torch.zeros(1, 1, 16, 2, 2))
    except AssertionError as error:
        return str(error)
