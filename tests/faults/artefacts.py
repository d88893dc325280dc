"""F8, F9 of what a run leaves: checkpoints, LoRA files and fine-tuned transformers, cut or with a bit flipped."""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache as once
from pathlib import Path

from cogvideox_factory import draws
from cogvideox_factory.checkpoints import checkpoint_folders
from cogvideox_factory.errors import FactoryError
from cogvideox_factory.lora_files import load_lora
from cogvideox_factory.weights import load_folder, read_config
from tests.faults.training import digest, finished
from tests.faults.trial import Trial, Verdict, spread


@dataclass(frozen=True, kw_only=True, slots=True)
class Artefact:
    """A file of a finished run, and what reads it."""

    kind: str
    folder: Path
    file: str
    read: Callable[[Path], object]
    """Takes the folder; raises where it refuses, else returns what it read."""


def _read_checkpoint(path: Path) -> str:
    from cogvideox_factory.checkpoints import read_state, verify_checkpoint

    verify_checkpoint(path)
    return digest(path) + json.dumps(read_state(path), sort_keys=True)


def _read_lora(path: Path) -> list[tuple[str, bytes]]:
    file = load_lora(path)
    return [("", repr((file.rank, file.alpha, file.target_modules)).encode())] + [
        (name, array.tobytes()) for name, array in sorted(file.arrays.items())
    ]


def _read_transformer(path: Path) -> list[tuple[str, bytes]]:
    config = json.dumps(read_config(path), sort_keys=True)
    return [(config, b"")] + [(name, array.tobytes()) for name, array in sorted(load_folder(path).items())]


@once
def artefacts() -> tuple[Artefact, ...]:
    """Return one file of each of the kinds a run leaves."""
    run = finished()
    checkpoint, transformer = checkpoint_folders(run / "lora")[-1], run / "full" / "final" / "transformer"
    shard = next(checkpoint.glob("*.safetensors")).name
    return (
        *(
            Artefact(kind=f"checkpoint {name}", folder=checkpoint, file=file, read=_read_checkpoint)
            for name, file in (("shard", shard), ("state", "state.json"), ("manifest", "MANIFEST.json"))
        ),
        Artefact(
            kind="LoRA file", folder=run / "lora/final", file="pytorch_lora_weights.safetensors", read=_read_lora
        ),
        Artefact(
            kind="transformer weights", folder=transformer, file="diffusion_pytorch_model.safetensors",
            read=_read_transformer,
        ),
        Artefact(kind="transformer config", folder=transformer, file="config.json", read=_read_transformer),
    )  # fmt: skip


def _judge(artefact: Artefact, spoilt: bytes, work: Path) -> tuple[Verdict, str, str]:
    """Return (verdict, what noticed, detail) of a copy of the folder in which the file is `spoilt`."""
    shutil.rmtree(work, ignore_errors=True)
    shutil.copytree(artefact.folder, work)
    (work / artefact.file).write_bytes(spoilt)
    told: list[str] = []
    heard = logging.Handler()
    heard.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cogvideox_factory").addHandler(heard)
    try:
        found = artefact.read(work)
    except FactoryError as error:
        layer = "digest" if "changed or damaged" in str(error) or "not the one" in str(error) else "header and size"
        is_named = str(work) in str(error)
        return (Verdict.REFUSED if error.exit_code == 5 and is_named else Verdict.SILENT), layer, str(error)
    finally:
        logging.getLogger("cogvideox_factory").removeHandler(heard)
    if any("is not the one these weights were saved with" in line for line in told):
        return Verdict.DEGRADED, "digest", ""  # people edit configs, so a change is told and not refused
    if found == artefact.read(artefact.folder):
        return Verdict.OK, "", ""
    return Verdict.SILENT, "", f"{artefact.file} differs and nothing was told"


def cut_files(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F8: each kind, cut at evenly spread points."""
    for artefact in artefacts():
        data = (artefact.folder / artefact.file).read_bytes()
        for point in spread(list(range(len(data))), count):
            verdict, layer, detail = _judge(artefact, data[:point], work / "spoilt")
            yield Trial(family="F8", name=f"{artefact.kind} at {point}", verdict=verdict, layer=layer, detail=detail)


def flipped_bits(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F9: one bit of each kind, at drawn places: half of them in the head, where most meanings are."""
    for artefact in artefacts():
        data = (artefact.folder / artefact.file).read_bytes()
        rng = draws.generator(seed, "flip", artefact.kind)
        head = min(len(data), 8 + int.from_bytes(data[:8], "little")) if artefact.file.endswith("ensors") else len(data)
        places = [int(rng.integers(0, 8 * (head if n % 2 else len(data)))) for n in range(count)]
        for number, place in enumerate(places):
            spoilt = bytearray(data)
            spoilt[place // 8] ^= 1 << place % 8
            verdict, layer, detail = _judge(artefact, bytes(spoilt), work / "spoilt")
            name = f"{artefact.kind} bit {place} at {number}"
            yield Trial(family="F9", name=name, verdict=verdict, layer=layer, detail=detail)
