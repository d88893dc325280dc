"""F8, F9 as a user meets them: a command is given a damaged file and names it, or goes on without it and says so."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

import yaml

from cogvideox_factory import draws
from cogvideox_factory.checkpoints import MANIFEST, STATE, checkpoint_folders
from tests.faults import engine
from tests.faults.training import bench, command, finished, recipe, same, wanted
from tests.faults.trial import Outcome, Trial, Verdict, in_child

_UNFIT = 5


@dataclass(frozen=True, slots=True)
class Given:
    """A file that a command reads, and how that is judged."""

    kind: str
    folder: Path
    """Copied for every trial."""
    file: str
    judge: Callable[[Path, str], tuple[Verdict, str]]
    """(the copy, the file) -> verdict, detail."""


@once
def given() -> tuple[Given, ...]:
    """Return a file of each kind that commands read, of a finished run of either method and of a cache."""
    work, cache = finished(), bench() / "cache"
    newest = checkpoint_folders(work / "lora")[-1]
    shard = next(path.name for path in newest.glob("*.safetensors"))
    entries = {kind: next((cache / kind).rglob("*.safetensors")) for kind in ("clips", "text")}
    adapter, transformer = work / "lora/final", work / "full/final/transformer"
    return (
        *(Given(f"cache entry in {kind}/, trained on", cache, str(path.relative_to(cache)), _train_on)
          for kind, path in entries.items()),
        *(Given(f"checkpoint {name}, resumed from", work / "lora", f"{newest.name}/{name}", _resume)
          for name in (shard, STATE, MANIFEST)),
        Given("LoRA file, generated with", adapter, "pytorch_lora_weights.safetensors", _generate),
        Given("transformer, generated with", transformer, "diffusion_pytorch_model.safetensors", _generate),
    )  # fmt: skip


def _refused(ended: Outcome, path: Path) -> tuple[Verdict, str]:
    """Judge a command that was given a damaged file: told by its name, nothing made."""
    if ended.value != _UNFIT:
        return ended.broke or Verdict.SILENT, f"exit {ended.value}: {ended.output}{ended.error}"
    if path.name not in ended.output and str(path.parent) not in ended.output:
        return Verdict.SILENT, f"{path} is not named: {ended.output}"
    return Verdict.REFUSED, ""


def _train_on(cache: Path, file: str) -> tuple[Verdict, str]:
    run = cache.with_name("run")
    shutil.rmtree(run, ignore_errors=True)
    verdict, detail = _refused(in_child(command, "train", recipe(run, cache=cache)), cache / file)
    if verdict == Verdict.REFUSED and (run / "final").exists():
        return Verdict.SILENT, "the run was finished and exported"
    return verdict, detail


def _resume(run: Path, file: str) -> tuple[Verdict, str]:
    """The newest checkpoint of a run is damaged, and its export is gone: the one before must lead to the same bits."""
    shutil.rmtree(run / "final")
    ended = in_child(command, "train", recipe(run))
    if ended.value != 0:
        return ended.broke or Verdict.LOST, f"exit {ended.value}: {ended.output}{ended.error}"
    verdict, detail = same(run, wanted())
    told = f"skipped: {run / file.partition('/')[0]}" in ended.output
    if verdict == Verdict.OK and not told and list(run.glob("broken-*")):
        return Verdict.SILENT, f"a checkpoint was left out, untold: {ended.output}"
    return (Verdict.DEGRADED if told else verdict, detail) if verdict == Verdict.OK else (verdict, detail)


def _generate(weights: Path, file: str) -> tuple[Verdict, str]:
    out, is_lora = weights.with_name("out.mp4"), file.startswith("pytorch_lora")
    values = {
        "engine": engine.chosen(), "run": {"device": "cpu", "dtype": "float32"}, "sampling": {"steps": 1},
        "model": {"path": str(bench() / "model")} | ({} if is_lora else {"transformer": str(weights)}),
        "generate": {"prompt": ["x"], "num_frames": 9, "height": 64, "width": 64, "out": str(out)}
        | ({"lora": [str(weights)]} if is_lora else {}),
    }  # fmt: skip
    path = weights.with_name("generate.yaml")
    path.write_text(yaml.safe_dump(values))
    verdict, detail = _refused(in_child(command, "generate", path), weights / file)
    return (Verdict.SILENT, "a video was made") if out.exists() else (verdict, detail)


def _trials(
    family: str, count: int, spoil: Callable[[bytes, str, int], bytes], work: Path, *, first: int
) -> Iterator[Trial]:
    """Spoil a file of each kind in turn, from the `first` on, in a copy of its folder; one at least."""
    kinds = given()
    for number in range(max(1, count)):
        it = kinds[(first + number) % len(kinds)]
        copy = work / "given"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(it.folder, copy)
        path = copy / it.file
        path.write_bytes(spoil(path.read_bytes(), it.kind, number))
        verdict, detail = it.judge(copy, it.file)
        yield Trial(
            family=family, name=f"{it.kind} at draw {number}", verdict=verdict, detail=detail, layer="the command"
        )


def cut_files(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F8: cut at drawn points."""

    def spoil(data: bytes, kind: str, number: int) -> bytes:
        return data[: int(draws.generator(seed, "cut", kind, str(number)).integers(0, len(data)))]

    return _trials("F8", count, spoil, work, first=0)


def flipped_bits(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F9: one bit, at drawn places."""

    def spoil(data: bytes, kind: str, number: int) -> bytes:
        place = int(draws.generator(seed, "flip", kind, str(number)).integers(0, 8 * len(data)))
        spoilt = bytearray(data)
        spoilt[place // 8] ^= 1 << place % 8
        return bytes(spoilt)

    return _trials("F9", count, spoil, work, first=2)
