"""F15: checkpoints, weights and LoRA files made to run code or to fill the memory. Nothing of them is ever executed."""

import gzip
import io
import json
import os
import pickle
import resource
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from cogvideox_factory.checkpoints import digest
from tests.faults.artefacts import artefacts
from tests.faults.trial import Trial, Verdict, in_child, spread

_SPARE = 64 * 2**20
"""What reading a small file may cost beside twice its size."""


class _Runs:
    """Runs a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple]:
        return self.call


def _pickles(marker: Path) -> dict[str, bytes]:
    """Return ten ways to have `marker` made by whoever unpickles them."""
    touch = f"touch {marker}"
    code = f"open({str(marker)!r}, 'w')"
    system = _Runs(os.system, touch)
    plain = {
        "os.system": system, "exec": _Runs(exec, code), "eval": _Runs(eval, code),
        "open": _Runs(open, str(marker), "w"), "os.mkdir": _Runs(os.mkdir, str(marker)),
        "in a list": [1, [2, [system]]], "as a value": {"weight": system},
    }  # fmt: skip
    made = {name: pickle.dumps(value) for name, value in plain.items()}
    made["protocol 0"] = pickle.dumps(system, protocol=0)
    made["torch zip"] = _torch_zip(made["as a value"])
    made["numpy objects"] = _object_array(system)
    return made


def _torch_zip(payload: bytes) -> bytes:
    """Return what `torch.save` writes, by its layout."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", payload)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return file.getvalue()


def _object_array(value: object) -> bytes:
    file = io.BytesIO()
    np.save(file, np.array([value], dtype=object), allow_pickle=True)
    return file.getvalue()


def _header(entries: object, data: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def _abused() -> dict[str, bytes]:
    """Return safetensors files that lie, and archives that grow."""

    def one(**other: Any) -> dict[str, Any]:
        return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | other}

    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(64 * 2**20))
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../../outside"))
    return {
        "header of 2**63 bytes": (2**63).to_bytes(8, "little") + b"{}",
        "header longer than the file": (10**9).to_bytes(8, "little") + b"{" + bytes(64),
        "more data than there is": _header(one(shape=[2**40], data_offsets=[0, 2**42]), bytes(8)),
        "sizes that overflow": _header(one(shape=[2**62, 4], data_offsets=[0, 0])),
        "tensors that overlap": _header(one() | {"v": one()["w"]}, bytes(8)),
        "a hole": _header(one() | {"v": one(data_offsets=[16, 24])["w"]}, bytes(24)),
        "negative offsets": _header(one(data_offsets=[-8, 0]), bytes(8)),
        "another shape than its data": _header(one(shape=[3]), bytes(8)),
        "a header that is no text": _header(b"\xff\xfe{}"),
        "100,000 open brackets": _header(b"[" * 100_000),
        "a million tensors": _header(_million()),
        "zip bomb": bomb.getvalue(),
        "gzip bomb": gzip.compress(bytes(64 * 2**20)),
        "tar that leads out": tar.getvalue(),
        "a list": b"[1]", "an empty object": b"{}", "a number": b"1",
        "no step": b'{"format": 1, "step": null}', "100,000 brackets, bare": b"[" * 100_000,
        "a path that leads out": b'{"../../outside": {"size": 1, "sha256": ""}}',
    }  # fmt: skip


def _million() -> bytes:
    entry = b'"%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return b"{" + b",".join(entry % number for number in range(1_000_000)) + b"}"


def _load_checkpoint(good: Path, path: Path) -> None:
    """Load as a resumed run does, into tensors like those of the good checkpoint."""
    import torch

    from cogvideox_factory.tensors import open_tensors
    from cogvideox_factory.torch_engine import checkpoint

    tensors = {}
    for shard in good.glob("*.safetensors"):
        with open_tensors(shard) as file:
            tensors |= {name: torch.zeros(file.shape(name)) for name in file.names}
    checkpoint.load_checkpoint(path, tensors)


def _read(artefact: Any, path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    try:
        _load_checkpoint(artefact.folder, path) if artefact.kind.startswith("checkpoint") else artefact.read(path)
    finally:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        assert grown <= 2 * size + _SPARE, f"reading {size} bytes took {grown}"


def hostile_files(count: int, seed: int, work: Path) -> Iterator[Trial]:
    """F15: each of them in the place of each file of a run, with a manifest that vouches for it where there is one."""
    marker = work / "executed"
    payloads = {f"pickle: {name}": data for name, data in _pickles(marker).items()} | _abused()
    _proves_itself(payloads["pickle: os.system"], marker)
    every = [(artefact, name) for artefact in artefacts() for name in payloads]
    for artefact, name in spread(every, count):
        path = work / "spoilt"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(artefact.folder, path)
        (path / artefact.file).write_bytes(payloads[name])
        if artefact.file != "MANIFEST.json":
            _vouch(path)
        verdict, detail = _judge(artefact, path, marker)
        yield Trial(family="F15", name=f"{artefact.kind}: {name}", verdict=verdict, detail=detail)
    yield from _beside(payloads["pickle: os.system"], work, marker)


def _proves_itself(payload: bytes, marker: Path) -> None:
    """Show that a payload works where somebody does unpickle it, or the family would prove nothing."""
    pickle.loads(payload)  # noqa: S301
    assert marker.exists()
    marker.unlink()


def _vouch(path: Path) -> None:
    """Let a checkpoint's manifest say what stands there, as whoever made the file could."""
    manifest = path / "MANIFEST.json"
    if manifest.exists():
        files = sorted(file for file in path.iterdir() if file != manifest)
        manifest.write_text(json.dumps({file.name: digest(file) for file in files}))


def _judge(artefact: Any, path: Path, marker: Path) -> tuple[Verdict, str]:
    ended = in_child(_read, artefact, path)
    if marker.exists():
        marker.unlink() if marker.is_file() else marker.rmdir()
        return Verdict.SILENT, "it was executed"
    if ended.exit_code in (4, 5):
        return Verdict.REFUSED, ""
    if artefact.kind == "transformer config" and not ended.broke:
        return Verdict.DEGRADED, ""  # another object of settings than the weights were saved with, which is told
    return ended.broke or Verdict.SILENT, f"exit {ended.exit_code}: {ended.output[-800:]}{ended.error}"


def _beside(payload: bytes, work: Path, marker: Path) -> Iterator[Trial]:
    """Put pickles under the names other programs read, beside good files or instead of them."""
    by_kind = {artefact.kind: artefact for artefact in artefacts()}
    tries = [
        ("checkpoint shard", ".metadata", False), ("checkpoint shard", "optimizer.pt", False),
        ("LoRA file", "pytorch_lora_weights.bin", True), ("LoRA file", "pytorch_lora_weights.bin", False),
        ("transformer weights", "diffusion_pytorch_model.bin", True),
        ("transformer weights", "diffusion_pytorch_model.bin", False),
    ]  # fmt: skip
    for kind, name, alone in tries:
        artefact, path = by_kind[kind], work / "spoilt"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(artefact.folder, path)
        (path / name).write_bytes(payload)
        if alone:
            (path / artefact.file).unlink()
        verdict, detail = _judge(artefact, path, marker)
        if verdict == Verdict.SILENT and not alone and not detail.startswith("it was"):
            verdict, detail = Verdict.OK, ""  # the good file is read, the stranger is not
        yield Trial(
            family="F15", name=f"{name} {'instead of' if alone else 'beside'} {artefact.file}", verdict=verdict,
            detail=detail,
        )  # fmt: skip
